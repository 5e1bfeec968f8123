"""Dense projections of one token: y = W f(x) with W in bf16, norm in front, residual behind.

N rows and K columns of the matrix (K here is the contraction length).
Time is set by the N * K * 2 bytes of W, read once.
"""

import triton
import triton.language as tl
from torch import Tensor


# A program computes BLOCK_N rows over all columns; grid: N / BLOCK_N.
@triton.jit
def _gemv_kernel(
    x_ptr,  # [K] fp32
    norm_ptr,  # [K], read if HAS_NORM
    w_ptr,  # [N, K]
    bias_ptr,  # [N], read if HAS_BIAS
    out_ptr,  # [N] fp32
    N: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = n < N
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    row_ptrs = w_ptr + n.to(tl.int64)[:, None] * K
    for k0 in tl.static_range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        if HAS_NORM:
            # The norm's factor is one number for all rows: it multiplies the sums at the end.
            squares += x * x
            x *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        w = tl.load(row_ptrs + k[None, :], mask=rows[:, None] & (k < K)[None, :], other=0.0)
        acc += w.to(tl.float32) * x[None, :]
    y = tl.sum(acc, axis=1)
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(squares) / K + EPS)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=rows, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(out_ptr + n, mask=rows, other=0.0)
    tl.store(out_ptr + n, y, mask=rows)


def gemv(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    add: bool = False,
) -> Tensor:
    """out = weight @ rms_norm(x) + bias, or added to out; norm and bias may be absent.

    x:       [K] fp32
    weight:  [N, K] bf16 (any float dtype), rows contiguous
    out:     [N] fp32, written (or added to if add)
    norm:    [K] weight of the RMS norm in front, with eps
    bias:    [N]

    Reads N * K weights once, which sets its time.
    """
    rows, columns = weight.shape
    block_n = 8 if rows >= 65536 else 2
    _gemv_kernel[(triton.cdiv(rows, block_n),)](
        x,
        norm if norm is not None else x,
        weight,
        bias if bias is not None else x,
        out,
        N=rows,
        K=columns,
        EPS=eps,
        HAS_NORM=norm is not None,
        HAS_BIAS=bias is not None,
        ADD=add,
        BLOCK_N=block_n,
        BLOCK_K=min(1024, triton.next_power_of_2(columns)),
        num_warps=4,
    )
    return out


# A program copies BLOCK columns of the row of one token; grid: columns / BLOCK.
@triton.jit
def _embedding_kernel(token_ptr, table_ptr, out_ptr, D: tl.constexpr, BLOCK: tl.constexpr):
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
    _embedding_kernel[(triton.cdiv(width, 1024),)](token, table, out, D=width, BLOCK=1024)
    return out
