"""Dense projections of one token: y = W f(x), W in bf16 or FP8, norm in front, residual behind.

N rows and K columns of the matrix (K here is the contraction length).
Time is set by the bytes of W, read once. A program asks for all its weights before it waits for x,
so they arrive while the kernel in front still runs.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front
from kernels.gemv_blocks import gemv_blocks
from quant.formats import FP8_ROW
from quant.tensor import QuantTensor


@dataclass(frozen=True)
class Tile:
    """Rows of a program, columns it takes at a time, and its warps."""

    block_n: int
    block_k: int
    num_warps: int


# By bytes of a weight: a matrix of fewer than MANY_ROWS rows, and a larger one (the head).
MANY_ROWS = 65536
TILES = {
    2: (Tile(4, 1024, 4), Tile(8, 1024, 4)),
    1: (Tile(8, 1024, 4), Tile(4, 512, 1)),
    4: (Tile(2, 1024, 4), Tile(8, 1024, 4)),
}
# That a warp may ask for before the wait, 96 registers of a thread: longer rows are taken by fewer.
_BYTES_OF_WARP = 12288


# A program computes BLOCK_N rows over all columns; grid: N / BLOCK_N.
@triton.jit
def _gemv_kernel(
    x_ptr,  # [GROUPS, K] fp32
    norm_ptr,  # [K], read if HAS_NORM
    w_ptr,  # [N, K]
    scale_ptr,  # [N] fp32, read if HAS_SCALE
    bias_ptr,  # [N], read if HAS_BIAS
    out_ptr,  # [N] fp32
    trace_ptr,  # [programs, 3] int64 or None
    N: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    START_NEXT_FIRST: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    if START_NEXT_FIRST:
        let_next_start(EARLY)
    if GROUPS > 1:
        x_ptr += tl.program_id(0) * BLOCK_N // (N // GROUPS) * K
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = n < N
    row_ptrs = w_ptr + n.to(tl.int64)[:, None] * K
    tiles = ()
    for k0 in tl.static_range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if k0 + BLOCK_K <= K:
            w = tl.load(row_ptrs + k[None, :], mask=rows[:, None], other=0.0)
        else:
            w = tl.load(row_ptrs + k[None, :], mask=rows[:, None] & (k < K)[None, :], other=0.0)
        tiles = tiles + (w,)  # type: ignore[assignment]
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    if not START_NEXT_FIRST:
        let_next_start(EARLY)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for i in tl.static_range(len(tiles)):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        if HAS_NORM:
            # The norm's factor is one number for all rows: it multiplies the sums at the end.
            squares += x * x
            x *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        acc += tiles[i].to(tl.float32) * x[None, :]
    y = tl.sum(acc, axis=1)
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(squares) / K + EPS)
    if HAS_SCALE:
        y *= tl.load(scale_ptr + n, mask=rows, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=rows, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(out_ptr + n, mask=rows, other=0.0)
    tl.store(out_ptr + n, y, mask=rows)
    stamp(trace_ptr, 2)


def gemv(
    x: Tensor,
    weight: Tensor | QuantTensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    add: bool = False,
    groups: int = 1,
    start_next_first: bool = True,
    trace: Tensor | None = None,
) -> Tensor:
    """out = weight @ rms_norm(x) + bias, or added to out; norm and bias may be absent.

    x:       [K] fp32, or [G * K] with G groups
    weight:  [N, K] bf16 (any float dtype), rows contiguous; or FP8_ROW; or in FP8 blocks of
             128x128 (kernels/gemv_blocks.py), then without bias
    out:     [N] fp32, written (or added to if add)
    norm:    [K] weight of the RMS norm in front, with eps
    bias:    [N]
    groups:  G: the rows of the weight in G equal parts, each times its own K numbers of x
    start_next_first: whether the kernel behind may start before this one's wait; if not, it may
        read before its own wait what kernels in front of this one wrote

    Reads the bytes of weight once, which sets its time.
    """
    if isinstance(weight, QuantTensor) and weight.format is not FP8_ROW:
        assert bias is None
        return gemv_blocks(
            x,
            weight,
            out,
            norm=norm,
            eps=eps,
            add=add,
            groups=groups,
            start_next_first=start_next_first,
            trace=trace,
        )
    values, scale = dense_parts(weight)
    rows, columns = values.shape
    assert rows % groups == 0 and (norm is None or groups == 1), (rows, groups)
    tile = TILES[values.element_size()][rows >= MANY_ROWS]
    block_n = tile.block_n
    most = tile.num_warps * _BYTES_OF_WARP
    while block_n > 1 and block_n * values[0].nbytes > most:
        block_n //= 2
    while groups > 1 and rows // groups % block_n:  # a program's rows are of one group
        block_n //= 2
    _gemv_kernel[(triton.cdiv(rows, block_n),)](
        x,
        norm if norm is not None else x,
        values,
        scale if scale is not None else x,
        bias if bias is not None else x,
        out,
        trace,
        N=rows,
        K=columns,
        EPS=eps,
        HAS_NORM=norm is not None,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        ADD=add,
        BLOCK_N=block_n,
        BLOCK_K=min(tile.block_k, triton.next_power_of_2(columns)),
        GROUPS=groups,
        START_NEXT_FIRST=start_next_first,
        num_warps=tile.num_warps,
        **early_start(x),
    )
    return out


def dense_parts(weight: Tensor | QuantTensor) -> tuple[Tensor, Tensor | None]:
    """Values and row scales; scales are None for plain floats."""
    if isinstance(weight, Tensor):
        return weight, None
    assert weight.format is FP8_ROW, weight.format.name
    return weight.values, weight.scales


# A program copies BLOCK columns of the row of one token; grid: columns / BLOCK.
@triton.jit
def _embedding_kernel(
    token_ptr, table_ptr, out_ptr, D: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    let_next_start(EARLY)
    wait_for_front(EARLY)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = table_ptr + tl.load(token_ptr).to(tl.int64) * D
    tl.store(out_ptr + d, tl.load(row + d, mask=d < D).to(tl.float32), mask=d < D)


def embedding(token: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """out = table[token] in fp32.

    token:  [1] int32 on the device
    table:  [V, D]
    out:    [D] fp32
    """
    width = table.shape[1]
    _embedding_kernel[(triton.cdiv(width, 1024),)](
        token, table, out, D=width, BLOCK=1024, **early_start(out)
    )
    return out
