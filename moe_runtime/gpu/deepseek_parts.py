"""What the launches of DeepSeek's decode step are for, and the bytes that each part reads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe_runtime.config import CACHE_ITEM_BYTES
from moe_runtime.gpu.deepseek_step import DeepseekStep
from moe_runtime.gpu.deepseek_weights import GatedExperts, Matrix
from moe_runtime.gpu.step_parts import address


def components(step: DeepseekStep) -> dict[int, str]:
    """Address of a weight or a cache -> what the kernel that reads it is for."""
    found: dict[int, str] = {address(step.weights.head): "head"}

    def name(what: str, *tensors: Matrix | None) -> None:
        found.update({address(tensor): what for tensor in tensors if tensor is not None})

    for w in step.weights.layers:
        a = w.attention
        name("qkv", *a.inputs, *a.queries)
        name("attention", a.projection)
        name("output projection", a.out)
        if a.indexer is not None:
            name("indexer", a.indexer.head_weights, a.indexer.norm)
        if w.routed is None:
            name("mlp", w.mlp_norm, w.always.gate_up, w.always.down)
            continue
        name("router", w.router)
        for experts in (w.always, w.routed):
            name("experts gate_up", experts.gate_up)
            name("experts down", experts.down)
    name("attention", *step.cache.latents, step.split_acc)
    name("indexer", *step.cache.index_keys, step.index_scores)
    return found


def component_bytes(plan: Mapping[str, int], step: DeepseekStep, context: int) -> dict[str, int]:
    """The plan's bytes of one token by our components.

    Projections of the indexer that are joined with the attention's count with them.
    """
    a = step.weights.layers[0].attention
    sizes = {"qkv": _nbytes(*a.inputs, *a.queries), "attention": _nbytes(a.projection)}
    sizes["output projection"] = _nbytes(a.out)
    attention = plan["attention"] + plan.get("indexer", 0)
    found = {what: attention * size // sum(sizes.values()) for what, size in sizes.items()}
    found["qkv"] += attention - sum(found.values()) + plan["norms"]
    keys = 0
    if step.config.indexer is not None:
        row = step.config.indexer.width * CACHE_ITEM_BYTES
        keys = min(plan["cache"], step.config.num_layers * context * row)
    found["indexer"] = keys
    found["attention"] += plan["cache"] - keys
    experts = plan.get("experts", 0) + plan.get("shared experts", 0)
    last = step.weights.layers[-1]
    half = experts * _first_half(last.routed or last.always) // 1000
    return found | {
        "embedding": plan["embedding"],
        "mlp": plan.get("mlp", 0),
        "router": plan.get("router", 0),
        "experts gate_up": half,
        "experts down": experts - half,
        "head": plan["head"],
    }


def _first_half(experts: GatedExperts) -> int:
    """Thousandths of an expert's bytes that are gate_up's."""
    gate_up, down = experts.gate_up.nbytes, experts.down.nbytes
    return 1000 * gate_up // (gate_up + down)


def _nbytes(*weights: Matrix | Tensor) -> int:
    return sum(weight.nbytes for weight in weights)
