"""DeepSeek V3, R1, V3.1 and Kimi-K2: V2's names, and the router's bias."""

from __future__ import annotations

from loaders.names import deepseek_v2
from loaders.names.deepseek_v2 import of_layers
from loaders.names.table import NameTable, dense

_ROUTER_BIAS = {
    "layers.{i}.moe.router_bias": dense(
        "model.layers.{i}.mlp.gate.e_score_correction_bias", "E", ("F32", "BF16")
    ),
}


def name_table(
    *, num_layers: int, num_dense_layers: int, has_query_rank: bool, num_mtp_layers: int
) -> NameTable:
    """The table of a model, see deepseek_v2.name_table."""
    table = deepseek_v2.name_table(
        num_layers=num_layers,
        num_dense_layers=num_dense_layers,
        has_query_rank=has_query_rank,
        num_mtp_layers=num_mtp_layers,
    )
    biases = of_layers(_ROUTER_BIAS, range(num_dense_layers, num_layers))
    return NameTable({**table.weights, **biases}, table.skip)
