"""What DeepSeek V4's attention makes of a token's projections: queries, and the row it caches.

A row of C values is key and value of all heads at once. The token's own row is normed with a
weight, each head of its query without one; the last P columns of both turn in pairs. The row goes
into a ring of recent rows. Queries of the indexer turn likewise and are not normed.

T tokens, H heads, C row width, P rotary width, S slots of the ring, I index heads, J index width.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front
from kernels.pair_rotation import turn_pairs

_HEADS_PER_PROGRAM = 4
_INDEX_HEADS_PER_PROGRAM = 16


@triton.jit
def _turn_heads(
    source_ptr,  # [H, C] of one token
    target_ptr,  # [H, C], written
    first_head,
    cos_ptr,
    sin_ptr,
    H: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Heads of one token: normed if NORM, turned, stored."""
    h = first_head + tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)
    place = h[:, None] * C + c[None, :]
    mask = (h < H)[:, None] & (c < C)[None, :]
    x = tl.load(source_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        x *= tl.rsqrt(tl.sum(x * x, axis=1) / C + EPS)[:, None]
    x = turn_pairs(x, 0, cos_ptr, sin_ptr, C, P, False, BLOCK_H, BLOCK_C)
    tl.store(target_ptr + place, x.to(target_ptr.dtype.element_ty), mask=mask)


# Program 0 of a token makes its row, the next ones BLOCK_H heads each of its query, the last ones
# BLOCK_I heads each of the indexer's. Grid: T, 1 + H / BLOCK_H + I / BLOCK_I.
# S is not specialised: no length of the cache compiles anything new.
@triton.jit(do_not_specialize=["S"])
def _shared_rows_kernel(
    q_ptr,  # [T, H, C]
    row_ptr,  # [T, C]
    norm_ptr,  # [C]
    index_q_ptr,  # [T, I, J] or None
    cos_ptr,  # [positions, P / 2] fp32
    sin_ptr,
    position_ptr,  # [1] int32: position of token 0
    ring_ptr,  # [S, C]
    query_ptr,  # [T, H, C], written
    index_query_ptr,  # [T, I, J], written, or None
    trace_ptr,  # [programs, 3] int64 or None
    S,
    Q_STRIDE: tl.constexpr,  # from a token to the next
    ROW_STRIDE: tl.constexpr,
    INDEX_STRIDE: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    I: tl.constexpr,
    J: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    let_next_start(EARLY)
    HEAD_PROGRAMS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    token = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    position = tl.load(position_ptr) + token
    cos_ptr += position * (P // 2)
    sin_ptr += position * (P // 2)
    if program == 0:
        c = tl.arange(0, BLOCK_C)[None, :]
        x = tl.load(row_ptr + token * ROW_STRIDE + c, mask=c < C, other=0.0).to(tl.float32)
        weight = tl.load(norm_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, axis=1) / C + EPS)[:, None] * weight
        x = turn_pairs(x, 0, cos_ptr, sin_ptr, C, P, False, 1, BLOCK_C)
        tl.store(ring_ptr + position % S * C + c, x.to(ring_ptr.dtype.element_ty), mask=c < C)
    elif program <= HEAD_PROGRAMS:
        _turn_heads(
            q_ptr + token * Q_STRIDE, query_ptr + token * (H * C), (program - 1) * BLOCK_H,
            cos_ptr, sin_ptr, H, C, P, EPS, True, BLOCK_H, BLOCK_C,
        )  # fmt: skip
    else:
        if index_q_ptr is not None:
            first = (program - 1 - HEAD_PROGRAMS) * BLOCK_I
            _turn_heads(
                index_q_ptr + token * INDEX_STRIDE, index_query_ptr + token * (I * J), first,
                cos_ptr, sin_ptr, I, J, P, EPS, False, BLOCK_I, BLOCK_J,
            )  # fmt: skip
    stamp(trace_ptr, 2)


def shared_rows(
    q: Tensor,
    row: Tensor,
    norm: Tensor,
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    ring: Tensor,
    query: Tensor,
    *,
    eps: float,
    index_q: Tensor | None = None,
    index_query: Tensor | None = None,
    trace: Tensor | None = None,
) -> Tensor:
    """Queries of T tokens at position, position + 1, ..., and the rows that they cache.

    q:            [T, H, C] any float dtype, as projected; a token's numbers stand together
    row:          [T, C] likewise
    norm:         [C] weight of the row's RMS norm, with eps; the heads of q are normed without one
    rope:         cos and sin, [positions, P / 2] fp32; the last P columns turn in pairs
    position:     [1] int32 on the device
    ring:         [S, C], row t of the sequence written to slot t % S; T is at most S
    query:        [T, H, C] of the ring's dtype, written and returned
    index_q:      [T, I, J] as projected, or None
    index_query:  [T, I, J], written, where there is index_q

    Moves about 2 * T * H * C elements; bound by latency for one token.
    """
    tokens, heads, width = q.shape
    rotary = 2 * rope[0].shape[1]
    index_heads, index_width = (0, 16) if index_q is None else index_q.shape[1:]
    assert q.stride()[1:] == (width, 1) and row.stride(1) == 1 and query.is_contiguous()
    assert index_q is None or index_q.stride()[1:] == (index_width, 1)
    assert tokens <= len(ring), (tokens, len(ring))
    programs = 1 + triton.cdiv(heads, _HEADS_PER_PROGRAM)
    _shared_rows_kernel[(tokens, programs + triton.cdiv(index_heads, _INDEX_HEADS_PER_PROGRAM))](
        q,
        row,
        norm,
        index_q,
        *rope,
        position,
        ring,
        query,
        index_query,
        trace,
        len(ring),
        Q_STRIDE=q.stride(0),
        ROW_STRIDE=row.stride(0),
        INDEX_STRIDE=0 if index_q is None else index_q.stride(0),
        H=heads,
        C=width,
        P=rotary,
        I=index_heads,
        J=index_width,
        EPS=eps,
        BLOCK_H=_HEADS_PER_PROGRAM,
        BLOCK_C=triton.next_power_of_2(width),
        BLOCK_I=_INDEX_HEADS_PER_PROGRAM,
        BLOCK_J=triton.next_power_of_2(index_width),
        num_warps=4,
        **early_start(q),
    )
    return query
