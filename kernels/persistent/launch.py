"""Buffers of the persistent step, and its launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.launch_trace import traced_parts
from kernels.persistent.formats import ROW_BYTES, TILE_ROWS
from kernels.persistent.sizes import DRAW_WORDS, PHASES, ROUTER_COLUMNS, StepSizes, cdiv
from kernels.persistent.step import step_kernel
from kernels.sampling import SamplingState

CACHE_UNIT = 64  # numbers in which the cache table counts
_PLAIN = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8, rank=2)


@dataclass(frozen=True)
class StepWeights:
    """A model's weights as the kernel reads them. L layers, D width, F expert width, E experts."""

    embedding: Tensor  # [V, D] bf16
    dense: Tensor  # [tiles, bytes]: of each layer qkv and mixed_projection, then the head
    experts: Tensor  # [L * E * tiles, bytes]: of each expert gate_up, then down
    norms: Tensor  # [L, D]
    moe_norms: Tensor  # [L, D]
    final_norm: Tensor  # [D]
    qkv_scale: Tensor  # [L, rows] fp32, read if FP8, as are the other scales
    qkv_bias: Tensor
    sinks: Tensor  # [L, H]
    out_scale: Tensor  # [L, rows of mixed_projection], as the biases
    out_bias: Tensor
    router: Tensor  # [L, parts, E, 64], see pack_router
    router_bias: Tensor  # [L, E]
    head_scale: Tensor  # [V]


@dataclass(frozen=True)
class StepBuffers:
    """What programs of a launch hand to each other; zero before the first one."""

    counter: Tensor  # [1] int32: launches so far
    sums: Tensor  # two sets of int64
    tagged: Tensor  # int64

    @classmethod
    def allocate(cls, sizes: StepSizes, device: torch.device) -> StepBuffers:
        """Zeros."""
        s = sizes
        blocks = s.out_blocks + 2 * (s.qkv_blocks + s.top_k * s.gate_up_blocks)
        words = blocks * TILE_ROWS + 2 * s.padded_experts + 2 + s.layers * s.gate_up_columns
        parts = s.splits * (s.attention_width + 2 * s.heads) + DRAW_WORDS * s.programs
        return cls(
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(2 * words, dtype=torch.int64, device=device),
            torch.zeros(256 + s.attention_width + parts, dtype=torch.int64, device=device),
        )


def pack_router(router: Tensor) -> Tensor:
    """[E, D] as [parts, E, 64]: what one program reads stands together."""
    experts, width = router.shape
    parts = cdiv(width, ROUTER_COLUMNS)
    out = router.new_zeros(experts, parts * ROUTER_COLUMNS)
    out[:, :width] = router
    return out.view(experts, parts, ROUTER_COLUMNS).transpose(0, 1).contiguous()


def arguments(
    weights: StepWeights,
    buffers: StepBuffers,
    state: SamplingState,
    rope: tuple[Tensor, Tensor],
    cache: Tensor,
    cache_table: Tensor,
    logits: Tensor,
) -> tuple[Tensor, ...]:
    """The kernel's tensors in its order, without descriptors.

    state:            the token, its position and what the draw needs; the draw moves it on
    rope:             cosines and sines [positions, C / 2] fp32
    cache:            all layers' keys and values in one buffer, bf16
    cache_table:      [L, 4] int64: where keys and values of a layer begin, in units of 64 numbers,
                      its slots, and whether it is sliding
    logits:           [V] fp32, written
    """
    w = weights
    return (
        state.token, state.position, state.settings, state.seed, state.step, state.seen,
        state.history, state.logprobs, buffers.counter, w.embedding, w.norms, w.moe_norms,
        w.final_norm,
        w.qkv_scale, w.qkv_bias, w.sinks, w.out_scale, w.out_bias, w.router, w.router_bias,
        w.head_scale, *rope, cache, cache_table, buffers.sums,
        buffers.tagged, logits,
    )  # fmt: skip


def copied(memory: Tensor, height: int) -> TensorDescriptor:
    """Rows of 256 bytes of a buffer, copied `height` at a time."""
    rows = memory.view(torch.uint8).view(-1, ROW_BYTES)
    return TensorDescriptor(rows, list(rows.shape), [ROW_BYTES, 1], [height, ROW_BYTES], _PLAIN)


def descriptors(sizes: StepSizes, weights: StepWeights) -> tuple[TensorDescriptor, ...]:
    """What the copy engine reads."""
    dense = (copied(weights.dense, height) for height in (128, 32))
    return (*dense, *(copied(weights.experts, height) for height in sizes.tiles.boxes))


def launch(
    sizes: StepSizes,
    tensors: tuple[Tensor, ...],
    descs: tuple[TensorDescriptor, ...],
    stamps: Tensor | None = None,
    *,
    draws: bool,
) -> None:
    """One step: logits of the token at its position; reads every active weight once.

    tensors, descs:  of arguments() and descriptors()
    draws:           whether the next token is drawn from them, of a distribution that is not cut;
                     else the request's state stays as it is
    stamps:          of phase_stamps(), written: a build of its own, somewhat slower
    """
    step_kernel[(sizes.programs,)](*tensors, *descs, stamps, int(draws), **_options(sizes))


@traced_parts(step_kernel)
def phases(S: StepSizes, **_: Any) -> tuple[str, ...]:
    """What each row of the kernel's trace is for."""
    return PHASES * S.layers + ("head",)


def phase_stamps(sizes: StepSizes) -> Tensor:
    """[programs, phases, 3] int64 in the host's memory, which outlives a launch that fails."""
    shape = (sizes.programs, len(phases(sizes)), 3)
    return torch.zeros(shape, dtype=torch.int64, pin_memory=True)


def compile_step(sizes: StepSizes, device: torch.device) -> None:
    """Compile the kernel of these sizes; nothing is launched."""
    plain = torch.zeros(1 << 16, dtype=torch.uint8, device=device)

    def of(dtype: torch.dtype) -> Tensor:
        return plain.view(dtype)

    bf16, fp32, int32, int64 = (
        of(t) for t in (torch.bfloat16, torch.float32, torch.int32, torch.int64)
    )
    weights = StepWeights(
        bf16, plain, plain, bf16, bf16, bf16, fp32, bf16, bf16, fp32, bf16, bf16, bf16, fp32
    )  # fmt: skip
    buffers = StepBuffers(int32, int64, int64)
    state = SamplingState(
        settings=fp32, seed=int64, step=int32, position=int32, token=int32, seen=plain,
        history=int32, logprobs=fp32, threshold=fp32, partial=fp32, partial_token=int32,
    )  # fmt: skip
    tensors = arguments(weights, buffers, state, (fp32, fp32), bf16, int64, fp32)
    descs = descriptors(sizes, weights)
    step_kernel.warmup(*tensors, *descs, None, 0, grid=(sizes.programs,), **_options(sizes))


def _options(sizes: StepSizes) -> dict[str, Any]:
    return {"S": sizes, "num_warps": 8, "launch_cooperative_grid": True}
