"""What a model takes: memory by component for a context, and bytes read for one token.

The runtime allocates from these figures and the reports print them, so they cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_runtime.config import ModelConfig
from moe_runtime.errors import DoesNotFitError

COMPONENTS = ("embedding", "attention", "router", "experts", "norms", "head")
PREFILL_CHUNK = 2048  # tokens that go through the layers at once
CACHE_ITEM_BYTES = 2  # keys and values are bf16
RESERVE_BYTES = 1 << 30  # CUDA context, kernels, captured graphs
MIN_CONTEXT = 512  # a shorter cache is not worth loading a model for

_COMPONENT_BY_NAME = {
    "embedding": "embedding",
    "head": "head",
    "final_norm": "norms",
    "attention.norm": "norms",
    "moe.norm": "norms",
    "moe.router": "router",
    "moe.router_bias": "router",
}


def component_of(name: str) -> str:
    """The component of a weight by its name in our models, e.g. layers.3.moe.gate_up: experts."""
    short = name.split(".", 2)[2] if name.startswith("layers.") else name
    return _COMPONENT_BY_NAME.get(short) or (
        "attention" if short.startswith("attention.") else "experts"
    )


def weights_by_component(nbytes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of each component from bytes of each weight."""
    totals = dict.fromkeys(COMPONENTS, 0)
    for name, size in nbytes.items():
        totals[component_of(name)] += size
    return totals


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device for one model and one context."""

    config: ModelConfig
    weight_bytes: dict[str, int]  # by component
    max_context: int

    @property
    def total_weight_bytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(self.weight_bytes.values())

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all layers."""
        slots = sum(cache_slots(self.config, i, self.max_context) for i in _layers(self.config))
        return slots * _cache_row_bytes(self.config)

    @property
    def workspace_bytes(self) -> int:
        """Activations of one prefill chunk and the decode step's buffers, rounded up."""
        c = self.config
        tokens = min(PREFILL_CHUNK, self.max_context)
        routed = tokens * c.experts_per_token + 128 * c.num_experts
        row = 8 * c.model_width + 4 * c.qkv_width + 4 * c.attention_width
        expert_row = 2 * c.model_width + 2 * c.expert_width + 4 * c.model_width
        rope = 4 * c.head_width * self.max_context
        return tokens * row + routed * expert_row + rope + 64 * c.vocab_size

    @property
    def compile_bytes(self) -> int:
        """The layers of zeros that compile the kernels, freed afterwards."""
        c = self.config
        table = 2 * c.vocab_size * c.model_width
        attention = 2 * c.model_width * (c.qkv_width + c.attention_width)
        expert = 4 * c.model_width * c.expert_width  # more than a byte a weight: room for the rest
        caches = {c.layer_is_sliding[i]: cache_slots(c, i, self.max_context) for i in _layers(c)}
        cache = sum(caches.values()) * _cache_row_bytes(c) // 2  # keys and values share it
        return table + attention + c.experts_per_token * expert + cache

    @property
    def total_bytes(self) -> int:
        """Everything the device must hold, with a reserve."""
        total = self.total_weight_bytes + self.cache_bytes + self.workspace_bytes
        return total + RESERVE_BYTES

    def decode_bytes(self, context: int) -> dict[str, int]:
        """Bytes read for one token after `context` cached ones, by component, cache included."""
        c = self.config
        read = dict(self.weight_bytes)
        read["embedding"] = read["embedding"] // c.vocab_size
        read["experts"] = read["experts"] * c.experts_per_token // c.num_experts
        seen = sum(
            min(context, c.sliding_window) if c.layer_is_sliding[i] else context for i in _layers(c)
        )
        read["cache"] = seen * _cache_row_bytes(c)
        return read


def cache_slots(config: ModelConfig, layer: int, max_context: int) -> int:
    """Positions a layer's cache holds: all, or on a sliding layer the window and one chunk."""
    if config.layer_is_sliding[layer]:
        return min(max_context, config.sliding_window + PREFILL_CHUNK)
    return max_context


def fit(
    config: ModelConfig,
    weight_bytes: dict[str, int],
    *,
    max_context: int | None,
    free_bytes: int,
    device: str,
) -> MemoryPlan:
    """The plan for a device with free_bytes; the longest context that fits if none is asked for.

    Raises DoesNotFitError naming what is needed, what there is and what would fit.
    """
    wanted = max_context or config.max_context
    plan = MemoryPlan(config, weight_bytes, wanted)
    if plan.total_bytes <= free_bytes:
        return plan
    longest = _longest_context(config, weight_bytes, free_bytes)
    if longest >= MIN_CONTEXT and max_context is None:
        return MemoryPlan(config, weight_bytes, longest)
    smallest = MemoryPlan(config, weight_bytes, min(wanted, MIN_CONTEXT))
    if longest >= MIN_CONTEXT:
        hint = f"a context of {longest} tokens fits: max_context={longest} (--max-context)"
    else:
        hint = (
            f"weights alone take {gb(plan.total_weight_bytes)}: it needs a device with "
            f"{gb(smallest.total_bytes)} free, or device='cpu' (slow)"
        )
    raise DoesNotFitError(
        f"{device}: the model with a context of {wanted} tokens needs {gb(plan.total_bytes)}, "
        f"{gb(free_bytes)} are free",
        hint=hint,
    )


def gb(size: int) -> str:
    """Bytes as GB (10^9) with two digits."""
    return f"{size / 1e9:.2f} GB"


def _longest_context(config: ModelConfig, weight_bytes: dict[str, int], free_bytes: int) -> int:
    low, high = 0, config.max_context
    while low < high:
        middle = (low + high + 1) // 2
        if MemoryPlan(config, weight_bytes, middle).total_bytes <= free_bytes:
            low = middle
        else:
            high = middle - 1
    return low if low == config.max_context else low // 256 * 256


def _cache_row_bytes(config: ModelConfig) -> int:
    return 2 * config.num_kv_heads * config.head_width * CACHE_ITEM_BYTES


def _layers(config: ModelConfig) -> range:
    return range(config.num_layers)
