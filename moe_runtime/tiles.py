"""Which models decode from tiles (kernels/persistent) on a Hopper GPU, and what tiles take there.

Needs no GPU and no Triton: `plan` asks for GPUs that are not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from kernels.persistent.formats import EXPERT_TILES, TILE_COLUMNS, TILE_ROWS
from kernels.persistent.pack import tiles_of
from kernels.persistent.sizes import cdiv, router_blocks
from loaders.logical_schemes import scale_shape
from moe_runtime.config import ModelConfig
from moe_runtime.plan import MoreBytes
from quant.formats import QuantFormat

HOPPER = (9, 0)  # whose tensor core and copy instructions the kernel uses
EXPERTS_AT_ONCE = 8  # packed in one go: bounds the memory that takes


def why_not_tiled(
    config: ModelConfig, formats: Iterable[tuple[QuantFormat | None, QuantFormat | None]]
) -> str | None:
    """The reason that a model's step cannot be one kernel, whatever the GPU; None if it can.

    formats: of gate_up and down, each pair that there is
    """
    c = config
    kinds = {format for pair in formats for format in pair}
    if len(kinds) != 1:
        return "its experts are in several formats"
    (format,) = kinds
    if format is None or format.name not in EXPERT_TILES:
        return f"its experts are in {format.name if format else 'floats'}"
    group = c.num_heads // c.num_kv_heads
    if c.head_width != 64 or group not in (1, 2, 4, 8) or c.experts_per_token != 4:
        return "it is for heads of 64 numbers, 1 to 8 of them to a kv head, and 4 experts a token"
    if not c.swiglu_limit > 0:
        return "its experts' activation has no bound"
    if c.num_experts > 128 or c.model_width % 32 or c.expert_width % 32 or c.model_width > 4096:
        return "it is for up to 128 experts and widths up to 4096 that divide by 32"
    return None


def tiled_format(
    formats: Iterable[tuple[QuantFormat | None, QuantFormat | None]],
) -> QuantFormat:
    """The experts' format, where why_not_tiled has nothing against it."""
    ((format, _),) = formats
    assert format is not None
    return format


def more_bytes(config: ModelConfig, format: QuantFormat, *, fp8: bool) -> MoreBytes:
    """What tiles take beside the weights as stored, the experts' being in `format`.

    Dense weights stand in rows for prompts and in tiles for the step, in FP8 or bf16; rows of the
    router stand there behind the output projection's. Experts stand in tiles only, which are
    padded; while a layer's are packed it is there a second time, and a few of its experts in wider
    types.
    """
    c = config
    mixed_blocks = cdiv(c.model_width, TILE_ROWS) + router_blocks(c.num_experts, fp8=fp8)
    shapes = {
        "qkv": (c.qkv_width, c.model_width),
        "out": (mixed_blocks * TILE_ROWS, c.attention_width),
        "head": (c.vocab_size, c.model_width),
    }
    each = {
        name: tiles_of(rows, columns) * TILE_ROWS * TILE_COLUMNS * (1 if fp8 else 2)
        for name, (rows, columns) in shapes.items()
    }
    dense = c.num_layers * (each["qkv"] + each["out"]) + each["head"]
    halves = (2 * c.expert_width, c.model_width), (c.model_width, c.expert_width)
    codes = 3 * c.expert_width * c.model_width * format.value_bits // 8  # of an expert
    scales = sum(math.prod(scale_shape(format, half)) for half in halves)
    assert format.scale_dtype is not None
    stored = codes + scales * format.scale_dtype.itemsize
    padded = sum(expert_half_tiles(c)) * EXPERT_TILES[format.name].bytes
    packing = c.num_experts * stored + 12 * EXPERTS_AT_ONCE * codes
    whole = 2 * 4 if format.tensor_scale else 0  # of both halves, which tiles have in every row
    experts = c.num_layers * (c.num_experts * (padded - stored) - whole)
    return MoreBytes(dense + experts, packing)


def expert_half_tiles(config: ModelConfig) -> tuple[int, int]:
    """Tiles of an expert's gate_up and of its down."""
    c = config
    return tiles_of(2 * c.expert_width, c.model_width), tiles_of(c.model_width, c.expert_width)
