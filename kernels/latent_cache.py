"""Multi-head latent attention: norm and rope of what a token caches, and of its queries.

A cached row holds the normed latent, then the rotated key that all heads share. Pairs of columns
(2i, 2i + 1) turn together. A query row of a head has the same columns: its part without rope times
the head's key projection, then its rotated part.

T tokens, H heads, L latent width, P rotary width, N width of a head's part without rope, S slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front
from kernels.weight_formats import decode_scale, scale_bytes, scales_of
from quant.tensor import QuantTensor

_HEADS_PER_PROGRAM = 8


@triton.jit
def rotate_pairs(source, target, cos, sin, mask, i):
    """Turn pairs (2i, 2i + 1) of the rows at source, and store them at target."""
    first = tl.load(source + 2 * i, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + 2 * i + 1, mask=mask, other=0.0).to(tl.float32)
    kind = target.dtype.element_ty
    tl.store(target + 2 * i, (first * cos - second * sin).to(kind), mask=mask)
    tl.store(target + 2 * i + 1, (second * cos + first * sin).to(kind), mask=mask)


@triton.jit
def cache_latent(
    latent_ptr,  # [L + P] of one token
    norm_ptr,  # [L]
    cos_ptr,  # [P / 2] of its position
    sin_ptr,
    row_ptr,  # [L + P] of the cache
    L: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,  # of pairs
):
    """Norm the latent, rotate the key, store both."""
    l = tl.arange(0, BLOCK_L)
    x = tl.load(latent_ptr + l, mask=l < L, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + l, mask=l < L, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x) / L + EPS) * weight
    tl.store(row_ptr + l, x.to(row_ptr.dtype.element_ty), mask=l < L)
    i = tl.arange(0, BLOCK_P)
    cos = tl.load(cos_ptr + i, mask=i < P // 2, other=0.0)
    sin = tl.load(sin_ptr + i, mask=i < P // 2, other=0.0)
    rotate_pairs(latent_ptr + L, row_ptr + L, cos, sin, i < P // 2, i)


# A program handles BLOCK_H heads of one token; the last one of a token what it caches.
# Grid: T, H / BLOCK_H + 1.
@triton.jit
def _latent_cache_kernel(
    q_ptr,  # [T, H, N + P]
    latent_ptr,  # [T, L + P]
    norm_ptr,  # [L]
    cos_ptr,  # [positions, P / 2] fp32
    sin_ptr,
    position_ptr,  # [1] int32: position of token 0
    cache_ptr,  # [S, L + P]
    query_ptr,  # [T, H, L + P], the rotary columns written
    H: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr) + token
    cos_ptr += position * (P // 2)
    sin_ptr += position * (P // 2)
    if tl.program_id(1) == tl.num_programs(1) - 1:
        latent_ptr += token * (L + P)
        cache_ptr += position * (L + P)
        cache_latent(latent_ptr, norm_ptr, cos_ptr, sin_ptr, cache_ptr, L, P, EPS, BLOCK_L, BLOCK_P)
    else:
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        i = tl.arange(0, BLOCK_P)[None, :]
        cos = tl.load(cos_ptr + i, mask=i < P // 2, other=0.0)
        sin = tl.load(sin_ptr + i, mask=i < P // 2, other=0.0)
        mask = (head < H)[:, None] & (i < P // 2)
        source = q_ptr + (token * H + head)[:, None] * (N + P) + N
        target = query_ptr + (token * H + head)[:, None] * (L + P) + L
        rotate_pairs(source, target, cos, sin, mask, i)


def latent_cache(
    q: Tensor,
    latent: Tensor,
    norm: Tensor,
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    cache: Tensor,
    query: Tensor,
    *,
    eps: float,
) -> Tensor:
    """Cache the latents and keys of T tokens at position, position + 1, ...; rotate their queries.

    q:         [T, H, N + P] any float dtype, not rotated
    latent:    [T, L + P] likewise: latent, then key
    norm:      [L] weight of the latent's RMS norm, with eps
    rope:      cos and sin, [positions, P / 2] fp32
    position:  [1] int32 on the device
    cache:     [S, L + P], rows position to position + T - 1 written
    query:     [T, H, L + P], the last P columns written; returned

    Moves about T * (H * 2P + 2L) elements.
    """
    tokens, heads, width = q.shape
    rotary = 2 * rope[0].shape[1]
    latent_width = latent.shape[1] - rotary
    assert q.is_contiguous() and latent.is_contiguous()
    assert cache.shape[1] == query.shape[2] == latent.shape[1]
    _latent_cache_kernel[(tokens, triton.cdiv(heads, _HEADS_PER_PROGRAM) + 1)](
        q,
        latent,
        norm,
        *rope,
        position,
        cache,
        query,
        H=heads,
        N=width - rotary,
        L=latent_width,
        P=rotary,
        EPS=eps,
        BLOCK_H=_HEADS_PER_PROGRAM,
        BLOCK_L=triton.next_power_of_2(latent_width),
        BLOCK_P=triton.next_power_of_2(rotary // 2),
        num_warps=4,
    )
    return query


# A program applies a head's key projection to its query for BLOCK_L columns; the last one of a
# head rotates the rest of its query, and that of head 0 caches the token. Grid: H, L / BLOCK_L + 1.
@triton.jit
def _latent_query_kernel(
    q_ptr,  # [H, N + P] fp32
    latent_ptr,  # [L + P] fp32
    norm_ptr,  # [L]
    projection_ptr,  # [H, N + U, L]: a head's N rows for keys first
    scales_ptr,  # of blocks of 128x128, or None
    cos_ptr,  # [positions, P / 2] fp32
    sin_ptr,
    position_ptr,  # [1] int32
    cache_ptr,  # [S, L + P]
    query_ptr,  # [H, L + P], written
    trace_ptr,  # [programs, 3] int64 or None
    N: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WHOLE_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SCALES: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    head = tl.program_id(0).to(tl.int64)
    q_ptr += head * (N + P)
    query_ptr += head * (L + P)
    if tl.program_id(1) < tl.num_programs(1) - 1:
        n = tl.arange(0, BLOCK_N)
        l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
        place = (head * (N + U) + n)[:, None] * L + l[None, :]
        w = tl.load(projection_ptr + place, mask=(n < N)[:, None] & (l < L)[None, :], other=0.0)
        scale = 1.0
        if scales_ptr is not None:  # N and U are 128: one block
            block = head * 2 * ((L + 127) // 128) + tl.program_id(1) * BLOCK_L // 128
            scale = decode_scale(tl.load(scales_ptr + block), SCALES)
        wait_for_front(EARLY)
        stamp(trace_ptr, 1)
        # After the wait: then the attention behind may read position and cache before its own.
        let_next_start(EARLY)
        q = tl.load(q_ptr + n, mask=n < N, other=0.0)
        out = tl.sum(w.to(tl.float32) * q[:, None], axis=0) * scale
        tl.store(query_ptr + l, out.to(query_ptr.dtype.element_ty), mask=l < L)
    else:
        wait_for_front(EARLY)
        stamp(trace_ptr, 1)
        let_next_start(EARLY)
        position = tl.load(position_ptr).to(tl.int64)
        i = tl.arange(0, BLOCK_P)
        cos_ptr += position * (P // 2)
        sin_ptr += position * (P // 2)
        cos = tl.load(cos_ptr + i, mask=i < P // 2, other=0.0)
        sin = tl.load(sin_ptr + i, mask=i < P // 2, other=0.0)
        rotate_pairs(q_ptr + N, query_ptr + L, cos, sin, i < P // 2, i)
        if head == 0:
            cache_ptr += position * (L + P)
            cache_latent(
                latent_ptr, norm_ptr, cos_ptr, sin_ptr, cache_ptr, L, P, EPS, WHOLE_L, BLOCK_P
            )
    stamp(trace_ptr, 2)


def latent_query(
    q: Tensor,
    latent: Tensor,
    norm: Tensor,
    projection: Tensor | QuantTensor,
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    cache: Tensor,
    query: Tensor,
    *,
    eps: float,
    trace: Tensor | None = None,
) -> Tensor:
    """Queries of one token in absorbed form, and what it caches.

    q:           [H, N + P] fp32, not rotated
    latent:      [L + P] fp32: latent, then key
    norm:        [L] weight of the latent's RMS norm, with eps
    projection:  [H * (N + U), L] any float dtype; or, if N and U are 128, in FP8 blocks
    rope:        cos and sin, [positions, P / 2] fp32
    position:    [1] int32 on the device
    cache:       [S, L + P], row `position` written
    query:       [H, L + P] of the cache's dtype, written and returned

    Reads the N rows of each head's projection, which sets its time. The kernel behind may read
    before its own wait what kernels in front of this one wrote.
    """
    heads, latent_width = q.shape[0], projection.shape[1]
    rows = projection.shape[0] // heads
    rotary = 2 * rope[0].shape[1]
    nope = q.shape[1] - rotary
    block_l = latent_block(heads, latent_width)
    _latent_query_kernel[(heads, triton.cdiv(latent_width, block_l) + 1)](
        q,
        latent,
        norm,
        *projection_parts(projection),
        *rope,
        position,
        cache,
        query,
        trace,
        N=nope,
        U=rows - nope,
        L=latent_width,
        P=rotary,
        EPS=eps,
        BLOCK_N=triton.next_power_of_2(nope),
        BLOCK_L=block_l,
        WHOLE_L=triton.next_power_of_2(latent_width),
        BLOCK_P=triton.next_power_of_2(rotary // 2),
        SCALES=scales_kind(projection),
        num_warps=4,
        **early_start(q),
    )
    return query


def can_project(weight: Tensor | QuantTensor, nope: int, value: int) -> bool:
    """Whether the kernels read a head's projections in the form that they are stored in."""
    if isinstance(weight, Tensor):
        return True
    return weight.format.block == (128, 128) and nope == value == 128


def projection_parts(weight: Tensor | QuantTensor) -> tuple[Tensor, Tensor | None]:
    """Values, and scales as the kernels load them."""
    if isinstance(weight, Tensor):
        return weight, None
    return weight.values, scale_bytes(weight)


def scales_kind(weight: Tensor | QuantTensor) -> str:
    """What the scales are, see kernels/weight_formats.py."""
    return "none" if isinstance(weight, Tensor) else scales_of(weight.format)


def latent_block(heads: int, latent_width: int) -> int:
    """Columns of a program: fewer where there are few heads, so that a GPU is filled."""
    return min(128 if heads > 32 else 64, triton.next_power_of_2(latent_width))


def rope_of(frequencies: Tensor, growth: float, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, P / 2] fp32, both times `growth`, on the positions' device."""
    angles = positions.double()[:, None] * frequencies.to(positions.device)
    return (angles.cos() * growth).to(torch.float32), (angles.sin() * growth).to(torch.float32)
