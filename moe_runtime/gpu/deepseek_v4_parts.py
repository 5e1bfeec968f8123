"""What the launches of DeepSeek V4's decode step are for, and the bytes that each part reads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe_runtime.config import CACHE_ITEM_BYTES
from moe_runtime.gpu.deepseek_v4_step import DeepseekV4Step
from moe_runtime.gpu.deepseek_weights import Matrix
from moe_runtime.gpu.step_parts import address
from moe_runtime.models.deepseek_v4_config import INDEXED_RATIO


def components(step: DeepseekV4Step) -> dict[int, str]:
    """Address of a weight or a cache -> what the kernel that reads it is for."""
    found: dict[int, str] = {}

    def name(what: str, *tensors: Matrix | None) -> None:
        found.update({address(tensor): what for tensor in tensors if tensor is not None})

    name("head", step.weights.head)
    name("hyper-connections", step.weights.head_hyper.function)
    for w, cache in zip(step.weights.layers, step.cache.layers, strict=True):
        a = w.attention
        name("hyper-connections", w.attention_hyper.function, w.moe_hyper.function)
        name("qkv", *a.inputs, *a.queries)
        name("compressor", *a.compressed)
        if a.compressor is not None:
            name("compressor", a.compressor.position_bias)
        if a.indexer is not None:
            name("indexer", a.indexer.position_bias, cache.index_keys)
        name("attention", a.row_norm, a.sinks, cache.rows)
        name("output projection", a.out_a, a.out_b)
        name("router", w.router)
        for experts in (w.always, w.routed):
            name("experts gate_up", experts.gate_up)
            name("experts down", experts.down)
    name("indexer", step.index_scores)
    return found


def component_bytes(plan: Mapping[str, int], step: DeepseekV4Step, context: int) -> dict[str, int]:
    """The plan's bytes of one token by our components.

    Projections of the indexer are joined with the queries and with the compressor's, and count
    with them.
    """
    layers = step.weights.layers
    attentions = [w.attention for w in layers]
    sizes = {
        "qkv": sum(_nbytes(*a.inputs, *a.queries) for a in attentions),
        "compressor": sum(_nbytes(*a.compressed) for a in attentions),
        "output projection": sum(_nbytes(a.out_a, a.out_b) for a in attentions),
    }
    weights = sum(plan.get(name, 0) for name in ("attention", "compressor", "indexer"))
    found = {name: weights * size // sum(sizes.values()) for name, size in sizes.items()}
    found["qkv"] += weights - sum(found.values()) + plan["norms"]
    c = step.config
    indexed = c.compress_ratios.count(INDEXED_RATIO) if step.index_scores is not None else 0
    key_bytes = c.index_width * CACHE_ITEM_BYTES
    keys = min(plan["cache"], indexed * (context // INDEXED_RATIO) * key_bytes)
    states = sum(
        _nbytes(*(s for s in (cache.state, cache.index_state) if s is not None))
        for cache in step.cache.layers
    )
    found["compressor"] += states
    experts = plan["experts"] + plan["shared experts"]
    routed = layers[0].routed
    gate_up = routed.gate_up.nbytes
    half = experts * gate_up // (gate_up + routed.down.nbytes)
    return found | {
        "embedding": plan["embedding"],
        "hyper-connections": plan["hyper-connections"],
        "indexer": keys,
        "attention": plan["cache"] - keys - states,
        "router": plan["router"] + plan.get("hash tables", 0),
        "experts gate_up": half,
        "experts down": experts - half,
        "head": plan["head"],
    }


def _nbytes(*weights: Matrix | Tensor) -> int:
    return sum(weight.nbytes for weight in weights)
