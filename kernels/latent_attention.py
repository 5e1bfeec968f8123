"""Attention in a cache of latents that all heads share (MLA in absorbed form).

A cached row is key and, in its first L columns, value for every head, so the heads of a token are
the rows of one tensor-core product. Decode splits the cached rows among programs, by their number
on the device, so that one launch serves every length; two more merge them and project to values.
A token sees all rows up to its own, or those that an indexer has chosen.

T tokens, H heads, L latent width, P rotary width, U value width of a head, S slots, X splits,
C chosen rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front
from kernels.latent_cache import projection_parts, scales_kind
from kernels.weight_formats import decode_scale
from quant.tensor import QuantTensor

BLOCK_S = 32  # cached rows that a program reads at a time
# More rows of a program would not fit its registers: each has a sum for every column of a latent.
_PREFILL_ROWS = 32
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows_of(split, splits, length, BLOCK_S: tl.constexpr):
    """First and last + 1 of a split's rows, and the number of splits that have any."""
    per_split = tl.cdiv(tl.cdiv(length, splits), BLOCK_S) * BLOCK_S
    begin = split * per_split
    return begin, tl.minimum(begin + per_split, length), tl.cdiv(length, per_split)


@triton.jit
def _slots(chosen_ptr, s, there):
    """Rows of the cache, int64: all in order, or those chosen."""
    if chosen_ptr is None:
        return s.to(tl.int64)
    else:
        return tl.load(chosen_ptr + s, mask=there, other=0).to(tl.int64)


@triton.jit
def _attend(
    q_latent,  # [M, BLOCK_L]
    q_rotary,  # [M, BLOCK_P]
    latent,  # [BLOCK_S, BLOCK_L]
    key,  # [BLOCK_S, BLOCK_P]
    seen,  # [M or 1, BLOCK_S]
    biggest,
    total,
    acc,
    SCALE_LOG2: tl.constexpr,
):
    """One tile of cached rows more: running maximum, sum and weighted latents."""
    scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
    scores = tl.dot(q_rotary, tl.trans(key), scores, input_precision="ieee") * SCALE_LOG2
    scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(biggest, tl.max(scores, axis=1))
    p = tl.exp2(scores - new[:, None])
    shrink = tl.exp2(biggest - new)
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(latent.dtype), latent, acc * shrink[:, None], input_precision="ieee")
    return new, total, acc


# A program reads one split of the cached rows for BLOCK_H heads. Grid: H / BLOCK_H, X.
@triton.jit
def _decode_kernel(
    query_ptr,  # [H, L + P]
    cache_ptr,  # [S, L + P]
    position_ptr,  # [1] int32
    chosen_ptr,  # [C] int32, or None
    acc_ptr,  # [H, X, L] fp32, written: not yet divided
    stats_ptr,  # [H, X, 2] fp32, written: running maximum (base 2) and sum
    trace_ptr,  # [programs, 3] int64 or None
    H: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    l = tl.arange(0, BLOCK_L)
    r = tl.arange(0, BLOCK_P)
    # The kernel in front lets this one start after its own wait: position and rows of earlier
    # tokens are there already; the query, the token's own row and choices must be waited for.
    # Programs without work end at once: split 0 always waits.
    length = tl.load(position_ptr) + 1
    if chosen_ptr is not None:
        length = tl.minimum(length, C)
    begin, end, used = _rows_of(split, splits, length, BLOCK_S)
    if split < used:
        wait_for_front(EARLY)
        stamp(trace_ptr, 1)
        mine = (h < H)[:, None]
        row = query_ptr + h[:, None] * (L + P)
        q_latent = tl.load(row + l[None, :], mask=mine & (l < L)[None, :], other=0.0)
        q_rotary = tl.load(row + L + r[None, :], mask=mine & (r < P)[None, :], other=0.0)
        biggest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        acc = tl.zeros((BLOCK_H, BLOCK_L), tl.float32)
        for s0 in range(begin, end, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            there = s < end
            place = cache_ptr + _slots(chosen_ptr, s, there)[:, None] * (L + P)
            latent = tl.load(place + l[None, :], mask=there[:, None] & (l < L)[None, :], other=0.0)
            key = tl.load(place + L + r[None, :], mask=there[:, None] & (r < P)[None, :], other=0.0)
            biggest, total, acc = _attend(
                q_latent, q_rotary, latent, key, there[None, :], biggest, total, acc,
                SCALE * _LOG2_E,
            )  # fmt: skip
        part = h * splits + split
        tl.store(acc_ptr + part[:, None] * L + l[None, :], acc, mask=mine & (l < L)[None, :])
        tl.store(stats_ptr + part * 2, biggest, mask=h < H)
        tl.store(stats_ptr + part * 2 + 1, total, mask=h < H)
    stamp(trace_ptr, 2)


# A program merges the splits of one head for BLOCK_L columns, into the first split's.
# Grid: H, L / BLOCK_L.
@triton.jit
def _merge_kernel(
    acc_ptr,  # [H, X, L] fp32, of split 0 written
    stats_ptr,
    position_ptr,
    trace_ptr,
    L: tl.constexpr,
    C: tl.constexpr,  # 0: all rows are seen
    X: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    # The kernel in front started after the wait of the one before it: the position is there.
    length = tl.load(position_ptr) + 1
    if C > 0:
        length = tl.minimum(length, C)
    _, _, used = _rows_of(0, X, length, BLOCK_S)
    head = tl.program_id(0).to(tl.int64)
    l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    x = tl.arange(0, X)
    acc = acc_ptr + head * (X * L) + l
    stats = stats_ptr + (head * X + x) * 2
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    mask = (x < used)[:, None] & (l < L)[None, :]
    parts = tl.load(acc[None, :] + x[:, None] * L, mask=mask, other=0.0)
    peaks = tl.load(stats, mask=x < used, other=float("-inf"))
    sums = tl.load(stats + 1, mask=x < used, other=0.0)
    shrink = tl.exp2(peaks - tl.max(peaks, axis=0))
    mean = tl.sum(parts * shrink[:, None], axis=0) / tl.sum(sums * shrink, axis=0)
    tl.store(acc, mean, mask=l < L)
    stamp(trace_ptr, 2)


# A program computes BLOCK_U values of one head. Grid: H, U / BLOCK_U.
@triton.jit
def _values_kernel(
    mean_ptr,  # [H, X, L]: of latents, in split 0
    projection_ptr,  # [H, N + U, L]: a head's U rows for values last
    scales_ptr,  # of blocks of 128x128, or None
    out_ptr,  # [H, U] fp32, written
    trace_ptr,
    N: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    X: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SCALES: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    head = tl.program_id(0).to(tl.int64)
    u = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    l = tl.arange(0, BLOCK_L)
    place = (head * (N + U) + N + u)[:, None] * L + l[None, :]
    w = tl.load(projection_ptr + place, mask=(u < U)[:, None] & (l < L)[None, :], other=0.0)
    if scales_ptr is not None:  # N and U are 128
        block = (head * 2 + 1) * ((L + 127) // 128) + l // 128
        scale = decode_scale(tl.load(scales_ptr + block, mask=l < L, other=0), SCALES)
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    mean = tl.load(mean_ptr + head * (X * L) + l, mask=l < L, other=0.0)
    if scales_ptr is not None:
        mean *= scale
    y = tl.sum(w.to(tl.float32) * mean[None, :], axis=1)
    tl.store(out_ptr + head * U + u, y, mask=u < U)
    stamp(trace_ptr, 2)


def latent_attention_decode(
    query: Tensor,
    cache: Tensor,
    position: Tensor,
    projection: Tensor | QuantTensor,
    out: Tensor,
    *,
    scale: float,
    acc: Tensor,
    stats: Tensor,
    chosen: Tensor | None = None,
    trace: tuple[Tensor | None, ...] = (None, None, None),
) -> Tensor:
    """Attention of the token at `position`: over the cache, then each head's value projection.

    query:       [H, L + P] in absorbed form, of the cache's dtype
    cache:       [S, L + P], the token's own row included
    position:    [1] int32 on the device
    projection:  [H * (N + U), L] any float dtype; or, if N and U are 128, in FP8 blocks
    out:         [H, U] fp32, written
    scale:       of the scores before the softmax
    acc:         [H, X, L] fp32 scratch, X of num_splits
    stats:       [H, X, 2] fp32 scratch
    chosen:      [C] int32: the rows that are seen, the first min(C, position + 1) of them; None
                 for all

    Reads 2 * (L + P) bytes a row that is seen, once for every BLOCK_H heads, and U rows of each
    head's projection.
    """
    heads, splits, latent_width = acc.shape
    rotary = cache.shape[1] - latent_width
    block_h = heads_of_program(heads)
    block_l = triton.next_power_of_2(latent_width)
    rows = {"C": 0 if chosen is None else len(chosen), "BLOCK_S": BLOCK_S}
    early = early_start(query)
    _decode_kernel[(triton.cdiv(heads, block_h), splits)](
        query,
        cache,
        position,
        chosen,
        acc,
        stats,
        trace[0],
        H=heads,
        L=latent_width,
        P=rotary,
        SCALE=scale,
        BLOCK_H=block_h,
        BLOCK_L=block_l,
        BLOCK_P=max(16, triton.next_power_of_2(rotary)),
        num_warps=4 * (block_h // 16),
        num_stages=2,
        **rows,
        **early,
    )
    merged = min(64 if splits > 64 else 128, block_l)
    _merge_kernel[(heads, triton.cdiv(latent_width, merged))](
        acc,
        stats,
        position,
        trace[1],
        L=latent_width,
        X=splits,
        BLOCK_L=merged,
        num_warps=4,
        **rows,
        **early,
    )
    values = out.shape[1]
    block_u = min(32 if heads > 32 else 16, triton.next_power_of_2(values))
    _values_kernel[(heads, triton.cdiv(values, block_u))](
        acc,
        *projection_parts(projection),
        out,
        trace[2],
        N=projection.shape[0] // heads - values,
        U=values,
        L=latent_width,
        X=splits,
        BLOCK_U=block_u,
        BLOCK_L=block_l,
        SCALES=scales_kind(projection),
        num_warps=4,
        **early,
    )
    return out


def heads_of_program(heads: int) -> int:
    """Rows of the score tile: at least the 16 of a tensor-core tile, 32 where there are many."""
    return 32 if heads > 32 else 16


def num_splits(heads: int) -> int:
    """Programs that share the cached rows of a group of heads: about 128 programs in all."""
    groups = triton.cdiv(heads, heads_of_program(heads))
    return max(16, 128 // triton.next_power_of_2(groups))


# A program computes BLOCK_M rows, each one head of one token; heads of a token share what is read.
# Grid: T * H / BLOCK_M. T is not specialised: no prompt length compiles anything new.
@triton.jit(do_not_specialize=["T"])
def _prefill_kernel(
    query_ptr,  # [T, H, L + P]
    cache_ptr,  # [S, L + P]
    position_ptr,  # [1] int32: position of token 0
    chosen_ptr,  # [T, C] int32, or None
    out_ptr,  # [T, H, L], written
    T,
    H: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # The last rows have the most to read: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // H
    inside = (token < T)[:, None]
    l = tl.arange(0, BLOCK_L)
    r = tl.arange(0, BLOCK_P)
    q_ptrs = query_ptr + row[:, None] * (L + P)
    q_latent = tl.load(q_ptrs + l[None, :], mask=inside & (l < L)[None, :], other=0.0)
    q_rotary = tl.load(q_ptrs + L + r[None, :], mask=inside & (r < P)[None, :], other=0.0)
    start = tl.load(position_ptr)
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // H, T - 1)
    end = start + last + 1
    if chosen_ptr is not None:  # all rows of a program are of one token
        end = tl.minimum(end, C)
        chosen_ptr += last.to(tl.int64) * C
    biggest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    for s0 in range(0, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        there = s < end
        # Every row sees position 0, so no maximum stays at -inf.
        seen = s[None, :] <= start + token[:, None]
        if chosen_ptr is not None:
            seen = there[None, :]
        place = cache_ptr + _slots(chosen_ptr, s, there)[:, None] * (L + P)
        latent = tl.load(place + l[None, :], mask=there[:, None] & (l < L)[None, :], other=0.0)
        key = tl.load(place + L + r[None, :], mask=there[:, None] & (r < P)[None, :], other=0.0)
        biggest, total, acc = _attend(
            q_latent, q_rotary, latent, key, seen, biggest, total, acc, SCALE * _LOG2_E
        )
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * L + l[None, :], out, mask=inside & (l < L)[None, :])


def latent_attention_prefill(
    query: Tensor,
    cache: Tensor,
    position: Tensor,
    out: Tensor,
    *,
    scale: float,
    chosen: Tensor | None = None,
) -> Tensor:
    """Attention of T tokens at position, position + 1, ...: the mean of latents of each head.

    query:     [T, H, L + P] in absorbed form, of the cache's dtype
    cache:     [S, L + P], the tokens' own rows included
    position:  [1] int32 on the device
    out:       [T, H, L], written
    scale:     of the scores before the softmax
    chosen:    [T, C] int32: the rows that a token sees, the first min(C, its position + 1) of
               them; None for all up to its own

    2 * T * (rows seen) * H * (2L + P) operations set its time.
    """
    tokens, heads, width = query.shape
    latent_width = out.shape[2]
    rotary = width - latent_width
    block_m = _PREFILL_ROWS
    if chosen is not None:
        block_m = min(block_m, heads)
        assert heads % block_m == 0 and block_m >= 16, heads
    _prefill_kernel[(triton.cdiv(tokens * heads, block_m),)](
        query,
        cache,
        position,
        chosen,
        out,
        tokens,
        H=heads,
        L=latent_width,
        P=rotary,
        C=0 if chosen is None else chosen.shape[1],
        SCALE=scale,
        BLOCK_M=block_m,
        BLOCK_L=triton.next_power_of_2(latent_width),
        BLOCK_P=max(16, triton.next_power_of_2(rotary)),
        BLOCK_S=BLOCK_S,
        num_warps=8,
        num_stages=2,
    )
    return out
