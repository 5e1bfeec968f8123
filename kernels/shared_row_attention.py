"""Attention of one token over rows that are key and value at once (DeepSeek V4), with sinks.

A layer's rows are one tensor: a ring of the last W tokens, then the compressed rows. A program
reads a split of the rows that the token sees, for a group of heads; a second launch merges the
splits and adds the sinks. The numbers of rows come from the position on the device, so that one
launch serves every length.

H heads, C row width, W window, N compressed rows, X splits, K chosen rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, wait_for_front

BLOCK_S = 32  # rows that a program reads at a time
SPLITS = 64
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows_of(split, position_ptr, W: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
             X: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """First and last + 1 of a split's rows, used splits, and rows of the window."""
    seen = tl.load(position_ptr) + 1
    length = tl.minimum(seen, W)
    recent = length
    if R > 0:
        compressed = seen // R
        if K > 0:
            compressed = tl.minimum(compressed, K)
        length += compressed
    per_split = tl.cdiv(tl.cdiv(length, X), BLOCK_S) * BLOCK_S
    begin = split * per_split
    return begin, tl.minimum(begin + per_split, length), tl.cdiv(length, per_split), recent


# A program reads one split of the rows for BLOCK_H heads. Grid: H / BLOCK_H, X.
@triton.jit
def _split_kernel(
    query_ptr,  # [H, C]
    rows_ptr,  # [W + N, C]
    position_ptr,  # [1] int32
    chosen_ptr,  # [K] int32, or None
    acc_ptr,  # [H, X, C] fp32, written: not yet divided
    stats_ptr,  # [H, X, 2] fp32, written: maximum (base 2) and sum
    H: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    X: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    let_next_start(EARLY)
    wait_for_front(EARLY)
    split = tl.program_id(1)
    begin, end, used, recent = _rows_of(split, position_ptr, W, R, K, X, BLOCK_S)
    if split < used:
        h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
        c = tl.arange(0, BLOCK_C)
        mine = (h < H)[:, None] & (c < C)[None, :]
        q = tl.load(query_ptr + h[:, None] * C + c[None, :], mask=mine, other=0.0)
        biggest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        acc = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
        for s0 in range(begin, end, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            there = s < end
            far = s - recent
            if chosen_ptr is not None:
                far = tl.load(chosen_ptr + far, mask=there & (s >= recent), other=0)
            slot = tl.where(s < recent, s, W + far).to(tl.int64)
            row = tl.load(
                rows_ptr + slot[:, None] * C + c[None, :],
                mask=there[:, None] & (c < C)[None, :],
                other=0.0,
            )
            scores = tl.dot(q, tl.trans(row), input_precision="ieee") * (SCALE * _LOG2_E)
            scores = tl.where(there[None, :], scores, float("-inf"))
            new = tl.maximum(biggest, tl.max(scores, axis=1))
            p = tl.exp2(scores - new[:, None])
            shrink = tl.exp2(biggest - new)
            total = total * shrink + tl.sum(p, axis=1)
            acc = tl.dot(p.to(row.dtype), row, acc * shrink[:, None], input_precision="ieee")
            biggest = new
        part = h * X + split
        tl.store(acc_ptr + part[:, None] * C + c[None, :], acc, mask=mine)
        tl.store(stats_ptr + part * 2, biggest, mask=h < H)
        tl.store(stats_ptr + part * 2 + 1, total, mask=h < H)


# A program merges the splits of one head for BLOCK_C columns. Grid: H, C / BLOCK_C.
@triton.jit
def _merge_kernel(
    acc_ptr,
    stats_ptr,
    position_ptr,
    sinks_ptr,  # [H]
    out_ptr,  # [H, C] fp32, written
    C: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    let_next_start(EARLY)
    wait_for_front(EARLY)
    head = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x = tl.arange(0, X)
    _, _, used, _ = _rows_of(0, position_ptr, W, R, K, X, BLOCK_S)
    stats = stats_ptr + (head * X + x) * 2
    peaks = tl.load(stats, mask=x < used, other=float("-inf"))
    sums = tl.load(stats + 1, mask=x < used, other=0.0)
    sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2_E
    biggest = tl.maximum(tl.max(peaks, axis=0), sink)
    shrink = tl.exp2(peaks - biggest)
    total = tl.sum(sums * shrink, axis=0) + tl.exp2(sink - biggest)
    part = tl.load(
        acc_ptr + (head * X + x)[:, None] * C + c[None, :],
        mask=(x < used)[:, None] & (c < C)[None, :],
        other=0.0,
    )
    mean = tl.sum(part * shrink[:, None], axis=0) / total
    tl.store(out_ptr + head * C + c, mean, mask=c < C)


def shared_row_attention_decode(
    query: Tensor,
    rows: Tensor,
    position: Tensor,
    sinks: Tensor,
    out: Tensor,
    *,
    window: int,
    ratio: int,
    acc: Tensor,
    stats: Tensor,
    chosen: Tensor | None = None,
) -> Tensor:
    """Attention of the token at `position` over its window and the compressed rows it sees.

    query:     [H, C] rotated, of the rows' dtype; scores are scaled by C ** -0.5
    rows:      [W + N, C]: token t in row t % W, the token's own included; compressed row n in W + n
    position:  [1] int32 on the device
    sinks:     [H] any float dtype: a logit of each head in the softmax's denominator, not scaled
    out:       [H, C] fp32, written: not yet rotated back
    window:    W
    ratio:     tokens of a compressed row, seen once all of them are there; 0: there are none
    acc:       [H, SPLITS, C] fp32 scratch
    stats:     [H, SPLITS, 2] fp32 scratch
    chosen:    [K] int32, numbers of compressed rows: the first min(K, rows that can be seen) of
               them are seen; None: all

    Reads the rows that are seen once for every 16 heads.
    """
    heads, width = query.shape
    block_h = 16
    sizes = {
        "C": width,
        "W": window,
        "R": ratio,
        "K": 0 if chosen is None else len(chosen),
        "X": SPLITS,
        "BLOCK_S": BLOCK_S,
    }
    _split_kernel[(triton.cdiv(heads, block_h), SPLITS)](
        query,
        rows,
        position,
        chosen,
        acc,
        stats,
        H=heads,
        SCALE=width**-0.5,
        BLOCK_H=block_h,
        BLOCK_C=triton.next_power_of_2(width),
        num_warps=4,
        num_stages=2,
        **sizes,
        **early_start(query),
    )
    block_c = min(64, triton.next_power_of_2(width))
    _merge_kernel[(heads, triton.cdiv(width, block_c))](
        acc,
        stats,
        position,
        sinks,
        out,
        BLOCK_C=block_c,
        num_warps=4,
        **sizes,
        **early_start(query),
    )
    return out
