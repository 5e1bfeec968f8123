"""What a model takes: memory by component for a context, and bytes read for one token.

The runtime allocates from these figures and the reports print them, so they cannot drift apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moe_runtime.config import CachePart, DecoderConfig, ModelConfig
from moe_runtime.errors import DoesNotFitError

COMPONENTS = (
    *("embedding", "attention", "indexer", "compressor", "hyper-connections", "router"),
    *("hash tables", "experts", "shared experts", "mlp", "norms", "head"),
)
LOOKED_UP = ("embedding", "hash tables")  # components of which a token reads one row of V
PREFILL_CHUNK = 2048  # tokens that go through the layers at once
RESERVE_BYTES = 1 << 30  # CUDA context, kernels, captured graphs, one matrix decoded in prefill
MIN_CONTEXT = 512  # a shorter cache is not worth loading a model for

# On several devices heads and experts are divided; the rest is on each of them.
_DIVIDED = ("attention", "experts", "shared experts", "mlp")

_COMPONENT_BY_NAME = {
    "embedding": "embedding",
    "head": "head",
    "final_norm": "norms",
    "attention.norm": "norms",
    "moe.norm": "norms",
    "moe.router": "router",
    "moe.router_bias": "router",
    "moe.hash_ids": "hash tables",
    "mlp.norm": "norms",
    "attention.query_norm": "norms",
    "attention.latent_norm": "norms",
    "attention.row_norm": "norms",
}
_COMPONENT_BY_PREFIX = {
    "attention.indexer.": "indexer",
    "attention.compressor.": "compressor",
    "attention.": "attention",
    "hyper.": "hyper-connections",
    "moe.shared_": "shared experts",
    "moe.": "experts",
    "mlp.": "mlp",
}


def component_of(name: str) -> str:
    """The component of a weight by its name in our models, e.g. layers.3.moe.gate_up: experts."""
    short = name.split(".", 2)[2] if name.startswith("layers.") else name
    if short in _COMPONENT_BY_NAME:
        return _COMPONENT_BY_NAME[short]
    return next(what for prefix, what in _COMPONENT_BY_PREFIX.items() if short.startswith(prefix))


def weights_by_component(nbytes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of each component that the model has, from bytes of each weight."""
    totals = dict.fromkeys(COMPONENTS, 0)
    for name, size in nbytes.items():
        totals[component_of(name)] += size
    return {component: size for component, size in totals.items() if size}


def formats_by_component(formats: Mapping[str, str], nbytes: Mapping[str, int]) -> dict[str, str]:
    """The format of most bytes of each component, from format and bytes of each weight."""
    totals: dict[str, Counter[str]] = {}
    for name, size in nbytes.items():
        totals.setdefault(component_of(name), Counter())[formats[name]] += size
    return {component: sizes.most_common(1)[0][0] for component, sizes in totals.items()}


@dataclass(frozen=True)
class MoreBytes:
    """What a backend takes besides weights as stored, cache and activations."""

    tiles: int = 0  # more than the weights' own that their tiles take, see gpu/persistent.py
    packing: int = 0  # while weights are packed, then free


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device for one model and one context."""

    config: DecoderConfig
    weight_bytes: dict[str, int]  # of the whole model, by component
    max_context: int
    world_size: int = 1  # devices that share heads and experts, see check_world_size
    formats: Mapping[str, str] = field(default_factory=dict)  # of weights as loaded, by component
    more: MoreBytes = MoreBytes()

    @property
    def total_weight_bytes(self) -> int:
        """Bytes on one device of all weights as stored."""
        return sum(
            -(-size // self.world_size) if component in _DIVIDED else size
            for component, size in self.weight_bytes.items()
        )

    @property
    def format_label(self) -> str:
        """The weights' formats in short, as dense=bf16 experts=mxfp4."""
        dense, head = (self.formats.get(name, "unknown") for name in ("attention", "head"))
        of_head = "" if head == dense else f" head={head}"
        return f"dense={dense}{of_head} experts={self.formats.get('experts', 'none')}"

    @property
    def cache_bytes(self) -> int:
        """What all layers cache."""
        return sum(_allocated(part, self.max_context) for part in self.config.cache_parts)

    @property
    def workspace_bytes(self) -> int:
        """Activations of one prefill chunk and the decode step's buffers, rounded up."""
        c = self.config
        tokens = min(PREFILL_CHUNK, self.max_context)
        routed = tokens * c.experts_per_token + 128 * c.num_experts
        row = 4 * c.model_width + 4 * c.residual_width + 4 * c.projection_width
        expert_row = 2 * c.model_width + 2 * c.expert_width + 4 * c.model_width
        rope = 4 * c.position_width * self.max_context
        return tokens * row + routed * expert_row + rope + 64 * c.vocab_size

    @property
    def compile_bytes(self) -> int:
        """The layers of zeros that compile the kernels, freed afterwards."""
        c = self.config
        table = 2 * c.vocab_size * c.model_width
        attention = 2 * c.model_width * c.projection_width
        expert = 4 * c.model_width * c.expert_width  # more than a byte a weight: room for the rest
        # One layer of each kind; keys and values share it.
        cache = sum(_allocated(part, self.max_context) for part in set(c.cache_parts)) // 2
        return table + attention + c.experts_per_token * expert + cache

    @property
    def total_bytes(self) -> int:
        """Everything the device must hold, with a reserve."""
        besides = max(self.cache_bytes + self.workspace_bytes, self.more.packing)
        return self.total_weight_bytes + self.more.tiles + besides + RESERVE_BYTES

    def decode_bytes(self, context: int) -> dict[str, int]:
        """Bytes read for one token after `context` cached ones, by component, cache included."""
        c = self.config
        read = {}
        for component, size in self.weight_bytes.items():
            if component in LOOKED_UP:
                size //= c.vocab_size
            elif component == "experts":
                size = size * c.experts_per_token // c.num_experts
            read[component] = size
        read["cache"] = sum(_read(part, context) for part in c.cache_parts)
        return read


def cache_slots(config: ModelConfig, layer: int, max_context: int) -> int:
    """Positions a layer's cache holds: all, or on a sliding layer the window and one chunk."""
    return _slots(config.cache_parts[layer], max_context)


def check_world_size(config: DecoderConfig, world_size: int) -> None:
    """ValueError unless heads and experts can be divided among this many devices."""
    for what, count in (("heads", config.num_heads), ("experts", config.num_experts)):
        if world_size < 1 or count % world_size:
            raise ValueError(f"world_size must divide the model's {count} {what}, got {world_size}")


def fit(
    config: DecoderConfig,
    weight_bytes: dict[str, int],
    *,
    max_context: int | None,
    free_bytes: int,
    device: str,
    world_size: int = 1,
    more: MoreBytes = MoreBytes(),
) -> MemoryPlan:
    """The plan for a device with free_bytes; the longest context that fits if none is asked for.

    more: see MemoryPlan
    world_size: devices that share heads and experts; both must divide by it (ValueError)
    Raises DoesNotFitError naming what is needed, what there is and what would fit.
    """
    check_world_size(config, world_size)
    wanted = max_context or config.max_context
    plan = MemoryPlan(config, weight_bytes, wanted, world_size, more=more)
    if plan.total_bytes <= free_bytes:
        return plan
    longest = longest_context(plan, free_bytes)
    if longest >= MIN_CONTEXT and max_context is None:
        return replace(plan, max_context=longest)
    smallest = replace(plan, max_context=min(wanted, MIN_CONTEXT))
    if longest >= MIN_CONTEXT:
        hint = f"a context of {longest} tokens fits: max_context={longest} (--max-context)"
    else:
        weights = plan.total_weight_bytes + plan.more.tiles
        hint = (
            f"weights alone take {gb(weights)}: it needs a device with "
            f"{gb(smallest.total_bytes)} free, or device='cpu' (slow)"
        )
    raise DoesNotFitError(
        f"{device}: the model with a context of {wanted} tokens needs {gb(plan.total_bytes)}, "
        f"{gb(free_bytes)} are free",
        hint=hint,
    )


def longest_context(plan: MemoryPlan, free_bytes: int) -> int:
    """The longest context of the plan's model that fits free_bytes, to 256 tokens; 0 for none."""
    low, high = 0, plan.config.max_context
    while low < high:
        middle = (low + high + 1) // 2
        if replace(plan, max_context=middle).total_bytes <= free_bytes:
            low = middle
        else:
            high = middle - 1
    return low if low == plan.config.max_context else low // 256 * 256


def gb(size: int) -> str:
    """Bytes as GB (10^9) with two digits."""
    return f"{size / 1e9:.2f} GB"


def _slots(part: CachePart, max_context: int) -> int:
    if part.state_rows is not None:
        return part.state_rows
    rows = -(-max_context // part.tokens_per_row)
    return rows if part.window is None else min(rows, part.window + PREFILL_CHUNK)


def _allocated(part: CachePart, max_context: int) -> int:
    return part.row_bytes * _slots(part, max_context)


def _read(part: CachePart, context: int) -> int:
    """Bytes that one token reads after `context` cached ones."""
    if part.state_rows is not None:
        return part.row_bytes * part.state_rows
    limits = (context // part.tokens_per_row, part.window, part.most_read)
    return part.row_bytes * min(limit for limit in limits if limit is not None)
