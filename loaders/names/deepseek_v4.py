"""DeepSeek V4: our names of its weights, for the vendor's names and two spellings of transformers.

The vendor's names are those of the published files. transformers saves the same with "model." in
front and a few exceptions, or, if asked for, the names of its modules with experts in one tensor.
Which weights a layer has depends on its ratio and on whether it chooses experts by hash, so the
table is made for one model.

Letters as in moe_runtime/models/deepseek_v4_config.py. Rows of gate_up are those of the gate (w1),
then those of up (w3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

from loaders.names.table import NameTable, WeightSpec, dense, matrix, stacked

_INDEXED_RATIO = 4
_SKIP = {r"(model\.)?mtp\..*": "multi-token prediction is not used"}
_INTEGERS = ("I64", "I32")

# Transformers' spellings that are not "model." and the vendor's.
_SAVED_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "head.weight",  # the one without "model."
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
# The modules of transformers, in place of parts of the vendor's names, one after the other.
_MODULE_NAMES = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"attn\.indexer\.compressor\.", "attn.compressor.indexer."),
    (r"attn\.indexer\.weights_proj", "attn.compressor.indexer.scorer.weights_proj"),
    (r"attn\.indexer\.", "attn.compressor.indexer."),
    (r"compressor\.(indexer\.)?norm\.", r"compressor.\1kv_norm."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_", r".\1_hc."),
    (r"\.attn_sink", ".sinks"),
    (r"\.ape$", ".position_bias"),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.wq_(a|b)\.", r".q_\1_proj."),
    (r"\.wo_(a|b)\.", r".o_\1_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w2\.", ".down_proj."),
    (r"\.w3\.", ".up_proj."),
    (r"^layers\.(\d+)\.attn\.", r"model.layers.\1.self_attn."),
    (r"^layers\.(\d+)\.ffn\.", r"model.layers.\1.mlp."),
    (r"^layers\.", "model.layers."),
)
_ATTENTION = {
    "query_a": matrix("attn.wq_a.weight", "R D"),
    "query_norm": dense("attn.q_norm.weight", "R"),
    "query_b": matrix("attn.wq_b.weight", "HC R"),
    "row": matrix("attn.wkv.weight", "C D"),
    "row_norm": dense("attn.kv_norm.weight", "C"),
    "out_a": matrix("attn.wo_a.weight", "GO Y"),
    "out_b": matrix("attn.wo_b.weight", "D GO"),
    "sinks": dense("attn.attn_sink", "H"),
}
_INDEXER = {
    "query_b": matrix("attn.indexer.wq_b.weight", "IJ R"),
    "head_weights": matrix("attn.indexer.weights_proj.weight", "I D"),
}
_MOE = {
    "norm": dense("ffn_norm.weight", "D"),
    "router": dense("ffn.gate.weight", "E D"),
    "gate_up": stacked(
        "E 2F D",
        ("ffn.experts.{e}.w1.weight", "F D"),
        ("ffn.experts.{e}.w3.weight", "F D"),
    ),
    "down": stacked("E D F", ("ffn.experts.{e}.w2.weight", "D F")),
    "shared_gate": matrix("ffn.shared_experts.w1.weight", "F D"),
    "shared_up": matrix("ffn.shared_experts.w3.weight", "F D"),
    "shared_down": matrix("ffn.shared_experts.w2.weight", "D F"),
}


def name_table(
    names: Collection[str], compress_ratios: Sequence[int], num_hash_layers: int
) -> NameTable:
    """The table for tensors of these names; the arguments behind are those of vendor_names."""
    table = vendor_names(compress_ratios, num_hash_layers)
    if "model.embed_tokens.weight" not in names:
        return table
    if "lm_head.weight" in names:
        return _module_table(table)
    return NameTable({name: _renamed(s, _saved) for name, s in table.weights.items()}, _SKIP)


def vendor_names(compress_ratios: Sequence[int], num_hash_layers: int) -> NameTable:
    """The weights of a model by the names of the published files.

    compress_ratios: of each layer; 0 has no compressor, 4 has an indexer besides
    num_hash_layers: the first layers, with a table from tokens to experts for a router's bias
    """
    weights = {
        "embedding": dense("embed.weight", "V D"),
        "head": matrix("head.weight", "V D"),
        "final_norm": dense("norm.weight", "D"),
        **_hyper("hyper.head_", "hc_head_", "N", "1"),
    }
    for layer, ratio in enumerate(compress_ratios):
        of_layer = {
            **{f"attention.{name}": spec for name, spec in _attention(ratio).items()},
            **{f"moe.{name}": spec for name, spec in _moe(layer < num_hash_layers).items()},
            **_hyper("hyper.attention_", "hc_attn_", "M", "3"),
            **_hyper("hyper.moe_", "hc_ffn_", "M", "3"),
        }
        for name, spec in of_layer.items():
            weights[f"layers.{layer}.{name}"] = _renamed(spec, partial(_in_layer, layer))
    return NameTable(weights, _SKIP)


def _attention(ratio: int) -> dict[str, WeightSpec]:
    weights = {"norm": dense("attn_norm.weight", "D"), **_ATTENTION}
    if ratio == _INDEXED_RATIO:
        weights |= _compressor("compressor.", "attn.compressor.", ratio, "2C", "C")
        weights |= {f"indexer.{name}": spec for name, spec in _INDEXER.items()}
        inner = "indexer.compressor."
        weights |= _compressor(inner, "attn.indexer.compressor.", ratio, "2J", "J")
    elif ratio:
        weights |= _compressor("compressor.", "attn.compressor.", ratio, "C", "C")
    return weights


def _compressor(
    ours: str, theirs: str, ratio: int, projected: str, width: str
) -> dict[str, WeightSpec]:
    return {
        ours + "row": matrix(theirs + "wkv.weight", f"{projected} D"),
        ours + "gate": matrix(theirs + "wgate.weight", f"{projected} D"),
        ours + "position_bias": dense(theirs + "ape", f"{ratio} {projected}"),
        ours + "norm": dense(theirs + "norm.weight", width),
    }


def _moe(hashed: bool) -> dict[str, WeightSpec]:
    if hashed:
        return {**_MOE, "hash_ids": dense("ffn.gate.tid2eid", "V K", _INTEGERS)}
    return {**_MOE, "router_bias": dense("ffn.gate.bias", "E")}


def _hyper(ours: str, theirs: str, rows: str, scales: str) -> dict[str, WeightSpec]:
    return {
        ours + "function": dense(theirs + "fn", f"{rows} ND"),
        ours + "base": dense(theirs + "base", rows),
        ours + "scale": dense(theirs + "scale", scales),
    }


def _in_layer(layer: int, name: str) -> str:
    return f"layers.{layer}.{name}"


def _module_table(table: NameTable) -> NameTable:
    """The same by the names of transformers' modules."""
    weights = {name: _renamed(spec, _module_name) for name, spec in table.weights.items()}
    for name in weights:
        layer = ".".join(name.split(".")[:2])
        if name.endswith(".moe.gate_up"):
            weights[name] = matrix(f"model.{layer}.mlp.experts.gate_up_proj", "E 2F D")
        elif name.endswith(".moe.down"):
            weights[name] = matrix(f"model.{layer}.mlp.experts.down_proj", "E D F")
    return NameTable(weights, _SKIP)


def _module_name(name: str) -> str:
    for part, module in _MODULE_NAMES:
        name = re.sub(part, module, name)
    return name


def _saved(name: str) -> str:
    name = _SAVED_NAMES.get(name, "model." + name)
    return name.replace(".attn.kv_norm.", ".attn.norm.")


def _renamed(spec: WeightSpec, rename: Callable[[str], str]) -> WeightSpec:
    sources = tuple(replace(source, name=rename(source.name)) for source in spec.sources)
    return replace(spec, sources=sources)
