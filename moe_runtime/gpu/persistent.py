"""Where GPT-OSS's decode step is one persistent kernel (kernels/persistent), and how its weights
are laid out while they are loaded. The step itself is in persistent_step.py, which needs Gluon.

Experts stand in tiles only; prefill reads the same tiles. Dense weights stand in rows for prefill
and in tiles for the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.persistent.formats import EXPERT_TILES
from kernels.persistent.pack import TiledExperts, pack_experts
from kernels.persistent.sizes import StepSizes
from kernels.triton_release import TRITON_RELEASE
from loaders.weights import Relayout
from moe_runtime.config import ModelConfig
from moe_runtime.tiles import (
    EXPERTS_AT_ONCE,
    HOPPER,
    expert_half_tiles,
    tiled_format,
    why_not_tiled,
)
from quant.formats import QuantFormat
from quant.tensor import QuantTensor

_TRITON = (3, 6)  # whose Gluon the kernel is written in
_SHARED_BYTES = 227 << 10  # of a program


def why_not(
    config: ModelConfig,
    formats: Iterable[tuple[QuantFormat, QuantFormat]],
    device: torch.device,
) -> str | None:
    """The reason that a model's step cannot be one kernel there; None when it can."""
    c = config
    if device.type != "cuda":
        return "it needs a GPU"
    if torch.cuda.get_device_capability(device) != HOPPER:
        return "it is written for Hopper GPUs (H100, H200)"
    if TRITON_RELEASE < _TRITON:
        return "it needs Triton 3.6 or later"
    if reason := why_not_tiled(c, formats):
        return reason
    try:
        for fp8 in (False, True):
            step_sizes(c, tiled_format(formats), fp8=fp8, device=device)
    except ValueError as error:
        return str(error)
    return None


def step_sizes(
    config: ModelConfig, format: QuantFormat, *, fp8: bool, device: torch.device
) -> StepSizes:
    """The kernel's constants for a model on a GPU; its experts are in `format`."""
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
        tiles=EXPERT_TILES[format.name],
        splits=splits,
    )
    return sizes.with_rings(_SHARED_BYTES)


def relayout(config: ModelConfig, format: QuantFormat, device: torch.device) -> Relayout:
    """Experts put into tiles layer by layer, all in one piece of memory."""
    c = config
    tile_bytes = EXPERT_TILES[format.name].bytes
    shape = (c.num_layers, c.num_experts, sum(expert_half_tiles(c)), tile_bytes)
    memory = torch.empty(shape, dtype=torch.uint8, device=device)
    up_tiles, _ = expert_half_tiles(c)

    def take(weights: dict[str, Tensor | QuantTensor]) -> dict[str, Any]:
        found: dict[str, Any] = dict(weights)
        for half, first in (("gate_up", 0), ("down", up_tiles)):
            name = next(name for name in weights if name.endswith(f".{half}"))
            weight, bias = weights[name], weights[f"{name}_bias"]
            assert isinstance(weight, QuantTensor) and isinstance(bias, Tensor), name
            tiles = memory[int(name.split(".")[1])]
            fill_tiles(tiles, first, weight, bias)
            found[name] = TiledExperts(tiles, first, weight.shape, format)
        return found

    names = ("gate_up", "gate_up_bias", "down", "down_bias")
    return Relayout([[f"layers.{i}.moe.{n}" for n in names] for i in range(c.num_layers)], take)


def fill_tiles(tiles: Tensor, first: int, weight: QuantTensor, bias: Tensor) -> None:
    """Pack experts [E, ..] into tiles [E, n, bytes] from tile `first` on, a few at a time."""
    assert weight.scales is not None
    for e in range(0, len(bias), EXPERTS_AT_ONCE):
        some = slice(e, e + EXPERTS_AT_ONCE)
        part = replace(
            weight,
            values=weight.values[some],
            scales=weight.scales[some],
            shape=(len(bias[some]), *weight.shape[1:]),
        )
        packed = pack_experts(part, bias[some])
        tiles[some, first : first + packed.shape[1]] = packed
