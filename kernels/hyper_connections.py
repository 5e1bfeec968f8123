"""Hyper-connections of DeepSeek V4: N residual streams in place of one.

Before a block the streams are mixed to one vector with weights `pre`. Its result goes into every
stream with weights `post`, on top of the streams mixed among themselves by an N x N matrix, which
Sinkhorn's iteration makes doubly stochastic. All these weights are functions of

    z = function . streams / rms(streams)        [N (2 + N)]: of pre, of post, of the matrix by rows

In decode one launch ends a block and begins the next one: each program writes the result back into
its columns of the streams and multiplies them with the function's; the last one to finish makes
the weights and the vector for the next block. In prefill z is torch's matrix product, and kernels
of their own write and read the streams.

T tokens, N streams, D model width, M rows of the function: N (2 + N), or N behind the last layer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front

_BLOCK_D = 32  # columns of a program
_PREFILL_BLOCK_D = 1024


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _doubly_stochastic(
    logits,  # [BLOCK_N, BLOCK_N], -inf outside N by N
    N: tl.constexpr,
    ITERATIONS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Softmax of rows, then columns and rows divided by their sums in turn; ends with columns."""
    i = tl.arange(0, BLOCK_N)
    there = (i < N)[:, None] & (i < N)[None, :]
    logits = tl.where((i < N)[:, None], logits, 0.0)
    p = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    p = tl.where(there, p / tl.sum(p, axis=1)[:, None] + EPS, 0.0)
    p = p / (tl.sum(p, axis=0)[None, :] + EPS)
    for _ in range(ITERATIONS - 1):
        p = p / (tl.sum(p, axis=1)[:, None] + EPS)
        p = p / (tl.sum(p, axis=0)[None, :] + EPS)
    return p


@triton.jit
def _store_mix(
    mix_ptr,  # [N + N * N], written: post, then the matrix by rows
    post_z,  # [BLOCK_N]
    matrix_z,  # [BLOCK_N, BLOCK_N]
    base_ptr,  # [M]
    scale_ptr,  # [3]
    N: tl.constexpr,
    ITERATIONS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Weights with which a block's result is written back."""
    i = tl.arange(0, BLOCK_N)
    cell = i[:, None] * N + i[None, :]
    there = (i < N)[:, None] & (i < N)[None, :]
    logits = matrix_z * tl.load(scale_ptr + 2)
    logits += tl.load(base_ptr + 2 * N + cell, mask=there, other=0.0)
    logits = tl.where(there, logits, float("-inf"))
    matrix = _doubly_stochastic(logits, N, ITERATIONS, EPS, BLOCK_N)
    post = post_z * tl.load(scale_ptr + 1) + tl.load(base_ptr + N + i, mask=i < N, other=0.0)
    tl.store(mix_ptr + i, 2.0 * _sigmoid(post), mask=i < N)
    tl.store(mix_ptr + N + cell, matrix, mask=there)


@triton.jit
def _written(
    streams_ptr,  # [N, D]
    y,  # [BLOCK_D]: a block's result
    mix_ptr,  # [N + N * N]
    d,  # [BLOCK_D]
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Columns d of the streams after a block, [BLOCK_N, BLOCK_D]."""
    n = tl.arange(0, BLOCK_N)
    post = tl.load(mix_ptr + n, mask=n < N, other=0.0)
    new = post[:, None] * y[None, :]
    for j in tl.static_range(N):
        share = tl.load(mix_ptr + N + j * N + n, mask=n < N, other=0.0)
        x = tl.load(streams_ptr + j * D + d, mask=d < D, other=0.0)
        new += share[:, None] * x[None, :]
    return new


# A program has BLOCK_D columns of all streams; the last one to finish mixes for the next block.
# Grid: D / BLOCK_D.
@triton.jit
def _hyper_step_kernel(
    streams_ptr,  # [N, D] fp32, written
    result_ptr,  # [D] fp32, left zero
    mix_ptr,  # [N + N * N] fp32 of the block before, then of the next
    function_ptr,  # [M, N, D]
    base_ptr,  # [M]
    scale_ptr,  # [3], or [1] behind the last layer
    partial_ptr,  # [programs, M + 1] fp32, scratch
    ticket_ptr,  # [1] int32, zero before and after
    out_ptr,  # [D] fp32, written
    trace_ptr,  # [programs, 3] int64 or None
    D: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    FIRST: tl.constexpr,  # the result is what all streams begin with
    ITERATIONS: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    program = tl.program_id(0)
    d = program * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    place = (m[:, None, None] * N + n[None, :, None]) * D + d[None, None, :]
    inside = (m < M)[:, None, None] & (n < N)[None, :, None] & (d < D)[None, None, :]
    w = tl.load(function_ptr + place, mask=inside, other=0.0).to(tl.float32)
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    y = tl.load(result_ptr + d, mask=d < D, other=0.0)
    if FIRST:
        x = tl.where((n < N)[:, None], y[None, :], 0.0)
    else:
        x = _written(streams_ptr, y, mix_ptr, d, D, N, BLOCK_N)
    tl.debug_barrier()  # all threads have read what is written now
    mask = (n < N)[:, None] & (d < D)[None, :]
    tl.store(streams_ptr + n[:, None] * D + d[None, :], x, mask=mask)
    tl.store(result_ptr + d, tl.zeros((BLOCK_D,), tl.float32), mask=d < D)
    sums = tl.sum(tl.sum(w * x[None, :, :], axis=2), axis=1)
    sums = tl.where(m == M, tl.sum(tl.sum(x * x, axis=1), axis=0), sums)
    tl.store(partial_ptr + program * (M + 1) + m, sums, mask=m <= M)
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.debug_barrier()
        p = tl.arange(0, BLOCK_P)
        here = p < tl.num_programs(0)
        part = partial_ptr + p * (M + 1)
        of_stream = here[:, None] & (n < N)[None, :]
        # All that others summed is asked for at once: each wait for the L2 cache would show.
        squares = tl.load(part + M, mask=here, other=0.0, cache_modifier=".cg")
        z = tl.load(part[:, None] + n[None, :], mask=of_stream, other=0.0, cache_modifier=".cg")
        if M > N:
            post = tl.load(
                part[:, None] + N + n[None, :], mask=of_stream, other=0.0, cache_modifier=".cg"
            )
            cell = n[:, None] * N + n[None, :]
            matrix = tl.load(
                part[:, None, None] + 2 * N + cell[None, :, :],
                mask=of_stream[:, :, None] & (n < N)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
        factor = tl.rsqrt(tl.sum(squares, axis=0) / (N * D) + NORM_EPS)
        z = tl.sum(z, axis=0) * factor * tl.load(scale_ptr)
        pre = _sigmoid(z + tl.load(base_ptr + n, mask=n < N, other=0.0)) + EPS
        pre = tl.where(n < N, pre, 0.0)
        for d0 in tl.static_range(0, D, OUT_BLOCK):
            o = d0 + tl.arange(0, OUT_BLOCK)
            new = tl.load(
                streams_ptr + n[:, None] * D + o[None, :],
                mask=(n < N)[:, None] & (o < D)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            tl.store(out_ptr + o, tl.sum(new * pre[:, None], axis=0), mask=o < D)
        if M > N:
            _store_mix(
                mix_ptr, tl.sum(post, axis=0) * factor, tl.sum(matrix, axis=0) * factor,
                base_ptr, scale_ptr, N, ITERATIONS, EPS, BLOCK_N,
            )  # fmt: skip
        tl.store(ticket_ptr, 0)
    stamp(trace_ptr, 2)


def hyper_step(
    streams: Tensor,
    result: Tensor,
    mix: Tensor,
    function: Tensor,
    base: Tensor,
    scale: Tensor,
    out: Tensor,
    *,
    first: bool,
    iterations: int,
    eps: float,
    norm_eps: float,
    partial: Tensor,
    ticket: Tensor,
    trace: Tensor | None = None,
) -> Tensor:
    """One token: write a block's result into the streams, and read what the next block is given.

    streams:     [N, D] fp32, written
    result:      [D] fp32 of the block before; left zero, so that the next may be added to it
    mix:         [N + N * N] fp32: post and the matrix of the block before; those of the next are
                 written, except behind the last layer
    function:    [M, N * D] of the next block: M = N (2 + N), or N behind the last layer
    base:        [M]
    scale:       [3], or [1] behind the last layer
    out:         [D] fp32, written and returned: what the next block is given, not yet normed
    first:       result is the embedding, with which all streams begin; they and mix are not read
    iterations:  of Sinkhorn
    eps:         added to pre, to the matrix and to its sums
    norm_eps:    of the RMS over all streams
    partial:     [num_programs(D), M + 1] or more, fp32 scratch
    ticket:      [1] int32, zero before the first call; left zero

    Reads the function's M * N * D numbers, and is bound by latency at every published size.
    """
    count, width = streams.shape
    rows = len(base)
    assert rows in (count, count * (2 + count)) and function.shape == (rows, count * width)
    assert partial.is_contiguous() and partial.numel() >= num_programs(width) * (rows + 1)
    _hyper_step_kernel[(num_programs(width),)](
        streams,
        result,
        mix,
        function,
        base,
        scale,
        partial,
        ticket,
        out,
        trace,
        D=width,
        N=count,
        M=rows,
        FIRST=first,
        ITERATIONS=iterations,
        EPS=eps,
        NORM_EPS=norm_eps,
        BLOCK_N=triton.next_power_of_2(count),
        BLOCK_M=triton.next_power_of_2(rows + 1),
        BLOCK_D=_BLOCK_D,
        BLOCK_P=triton.next_power_of_2(num_programs(width)),
        OUT_BLOCK=min(4096, triton.next_power_of_2(width)),
        num_warps=8,
        **early_start(streams),
    )
    return out


def num_programs(width: int) -> int:
    """Programs of hyper_step for a model of this width."""
    return triton.cdiv(width, _BLOCK_D)


# A program has BLOCK_D columns of one token's streams. Grid: T, D / BLOCK_D.
@triton.jit
def _hyper_write_kernel(
    streams_ptr,  # [T, N, D] fp32, written
    result_ptr,  # [T, D]
    mix_ptr,  # [T, N + N * N]
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    streams_ptr += token * (N * D)
    y = tl.load(result_ptr + token * D + d, mask=d < D, other=0.0).to(tl.float32)
    x = _written(streams_ptr, y, mix_ptr + token * (N + N * N), d, D, N, BLOCK_N)
    tl.debug_barrier()  # all threads have read what is written now
    mask = (n < N)[:, None] & (d < D)[None, :]
    tl.store(streams_ptr + n[:, None] * D + d[None, :], x, mask=mask)


# A program mixes for one token. Grid: T.
@triton.jit
def _hyper_read_kernel(
    streams_ptr,  # [T, N, D] fp32
    z_ptr,  # [T, M] fp32: function times streams, not yet divided by their RMS
    base_ptr,  # [M]
    scale_ptr,  # [3] or [1]
    mix_ptr,  # [T, N + N * N] fp32, written where M > N
    out_ptr,  # [T, D] fp32, written
    D: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    ITERATIONS: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    streams_ptr += token * (N * D)
    z_ptr += token * M
    n = tl.arange(0, BLOCK_N)
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for k0 in range(0, N * D, BLOCK_D):
        k = k0 + tl.arange(0, BLOCK_D)
        x = tl.load(streams_ptr + k, mask=k < N * D, other=0.0)
        squares += x * x
    factor = tl.rsqrt(tl.sum(squares) / (N * D) + NORM_EPS)
    z = tl.load(z_ptr + n, mask=n < N, other=0.0) * factor * tl.load(scale_ptr)
    pre = _sigmoid(z + tl.load(base_ptr + n, mask=n < N, other=0.0)) + EPS
    pre = tl.where(n < N, pre, 0.0)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mask = (n < N)[:, None] & (d < D)[None, :]
        x = tl.load(streams_ptr + n[:, None] * D + d[None, :], mask=mask, other=0.0)
        tl.store(out_ptr + token * D + d, tl.sum(x * pre[:, None], axis=0), mask=d < D)
    if M > N:
        post = tl.load(z_ptr + N + n, mask=n < N, other=0.0) * factor
        cell = n[:, None] * N + n[None, :]
        there = (n < N)[:, None] & (n < N)[None, :]
        matrix = tl.load(z_ptr + 2 * N + cell, mask=there, other=0.0) * factor
        mix_ptr += token * (N + N * N)
        _store_mix(mix_ptr, post, matrix, base_ptr, scale_ptr, N, ITERATIONS, EPS, BLOCK_N)


def hyper_write(streams: Tensor, result: Tensor, mix: Tensor) -> Tensor:
    """T tokens: the streams after a block.

    streams:  [T, N, D] fp32, written and returned
    result:   [T, D] any float dtype, of the block
    mix:      [T, N + N * N] fp32 of hyper_read

    Moves 8 * T * N * D bytes.
    """
    tokens, count, width = streams.shape
    block = min(_PREFILL_BLOCK_D, triton.next_power_of_2(width))
    _hyper_write_kernel[(tokens, triton.cdiv(width, block))](
        streams,
        result,
        mix,
        D=width,
        N=count,
        BLOCK_N=triton.next_power_of_2(count),
        BLOCK_D=block,
        num_warps=4,
    )
    return streams


def hyper_read(
    streams: Tensor,
    z: Tensor,
    base: Tensor,
    scale: Tensor,
    mix: Tensor,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """T tokens: what the next block is given, [T, D] fp32, not yet normed.

    streams:  [T, N, D] fp32
    z:        [T, M] fp32: the function times the streams; M = N (2 + N), or N behind the last layer
    mix:      [T, N + N * N] fp32, written, except behind the last layer
    Other arguments are those of hyper_step.

    Reads 4 * T * N * D bytes twice, the second time from the L2 cache.
    """
    tokens, count, width = streams.shape
    rows = z.shape[1]
    assert rows == len(base) and rows in (count, count * (2 + count)) and z.is_contiguous()
    out = torch.empty((tokens, width), dtype=torch.float32, device=streams.device)
    _hyper_read_kernel[(tokens,)](
        streams,
        z,
        base,
        scale,
        mix,
        out,
        D=width,
        N=count,
        M=rows,
        ITERATIONS=iterations,
        EPS=eps,
        NORM_EPS=norm_eps,
        BLOCK_N=triton.next_power_of_2(count),
        BLOCK_D=min(_PREFILL_BLOCK_D, triton.next_power_of_2(width)),
        num_warps=4,
    )
    return out
