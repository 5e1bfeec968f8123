"""Where GPT-OSS's decode step is one persistent kernel (kernels/persistent), and how its weights
are laid out while they are loaded. The step itself is in persistent_step.py, which needs Gluon.

Experts stand in tiles only; prefill reads the same tiles. Dense weights stand in rows for prefill
and in tiles for the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kernels.persistent.pack import EXPERT_TILE_BYTES, TiledExperts, pack_experts, tiles_of
from kernels.persistent.sizes import StepSizes, cdiv
from kernels.triton_release import TRITON_RELEASE
from loaders.weights import Relayout
from moe_runtime.config import ModelConfig
from quant.formats import MXFP4, QuantFormat
from quant.tensor import QuantTensor

_HOPPER = (9, 0)  # its tensor core and copy instructions are this generation's own
_TRITON = (3, 6)  # whose Gluon the kernel is written in
_SHARED_BYTES = 227 << 10  # of a program
_EXPERTS_AT_ONCE = 8  # packed in one go: bounds the memory that takes


def why_not(
    config: ModelConfig,
    formats: Iterable[tuple[QuantFormat, QuantFormat]],
    device: torch.device,
) -> str | None:
    """The reason that a model's step cannot be one kernel there; None when it can."""
    c = config
    if device.type != "cuda":
        return "it needs a GPU"
    if torch.cuda.get_device_capability(device) != _HOPPER:
        return "it is written for Hopper GPUs (H100, H200)"
    if TRITON_RELEASE < _TRITON:
        return "it needs Triton 3.6 or later"
    if tuple(formats) != ((MXFP4, MXFP4),):
        return "its experts are not in MXFP4"
    if c.head_width != 64 or c.num_heads // c.num_kv_heads > 14 or c.experts_per_token != 4:
        return "it is for heads of 64 numbers, up to 14 of them to a kv head, and 4 experts a token"
    if c.num_experts > 128 or c.model_width % 32 or c.expert_width % 32 or c.model_width > 4096:
        return "it is for up to 128 experts and widths up to 4096 that divide by 32"
    try:
        for fp8 in (False, True):
            step_sizes(c, fp8=fp8, device=device)
    except ValueError as error:
        return str(error)
    return None


def step_sizes(config: ModelConfig, *, fp8: bool, device: torch.device) -> StepSizes:
    """The kernel's constants for a model on a GPU."""
    c = config
    facts = torch.cuda.get_device_properties(device)
    programs = facts.multi_processor_count
    group = c.num_heads // c.num_kv_heads
    splits = 1 << (max(1, min(16, programs // c.num_kv_heads)).bit_length() - 1)
    while group * c.head_width % splits:
        splits //= 2
    sizes = StepSizes(
        layers=c.num_layers,
        width=c.model_width,
        heads=c.num_heads,
        kv_heads=c.num_kv_heads,
        head_width=c.head_width,
        experts=c.num_experts,
        top_k=c.experts_per_token,
        hidden=c.expert_width,
        vocabulary=c.vocab_size,
        window=c.sliding_window,
        eps=c.norm_eps,
        limit=c.swiglu_limit,
        alpha=c.swiglu_alpha,
        fp8=fp8,
        programs=programs,
        splits=splits,
    )
    return sizes.with_rings(_SHARED_BYTES)


def tile_bytes(config: ModelConfig, *, fp8: bool) -> int:
    """Bytes that tiles take more than the weights that they are made of."""
    c = config
    rows = {"qkv": c.qkv_width, "out": c.model_width, "head": c.vocab_size}
    columns = {"qkv": c.model_width, "out": c.attention_width, "head": c.model_width}
    each = {
        name: cdiv(rows[name], 128) * 128 * cdiv(columns[name], 320) * 320 * (1 if fp8 else 2)
        for name in rows
    }
    dense = c.num_layers * (each["qkv"] + each["out"]) + each["head"]
    stored = 3 * c.expert_width * c.model_width * 17 // 32  # of an expert, codes and scales
    padded = sum(_half_tiles(c)) * EXPERT_TILE_BYTES
    return dense + c.num_layers * c.num_experts * (padded - stored)


def packing_bytes(config: ModelConfig) -> int:
    """Bytes taken for a while by the packing of a layer's experts: themselves, copies of a few."""
    c = config
    expert = 3 * c.expert_width * c.model_width // 2
    return c.num_experts * expert * 17 // 16 + 12 * _EXPERTS_AT_ONCE * expert


def _half_tiles(config: ModelConfig) -> tuple[int, int]:
    """Tiles of an expert's gate_up and of its down."""
    c = config
    return tiles_of(2 * c.expert_width, c.model_width), tiles_of(c.model_width, c.expert_width)


def relayout(config: ModelConfig, device: torch.device) -> Relayout:
    """Experts put into tiles layer by layer, all in one piece of memory."""
    c = config
    shape = (c.num_layers, c.num_experts, sum(_half_tiles(c)), EXPERT_TILE_BYTES)
    memory = torch.empty(shape, dtype=torch.uint8, device=device)
    up_tiles, _ = _half_tiles(c)

    def take(weights: dict[str, Tensor | QuantTensor]) -> dict[str, Any]:
        found: dict[str, Any] = dict(weights)
        for half, first in (("gate_up", 0), ("down", up_tiles)):
            name = next(name for name in weights if name.endswith(f".{half}"))
            weight, bias = weights[name], weights[f"{name}_bias"]
            assert isinstance(weight, QuantTensor) and isinstance(bias, Tensor), name
            tiles = memory[int(name.split(".")[1])]
            fill_tiles(tiles, first, weight, bias)
            found[name] = TiledExperts(tiles, first, weight.shape)
        return found

    names = ("gate_up", "gate_up_bias", "down", "down_bias")
    return Relayout([[f"layers.{i}.moe.{n}" for n in names] for i in range(c.num_layers)], take)


def fill_tiles(tiles: Tensor, first: int, weight: QuantTensor, bias: Tensor) -> None:
    """Pack experts [E, ..] into tiles [E, n, bytes] from tile `first` on, a few at a time."""
    assert weight.scales is not None
    scales = weight.scales.view(torch.uint8)
    for e in range(0, len(bias), _EXPERTS_AT_ONCE):
        some = slice(e, e + _EXPERTS_AT_ONCE)
        packed = pack_experts(weight.values[some], scales[some], bias[some])
        tiles[some, first : first + packed.shape[1]] = packed
