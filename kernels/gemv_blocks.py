"""Dense projections of one token with weights in FP8 blocks of 128x128; see kernels/gemv.py.

A block's scale is the same for all rows of a program, so it multiplies x, not the weights.
N rows and K columns of the matrix (K here is the contraction length), B blocks in a row.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front
from kernels.weight_formats import decode_scale, scale_bytes, scales_of
from quant.tensor import QuantTensor

BLOCK = 128  # rows and columns that share a scale
_BLOCKS_AT_A_TIME = 8
_NUM_WARPS = 4
# Of all rows of a program, asked for before the wait: 64 registers of a thread.
_BYTES_IN_FLIGHT = 32768
_MOST_ROWS = 8
_LONG = 7168  # columns, beyond which more than two rows spill: x takes registers too


# A program computes BLOCK_N rows over all columns; grid: N / BLOCK_N.
@triton.jit
def _gemv_blocks_kernel(
    x_ptr,  # [GROUPS, K] fp32
    norm_ptr,  # [K] or None
    w_ptr,  # [N, K] E4M3
    scale_ptr,  # [N / 128, B] fp32 or E8M0 bytes
    out_ptr,  # [N] fp32
    trace_ptr,  # [programs, 3] int64 or None
    N: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    SCALES: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    GROUPS: tl.constexpr,
    START_NEXT_FIRST: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    if START_NEXT_FIRST:
        let_next_start(EARLY)
    if GROUPS > 1:
        x_ptr += tl.program_id(0) * BLOCK_N // (N // GROUPS) * K
    B: tl.constexpr = (K + 127) // 128
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ptrs = w_ptr + n.to(tl.int64)[:, None, None] * K
    scale_ptr += tl.program_id(0) * BLOCK_N // 128 * B
    rows = (n < N)[:, None, None]
    b = tl.arange(0, BLOCK_B)
    c = tl.arange(0, 128)
    tiles = ()
    scales = ()
    for b0 in tl.static_range(0, B, BLOCK_B):
        k = (b0 + b)[:, None] * 128 + c[None, :]
        mask = rows if (b0 + BLOCK_B) * 128 <= K else rows & (k < K)[None, :, :]
        tiles = tiles + (tl.load(row_ptrs + k[None, :, :], mask=mask, other=0.0),)  # type: ignore[assignment]
        stored = tl.load(scale_ptr + b0 + b, mask=b0 + b < B, other=0)
        scales = scales + (decode_scale(stored, SCALES),)  # type: ignore[assignment]
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    if not START_NEXT_FIRST:
        let_next_start(EARLY)
    acc = tl.zeros((BLOCK_N, BLOCK_B, 128), tl.float32)
    squares = tl.zeros((BLOCK_B, 128), tl.float32)
    for i in tl.static_range(len(tiles)):
        k = (i * BLOCK_B + b)[:, None] * 128 + c[None, :]
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        if norm_ptr is not None:
            # The norm's factor is one number for all rows: it multiplies the sums at the end.
            squares += x * x
            x *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        x *= scales[i][:, None]
        acc += tiles[i].to(tl.float32) * x[None, :, :]
    y = tl.sum(tl.sum(acc, axis=2), axis=1)
    if norm_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares) / K + EPS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if ADD:
        y += tl.load(out_ptr + n, mask=n < N, other=0.0)
    tl.store(out_ptr + n, y, mask=n < N)
    stamp(trace_ptr, 2)


def gemv_blocks(
    x: Tensor,
    weight: QuantTensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    add: bool = False,
    groups: int = 1,
    start_next_first: bool = True,
    trace: Tensor | None = None,
) -> Tensor:
    """out = weight @ rms_norm(x), or added to out; norm may be absent.

    x:       [K] fp32, or [G * K] with G groups
    weight:  [N, K] in FP8_BLOCK128 or FP8_BLOCK128_E8M0, with any last, partial block
    out:     [N] fp32, written (or added to if add)
    norm:    [K] weight of the RMS norm in front, with eps
    groups, start_next_first: as in kernels.gemv.gemv

    Reads the bytes of weight once, which sets its time.
    """
    rows, columns = weight.shape
    assert weight.format.block == (BLOCK, BLOCK) and weight.values.is_contiguous()
    block_b = min(_BLOCKS_AT_A_TIME, triton.next_power_of_2(triton.cdiv(columns, BLOCK)))
    assert rows % groups == 0 and (norm is None or groups == 1), (rows, groups)
    block_n = rows_of_program(columns)
    while groups > 1 and rows // groups % block_n:
        block_n //= 2
    _gemv_blocks_kernel[(triton.cdiv(rows, block_n),)](
        x,
        norm,
        weight.values,
        scale_bytes(weight),
        out,
        trace,
        N=rows,
        K=columns,
        EPS=eps,
        SCALES=scales_of(weight.format),
        ADD=add,
        BLOCK_N=block_n,
        BLOCK_B=block_b,
        GROUPS=groups,
        START_NEXT_FIRST=start_next_first,
        num_warps=_NUM_WARPS,
        **early_start(x),
    )
    return out


def rows_of_program(columns: int) -> int:
    """Rows of a program: a power of two, fewer for longer rows."""
    rows = _MOST_ROWS
    while rows > 1 and rows * columns > _BYTES_IN_FLIGHT:
        rows //= 2
    return min(rows, 2) if columns > _LONG else rows
