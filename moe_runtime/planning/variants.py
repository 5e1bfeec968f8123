"""The model as it is and as it could be: weights in other formats, the cache in FP8."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from loaders.logical import LogicalTensor
from loaders.logical_schemes import scale_shape
from loaders.safetensors_header import DTYPE_BITS
from moe_runtime.config import CACHE_ITEM_BYTES, DecoderConfig, ModelConfig
from moe_runtime.machines import Machine
from moe_runtime.plan import MemoryPlan, MoreBytes
from moe_runtime.planning.components import NOT_LOADED, Groups
from moe_runtime.planning.facts import PlannedConfig
from moe_runtime.tiles import HOPPER, more_bytes, tiled_format, why_not_tiled
from quant.formats import FP8_ROW, MXFP4, QuantFormat

DENSE = ("attention", "shared experts", "mlp", "head")  # what dense FP8 packs
_WIDE_BITS = 16  # a weight of fewer bits is not made FP8 again


@dataclass(frozen=True)
class Variant:
    """A model with its weights and cache in some formats."""

    name: str
    config: DecoderConfig
    weight_bytes: dict[str, int]  # by component, as loaded
    on_hopper: MoreBytes  # see moe_runtime/tiles.py
    tied_head: bool = False  # the embedding is the head too

    def memory(self, context: int, machine: Machine | None = None) -> MemoryPlan:
        """The runtime's plan for a cache of `context` positions, on a machine if one is named."""
        tiled = machine is not None and machine.capability == HOPPER
        more = self.on_hopper if tiled else MoreBytes()
        return MemoryPlan(self.config, self.weight_bytes, context, more=more)

    def token_bytes(self, context: int) -> dict[str, int]:
        """Bytes read for one token after `context` cached ones, by component."""
        read = self.memory(context).decode_bytes(context)
        if self.tied_head:
            read["head"] = self.weight_bytes["embedding"]
        if isinstance(self.config, PlannedConfig) and self.config.state_bytes:
            read["state"] = 2 * self.config.state_bytes
        return {component: size for component, size in read.items() if size}

    def total_bytes(self, context: int, machine: Machine) -> int:
        """Bytes of device memory that the model takes."""
        state = self.config.state_bytes if isinstance(self.config, PlannedConfig) else 0
        return self.memory(context, machine).total_bytes + state


def variants(config: DecoderConfig, groups: Groups) -> tuple[Variant, ...]:
    """As published first, then each change that would make a difference, then all of them."""
    published = _variant("as published", config, groups, lambda component, tensor: None)
    small_cache = _with_fp8_cache(config)
    rules = {"dense fp8": _dense_fp8, "experts mxfp4": _experts_mxfp4}
    found = [published]
    for name, rule in rules.items():
        changed = _variant(name, config, groups, rule)
        if changed.weight_bytes != published.weight_bytes:
            found.append(changed)
    found.append(replace(published, name="kv fp8", config=small_cache))
    if len(found) > 2:

        def all_rules(component: str, tensor: LogicalTensor) -> QuantFormat | None:
            return _dense_fp8(component, tensor) or _experts_mxfp4(component, tensor)

        names = ", ".join(variant.name for variant in found[1:])
        every = _variant(names, config, groups, all_rules)
        found.append(replace(every, config=small_cache))
    return tuple(found)


def stored_bytes(shape: tuple[int, ...], format: QuantFormat) -> int:
    """Bytes of a weight [.., rows, columns] in a format, scales included."""
    values = math.prod(shape) * format.value_bits // 8
    if format.scale_dtype is None:
        return values
    scales = math.prod(scale_shape(format, shape)) * format.scale_dtype.itemsize
    whole = 4 * math.prod(shape[:-2]) if format.tensor_scale else 0  # one fp32 a matrix
    return values + scales + whole


def can_store(shape: tuple[int, ...], format: QuantFormat) -> bool:
    """Whether a weight can be in a format: a matrix, whose rows are whole groups."""
    if len(shape) < 2 or min(shape) == 0:
        return False
    block = format.block
    return block is None or block[0] != 1 or not block[1] or shape[-1] % block[1] == 0


def is_matrix(component: str, tensor: LogicalTensor) -> bool:
    """Whether a tensor is a weight that a product reads, not a bias, a norm or a table."""
    if "bias" in tensor.name or "norm" in tensor.name:
        return False
    return len(tensor.shape) == 2 or (component == "experts" and len(tensor.shape) == 3)


def bits_of(tensor: LogicalTensor) -> int:
    """Bits of one stored value, scales not counted."""
    return tensor.format.value_bits if tensor.format else DTYPE_BITS[tensor.dtype]


def _variant(
    name: str,
    config: DecoderConfig,
    groups: Groups,
    rule: Callable[[str, LogicalTensor], QuantFormat | None],
) -> Variant:
    """A model whose weights are in the formats that the rule gives; None: as they are."""
    totals = {}
    for component, kinds in groups.items():
        if component in NOT_LOADED:
            continue
        formats = ((tensor, count, rule(component, tensor)) for tensor, count in kinds)
        totals[component] = sum(
            count * (stored_bytes(tensor.shape, format) if format else tensor.nbytes)
            for tensor, count, format in formats
        )
    tied = "embedding" in totals and "head" not in totals
    return Variant(name, config, totals, _on_hopper(config, groups, rule), tied_head=tied)


def _on_hopper(
    config: DecoderConfig,
    groups: Groups,
    rule: Callable[[str, LogicalTensor], QuantFormat | None],
) -> MoreBytes:
    """What a model's tiles take on a Hopper GPU, if it decodes from tiles there."""
    if not isinstance(config, ModelConfig) or config.family != "gpt_oss":
        return MoreBytes()

    def formats_in(component: str) -> set[QuantFormat | None]:
        kinds = groups.get(component, ())
        matrices = (tensor for tensor, _ in kinds if is_matrix(component, tensor))
        return {rule(component, tensor) or tensor.format for tensor in matrices}

    experts = tuple((format, format) for format in formats_in("experts"))
    if why_not_tiled(config, experts) is not None:
        return MoreBytes()
    return more_bytes(config, tiled_format(experts), fp8=formats_in("head") == {FP8_ROW})


def _dense_fp8(component: str, tensor: LogicalTensor) -> QuantFormat | None:
    wide = bits_of(tensor) >= _WIDE_BITS and is_matrix(component, tensor)
    return FP8_ROW if component in DENSE and wide else None


def _experts_mxfp4(component: str, tensor: LogicalTensor) -> QuantFormat | None:
    wide = bits_of(tensor) > MXFP4.value_bits and is_matrix(component, tensor)
    return MXFP4 if component == "experts" and wide and can_store(tensor.shape, MXFP4) else None


def _with_fp8_cache(config: DecoderConfig) -> PlannedConfig:
    """The same model with one byte a cached value; scales are not counted."""
    half = FP8_ROW.value_bits / (8 * CACHE_ITEM_BYTES)
    caches = tuple(
        part if part.state_rows else replace(part, row_bytes=int(part.row_bytes * half))
        for part in config.cache_parts
    )
    if isinstance(config, PlannedConfig):
        return replace(config, caches=caches)
    facts = {field.name: getattr(config, field.name) for field in fields(DecoderConfig)}
    return PlannedConfig(
        **facts,
        caches=caches,
        projections=config.projection_width,
        positions=config.position_width,
        streams=config.residual_width // config.model_width,
    )
