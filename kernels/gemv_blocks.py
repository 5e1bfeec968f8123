"""Dense projections of one token with weights in FP8 blocks of 128x128; see kernels/gemv.py.

A block's scale is the same for all rows of a program, so it multiplies x, not the weights. All that
a program reads of the weights it asks for before it waits for x.
N rows and K columns of the matrix (K here is the contraction length), B blocks in a row.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front
from kernels.weight_formats import decode_scale, scale_bytes, scales_of
from quant.tensor import QuantTensor

BLOCK = 128  # rows and columns that share a scale
# Of weights, asked for by a lane before the wait: 32 registers, and x takes as many at 4 rows.
_BYTES_OF_LANE = 128
_ROWS_OF_LONG = 4  # rows of a program, from _LONG columns on; shorter ones take 8 warps
_LONG = 4096
_MOST_ROWS, _WARPS = 16, 8


# A program computes ROWS rows over all columns; grid: N / ROWS.
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
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    START_NEXT_FIRST: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    if START_NEXT_FIRST:
        let_next_start(EARLY)
    first = tl.program_id(0) * ROWS
    if GROUPS > 1:
        x_ptr += first // (N // GROUPS) * K
    n = first + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None]
    if K < BLOCK_K:
        mask = mask & (k < K)[None, :]
    w = tl.load(w_ptr + n.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0.0)
    block = first // 128 * ((K + 127) // 128) + k // 128
    scale = decode_scale(tl.load(scale_ptr + block, mask=k < K, other=0), SCALES)
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    if not START_NEXT_FIRST:
        let_next_start(EARLY)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0)
    factor = 1.0
    if norm_ptr is not None:
        factor = tl.rsqrt(tl.sum(x * x) / K + EPS)  # of the norm, the same for all rows
        x *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    x *= scale
    y = tl.sum(w.to(tl.float32) * x[None, :], axis=1) * factor
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
    assert rows % groups == 0 and (norm is None or groups == 1), (rows, groups)
    at_once, warps = rows_of_program(columns)
    while groups > 1 and rows // groups % at_once:  # a program's rows are of one group
        at_once //= 2
    _gemv_blocks_kernel[(triton.cdiv(rows, at_once),)](
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
        ROWS=at_once,
        BLOCK_K=triton.next_power_of_2(columns),
        GROUPS=groups,
        START_NEXT_FIRST=start_next_first,
        num_warps=warps,
        **early_start(x),
    )
    return out


def rows_of_program(columns: int) -> tuple[int, int]:
    """Rows of a program, and its warps: each lane has _BYTES_OF_LANE of weights, or less."""
    width = triton.next_power_of_2(columns)
    if width >= _LONG:
        return _ROWS_OF_LONG, min(32, _ROWS_OF_LONG * width // (32 * _BYTES_OF_LANE))
    return min(_MOST_ROWS, 32 * _WARPS * _BYTES_OF_LANE // width), _WARPS
