"""DeepSeek V3.2: V3's names and an indexer in each layer.

I index heads, J index width, IJ = I * J, R query rank, D model width.
"""

from __future__ import annotations

from loaders.names import deepseek_v3
from loaders.names.deepseek_v2 import ATTENTION, of_layers
from loaders.names.table import NameTable, dense, matrix

_INDEXER = {
    "layers.{i}.attention.indexer.query": matrix(ATTENTION + "indexer.wq_b.weight", "IJ R"),
    "layers.{i}.attention.indexer.key": matrix(ATTENTION + "indexer.wk.weight", "J D"),
    "layers.{i}.attention.indexer.norm": dense(ATTENTION + "indexer.k_norm.weight", "J"),
    "layers.{i}.attention.indexer.norm_bias": dense(ATTENTION + "indexer.k_norm.bias", "J"),
    "layers.{i}.attention.indexer.head_weights": matrix(
        ATTENTION + "indexer.weights_proj.weight", "I D"
    ),
}


def name_table(
    *, num_layers: int, num_dense_layers: int, has_query_rank: bool, num_mtp_layers: int
) -> NameTable:
    """The table of a model, see deepseek_v2.name_table."""
    table = deepseek_v3.name_table(
        num_layers=num_layers,
        num_dense_layers=num_dense_layers,
        has_query_rank=has_query_rank,
        num_mtp_layers=num_mtp_layers,
    )
    return NameTable({**table.weights, **of_layers(_INDEXER, range(num_layers))}, table.skip)
