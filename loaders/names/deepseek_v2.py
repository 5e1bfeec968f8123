"""DeepSeek V2 (V2-Lite): our names of its weights, by layer; V3 and V3.2 add theirs to these.

D model width, R query rank, Q = H * (nope + rope) query columns, L latent width, LP = L + rotary
width, KV = H * (nope + value) rows, O = H * value columns, W width of a dense layer, S width of
the shared experts, E experts, F expert width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loaders.names.table import NameTable, WeightSpec, dense, matrix, stacked

MTP = "multi-token prediction is not used"
_LAYER = "model.layers.{i}."
ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."
_EXPERT = _MLP + "experts.{e}."

MODEL = {
    "embedding": dense("model.embed_tokens.weight", "V D"),
    "final_norm": dense("model.norm.weight", "D"),
    "head": matrix("lm_head.weight", "V D"),
}
EVERY_LAYER = {
    "layers.{i}.attention.norm": dense(_LAYER + "input_layernorm.weight", "D"),
    "layers.{i}.attention.latent_a": matrix(ATTENTION + "kv_a_proj_with_mqa.weight", "LP D"),
    "layers.{i}.attention.latent_norm": dense(ATTENTION + "kv_a_layernorm.weight", "L"),
    "layers.{i}.attention.latent_b": matrix(ATTENTION + "kv_b_proj.weight", "KV L"),
    "layers.{i}.attention.out": matrix(ATTENTION + "o_proj.weight", "D O"),
}
QUERY = {"layers.{i}.attention.query": matrix(ATTENTION + "q_proj.weight", "Q D")}
RANKED_QUERY = {
    "layers.{i}.attention.query_a": matrix(ATTENTION + "q_a_proj.weight", "R D"),
    "layers.{i}.attention.query_norm": dense(ATTENTION + "q_a_layernorm.weight", "R"),
    "layers.{i}.attention.query_b": matrix(ATTENTION + "q_b_proj.weight", "Q R"),
}
DENSE_LAYER = {
    "layers.{i}.mlp.norm": dense(_LAYER + "post_attention_layernorm.weight", "D"),
    "layers.{i}.mlp.gate": matrix(_MLP + "gate_proj.weight", "W D"),
    "layers.{i}.mlp.up": matrix(_MLP + "up_proj.weight", "W D"),
    "layers.{i}.mlp.down": matrix(_MLP + "down_proj.weight", "D W"),
}
MOE_LAYER = {
    "layers.{i}.moe.norm": dense(_LAYER + "post_attention_layernorm.weight", "D"),
    "layers.{i}.moe.router": dense(_MLP + "gate.weight", "E D"),
    "layers.{i}.moe.gate_up": stacked(
        "E 2F D", (_EXPERT + "gate_proj.weight", "F D"), (_EXPERT + "up_proj.weight", "F D")
    ),
    "layers.{i}.moe.down": stacked("E D F", (_EXPERT + "down_proj.weight", "D F")),
    "layers.{i}.moe.shared_gate": matrix(_MLP + "shared_experts.gate_proj.weight", "S D"),
    "layers.{i}.moe.shared_up": matrix(_MLP + "shared_experts.up_proj.weight", "S D"),
    "layers.{i}.moe.shared_down": matrix(_MLP + "shared_experts.down_proj.weight", "D S"),
}


def name_table(
    *, num_layers: int, num_dense_layers: int, has_query_rank: bool, num_mtp_layers: int
) -> NameTable:
    """The table of a model whose first num_dense_layers have no experts.

    num_mtp_layers: layers numbered after the others, which are left out
    """
    layers = range(num_layers)
    mtp = "|".join(str(num_layers + i) for i in range(num_mtp_layers))
    return NameTable(
        MODEL
        | of_layers(EVERY_LAYER | (RANKED_QUERY if has_query_rank else QUERY), layers)
        | of_layers(DENSE_LAYER, layers[:num_dense_layers])
        | of_layers(MOE_LAYER, layers[num_dense_layers:]),
        {rf"model\.layers\.({mtp})\..*": MTP} if mtp else {},
    )


def of_layers(weights: Mapping[str, WeightSpec], layers: range) -> dict[str, WeightSpec]:
    """A row for each of these layers."""
    return {
        name.replace("{i}", str(layer)): _of_layer(spec, layer)
        for layer in layers
        for name, spec in weights.items()
    }


def _of_layer(spec: WeightSpec, layer: int) -> WeightSpec:
    sources = (replace(s, name=s.name.replace("{i}", str(layer))) for s in spec.sources)
    return replace(spec, sources=tuple(sources))
