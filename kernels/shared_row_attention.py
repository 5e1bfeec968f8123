"""DeepSeek V4's attention over rows that are key and value at once, with sinks.

A layer's rows are one tensor: a ring of recent tokens' rows, of which a token sees the last W, then
the compressed rows, of which it sees those whose tokens are all there, or the ones that an indexer
has chosen. The result is turned back by the rope of the token's position. In decode a program
reads a split of the rows that the token sees, for a group of heads, and a second launch merges the
splits and adds the sinks; the numbers of rows come from the position on the device, so that one
launch serves every length. In prefill a program has all rows of its token.

T tokens, H heads, C row width, P rotary width, S slots of the ring, W window, N compressed rows,
R tokens of a compressed row, K chosen rows, X splits.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front
from kernels.pair_rotation import turn_pairs

BLOCK_S = 32  # rows that a program reads at a time
SPLITS = 64
_BLOCK_H = 16  # heads of a program in decode: the rows of a tensor-core tile
_PREFILL_HEADS = 32  # more would not fit a program's registers
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _seen_rows(position, W: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """How many rows of the window and how many compressed ones a token sees."""
    seen = position + 1
    far = 0
    if R > 0:
        far = seen // R
        if K > 0:
            far = tl.minimum(far, K)
    return tl.minimum(seen, W), far


@triton.jit
def _split_of(split, length, X: tl.constexpr, BLOCK_S: tl.constexpr):
    """First and last + 1 of a split's rows, and how many splits have any."""
    per_split = tl.cdiv(tl.cdiv(length, X), BLOCK_S) * BLOCK_S
    begin = split * per_split
    return begin, tl.minimum(begin + per_split, length), tl.cdiv(length, per_split)


@triton.jit
def _attend(
    q,  # [BLOCK_H, BLOCK_C]
    rows_ptr,
    chosen_ptr,
    position,
    near,  # rows of the window that are seen
    begin,  # of the rows that are seen, those of the window first
    end,
    S,
    C: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Running maximum (base 2), sum, and weighted rows [BLOCK_H, BLOCK_C] of rows begin to end."""
    c = tl.arange(0, BLOCK_C)
    biggest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    for s0 in range(begin, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        there = s < end
        far = s - near
        if chosen_ptr is not None:
            far = tl.load(chosen_ptr + far, mask=there & (s >= near), other=0)
        slot = tl.where(s < near, (position + 1 - near + s) % S, S + far).to(tl.int64)
        row = tl.load(
            rows_ptr + slot[:, None] * C + c[None, :],
            mask=there[:, None] & (c < C)[None, :],
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(row), input_precision="ieee") * SCALE_LOG2
        scores = tl.where(there[None, :], scores, float("-inf"))
        new = tl.maximum(biggest, tl.max(scores, axis=1))
        p = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(biggest - new)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(row.dtype), row, acc * shrink[:, None], input_precision="ieee")
        biggest = new
    return biggest, total, acc


# A program reads one split of the rows for BLOCK_H heads. Grid: H / BLOCK_H, X.
# S is not specialised: no length of the cache compiles anything new.
@triton.jit(do_not_specialize=["S"])
def _split_kernel(
    query_ptr,  # [H, C]
    rows_ptr,  # [S + N, C]
    position_ptr,  # [1] int32
    chosen_ptr,  # [K] int32, or None
    acc_ptr,  # [H, X, C] fp32, written: not yet divided
    stats_ptr,  # [H, X, 2] fp32, written: maximum (base 2) and sum
    trace_ptr,  # [programs, 3] int64 or None
    S,
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
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    wait_for_front(EARLY)
    split = tl.program_id(1)
    position = tl.load(position_ptr)
    near, far = _seen_rows(position, W, R, K)
    begin, end, used = _split_of(split, near + far, X, BLOCK_S)
    if split < used:
        stamp(trace_ptr, 1)
        h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
        c = tl.arange(0, BLOCK_C)
        mine = (h < H)[:, None] & (c < C)[None, :]
        q = tl.load(query_ptr + h[:, None] * C + c[None, :], mask=mine, other=0.0)
        biggest, total, acc = _attend(
            q, rows_ptr, chosen_ptr, position, near, begin, end, S, C, SCALE * _LOG2_E,
            BLOCK_H, BLOCK_C, BLOCK_S,
        )  # fmt: skip
        part = h * X + split
        tl.store(acc_ptr + part[:, None] * C + c[None, :], acc, mask=mine)
        tl.store(stats_ptr + part * 2, biggest, mask=h < H)
        tl.store(stats_ptr + part * 2 + 1, total, mask=h < H)
    stamp(trace_ptr, 2)


# A program merges the splits of one head for BLOCK_C columns. Grid: H, C / BLOCK_C.
@triton.jit
def _merge_kernel(
    acc_ptr,
    stats_ptr,
    position_ptr,
    sinks_ptr,  # [H]
    cos_ptr,  # [positions, P / 2] fp32
    sin_ptr,
    out_ptr,  # [H, C] fp32, written
    trace_ptr,
    C: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    head = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    x = tl.arange(0, X)
    position = tl.load(position_ptr)
    near, far = _seen_rows(position, W, R, K)
    _, _, used = _split_of(0, near + far, X, BLOCK_S)
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
    turn = position.to(tl.int64) * (P // 2)
    mean = turn_pairs(mean[None, :], first, cos_ptr + turn, sin_ptr + turn, C, P, True, 1, BLOCK_C)
    tl.store(out_ptr + head * C + c[None, :], mean, mask=(c < C)[None, :])
    stamp(trace_ptr, 2)


def shared_row_attention_decode(
    query: Tensor,
    rows: Tensor,
    position: Tensor,
    sinks: Tensor,
    rope: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    slots: int,
    window: int,
    ratio: int,
    acc: Tensor,
    stats: Tensor,
    chosen: Tensor | None = None,
    trace: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Attention of the token at `position` over its window and the compressed rows it sees.

    query:     [H, C] turned, of the rows' dtype; scores are scaled by C ** -0.5
    rows:      [S + N, C]: token t in row t % S, the token's own included; compressed row n in S + n
    position:  [1] int32 on the device
    sinks:     [H] any float dtype: a logit of each head in the softmax's denominator, not scaled
    rope:      cos and sin, [positions, P / 2] fp32; the last P columns of out are turned back
    out:       [H, C] fp32, written
    slots:     S
    window:    W, at most S
    ratio:     R, a row is seen once all its R tokens are there; 0: there are no compressed rows
    acc:       [H, SPLITS, C] fp32 scratch
    stats:     [H, SPLITS, 2] fp32 scratch
    chosen:    [K] int32, numbers of compressed rows: the first min(K, rows that can be seen) of
               them are seen; None: all

    Reads the rows that are seen once for every 16 heads.
    """
    heads, width = query.shape
    sizes = {
        "C": width,
        "W": window,
        "R": ratio,
        "K": 0 if chosen is None else len(chosen),
        "X": SPLITS,
        "BLOCK_S": BLOCK_S,
    }
    _split_kernel[(triton.cdiv(heads, _BLOCK_H), SPLITS)](
        query,
        rows,
        position,
        chosen,
        acc,
        stats,
        trace[0],
        slots,
        H=heads,
        SCALE=width**-0.5,
        BLOCK_H=_BLOCK_H,
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
        *rope,
        out,
        trace[1],
        P=2 * rope[0].shape[1],
        BLOCK_C=block_c,
        num_warps=4,
        **sizes,
        **early_start(query),
    )
    return out


# A program computes BLOCK_H heads of one token. Grid: T, H / BLOCK_H.
@triton.jit(do_not_specialize=["S"])
def _prefill_kernel(
    query_ptr,  # [T, H, C]
    rows_ptr,  # [S + N, C]
    position_ptr,  # [1] int32: position of token 0
    chosen_ptr,  # [T, K] int32, or None
    sinks_ptr,  # [H]
    cos_ptr,  # [positions, P / 2] fp32
    sin_ptr,
    out_ptr,  # [T, H, C], written
    S,
    H: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr) + tl.program_id(0)
    near, far = _seen_rows(position, W, R, K)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)
    mine = (h < H)[:, None] & (c < C)[None, :]
    place = (token * H + h)[:, None] * C + c[None, :]
    q = tl.load(query_ptr + place, mask=mine, other=0.0)
    if chosen_ptr is not None:
        chosen_ptr += token * K
    biggest, total, acc = _attend(
        q, rows_ptr, chosen_ptr, position, near, 0, near + far, S, C, SCALE * _LOG2_E,
        BLOCK_H, BLOCK_C, BLOCK_S,
    )  # fmt: skip
    sink = tl.load(sinks_ptr + h, mask=h < H, other=0.0).to(tl.float32) * _LOG2_E
    new = tl.maximum(biggest, sink)
    shrink = tl.exp2(biggest - new)
    total = total * shrink + tl.exp2(sink - new)
    acc *= (shrink / total)[:, None]
    turn = position.to(tl.int64) * (P // 2)
    acc = turn_pairs(acc, 0, cos_ptr + turn, sin_ptr + turn, C, P, True, BLOCK_H, BLOCK_C)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mine)


def shared_row_attention_prefill(
    query: Tensor,
    rows: Tensor,
    position: Tensor,
    sinks: Tensor,
    rope: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    slots: int,
    window: int,
    ratio: int,
    chosen: Tensor | None = None,
) -> Tensor:
    """Attention of T tokens at position, position + 1, ...

    query:     [T, H, C] turned, of the rows' dtype
    rows:      [S + N, C], the tokens' own rows and the compressed ones that they finish included;
               S is at least W + T - 1, or the tokens' last position + 1
    out:       [T, H, C] any float dtype, written
    chosen:    [T, K] int32, for each token as in shared_row_attention_decode; None: all
    Other arguments are those of shared_row_attention_decode.

    4 * T * H * C * (rows that are seen) operations set its time.
    """
    tokens, heads, width = query.shape
    block_h = max(16, min(_PREFILL_HEADS, triton.next_power_of_2(heads)))
    _prefill_kernel[(tokens, triton.cdiv(heads, block_h))](
        query,
        rows,
        position,
        chosen,
        sinks,
        *rope,
        out,
        slots,
        H=heads,
        C=width,
        P=2 * rope[0].shape[1],
        W=window,
        R=ratio,
        K=0 if chosen is None else chosen.shape[1],
        SCALE=width**-0.5,
        BLOCK_H=block_h,
        BLOCK_C=triton.next_power_of_2(width),
        BLOCK_S=BLOCK_S,
        num_warps=8,
        num_stages=2,
    )
    return out
