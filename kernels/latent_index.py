"""The indexer of V3.2 and V4: which cached rows the attention of a token sees.

A row is a token; in V4 it is a few tokens compressed to one row, seen once all of them are there.
Each row has an index key. A token scores every key, the weighted sum over index heads of
relu(query . key), and sees the C rows of the highest scores; all of them while there are no more
than C. The choice is made on the device, one program a token: the C-th highest score is found two
bits at a time, by counting the scores that are not below a guess, and what is above it is written
in the order of the cache. Scores of up to _CHOOSE_BLOCK rows stay in registers meanwhile.
index_rows makes V3.2's queries and keys; V4's come from kernels/shared_rows.py and
kernels/compressed_rows.py.

T tokens, I index heads, J index width, P rotary width, S cached rows, C chosen ones, R tokens of a
row.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front

NORM_EPS = 1e-6
_BLOCK_S = 64  # keys that a program scores at a time
_SCORE_PROGRAMS = 264  # of a token
_HEADS_PER_PROGRAM = 8
_CHOOSE_BLOCK = 16384  # scores that a program looks at at a time: 32 registers of a lane
_CHOOSE_WARPS = 16
_CHOOSE_RUN = 8  # scores in a row that a lane puts into their places


@triton.jit
def _rotated_halves(target, x, partner, cos_ptr, sin_ptr, j, mask, P: tl.constexpr):
    """Rows [.., J] with pairs (i, i + P / 2) of the first P columns turned, stored at target."""
    i = j % (P // 2)
    cos = tl.where(j < P, tl.load(cos_ptr + i), 1.0)
    sin = tl.where(j < P, tl.load(sin_ptr + i), 0.0)
    sin = tl.where(j < P // 2, -sin, sin)
    tl.store(target + j, (x * cos + partner * sin).to(target.dtype.element_ty), mask=mask)


# A program handles BLOCK_I index heads of one token; the last one of a token its key.
# Grid: T, I / BLOCK_I + 1.
@triton.jit
def _index_rows_kernel(
    q_ptr,  # [T, I, J]
    key_ptr,  # [T, J]
    norm_ptr,  # [J]
    bias_ptr,  # [J]
    cos_ptr,  # [positions, P / 2] fp32
    sin_ptr,
    position_ptr,  # [1] int32: position of token 0
    cache_ptr,  # [S, J]
    query_ptr,  # [T, I, J], written
    trace_ptr,  # [programs, 3] int64 or None
    I: tl.constexpr,
    J: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    let_next_start(EARLY)
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr) + token
    cos_ptr += position * (P // 2)
    sin_ptr += position * (P // 2)
    j = tl.arange(0, BLOCK_J)
    other = tl.where(j < P, (j + P // 2) % P, j)
    if tl.program_id(1) == tl.num_programs(1) - 1:
        row = key_ptr + token * J
        x = tl.load(row + j, mask=j < J, other=0.0).to(tl.float32)
        mean = tl.sum(x) / J
        centred = tl.where(j < J, x - mean, 0.0)
        factor = tl.rsqrt(tl.sum(centred * centred) / J + EPS)
        partner = tl.load(row + other, mask=j < J, other=0.0).to(tl.float32) - mean
        x = centred * factor * tl.load(norm_ptr + j, mask=j < J, other=0.0).to(tl.float32)
        x += tl.load(bias_ptr + j, mask=j < J, other=0.0).to(tl.float32)
        partner *= factor * tl.load(norm_ptr + other, mask=j < J, other=0.0).to(tl.float32)
        partner += tl.load(bias_ptr + other, mask=j < J, other=0.0).to(tl.float32)
        target = cache_ptr + position * J
        _rotated_halves(target, x, partner, cos_ptr, sin_ptr, j, j < J, P)
    else:
        head = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
        rows = q_ptr + (token * I + head)[:, None] * J
        mask = (head < I)[:, None] & (j < J)[None, :]
        heads = tl.load(rows + j[None, :], mask=mask, other=0.0).to(tl.float32)
        partners = tl.load(rows + other[None, :], mask=mask, other=0.0).to(tl.float32)
        out = query_ptr + (token * I + head)[:, None] * J
        _rotated_halves(out, heads, partners, cos_ptr, sin_ptr, j[None, :], mask, P)
    stamp(trace_ptr, 2)


def index_rows(
    q: Tensor,
    key: Tensor,
    norm: Tensor,
    bias: Tensor,
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    cache: Tensor,
    query: Tensor,
    *,
    trace: Tensor | None = None,
) -> Tensor:
    """Rotate the index queries of T tokens at position, position + 1, ...; cache their index keys.

    q:         [T, I, J] any float dtype
    key:       [T, J] likewise, before its layer norm
    norm:      [J] and bias [J] of that norm
    rope:      cos and sin, [positions, P / 2] fp32; pairs are (i, i + P / 2) of the first P columns
    position:  [1] int32 on the device
    cache:     [S, J], rows position to position + T - 1 written
    query:     [T, I, J] of the cache's dtype, written and returned

    Bound by latency for one token. The kernel behind may read before its own wait what kernels in
    front of this one wrote.
    """
    tokens, heads, width = q.shape
    assert q.is_contiguous() and key.is_contiguous()
    _index_rows_kernel[(tokens, triton.cdiv(heads, _HEADS_PER_PROGRAM) + 1)](
        q,
        key,
        norm,
        bias,
        *rope,
        position,
        cache,
        query,
        trace,
        I=heads,
        J=width,
        P=2 * rope[0].shape[1],
        EPS=NORM_EPS,
        BLOCK_I=_HEADS_PER_PROGRAM,
        BLOCK_J=triton.next_power_of_2(width),
        num_warps=2,
        **early_start(query),
    )
    return query


# A program scores every X-th block of keys for one token. Grid: X, T.
# No number of cached rows compiles anything new.
@triton.jit(do_not_specialize=["columns"])
def _index_scores_kernel(
    query_ptr,  # [T, I, J]
    weights_ptr,  # [T, I] fp32
    cache_ptr,  # [S, J]
    position_ptr,  # [1] int32: position of token 0
    scores_ptr,  # [T, COLUMNS] fp32, written up to a token's own column
    columns,
    trace_ptr,  # [programs, 3] int64 or None
    I: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    token = tl.program_id(1).to(tl.int64)
    length = ((tl.load(position_ptr) + token + 1) // R).to(tl.int32)
    if length > C:  # else all are chosen
        i = tl.arange(0, BLOCK_I)
        j = tl.arange(0, BLOCK_J)
        there = (i < I)[:, None] & (j < J)[None, :]
        q = tl.load(query_ptr + (token * I + i)[:, None] * J + j[None, :], mask=there, other=0.0)
        weights = tl.load(weights_ptr + token * I + i, mask=i < I, other=0.0)
        for s0 in range(tl.program_id(0) * BLOCK_S, length, tl.num_programs(0) * BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            inside = (s < length)[:, None] & (j < J)[None, :]
            rows = cache_ptr + s.to(tl.int64)[:, None] * J
            keys = tl.load(rows + j[None, :], mask=inside, other=0.0)
            products = tl.dot(q, tl.trans(keys), input_precision="ieee")
            scores = tl.sum(tl.maximum(products, 0.0) * weights[:, None], axis=0)
            tl.store(scores_ptr + token * columns + s, scores, mask=s < length)
    stamp(trace_ptr, 2)


@triton.jit
def _ordered(scores):
    """uint32 whose order is that of fp32 scores."""
    bits = scores.to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits | -0x80000000)
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def _scores_at(scores_ptr, s, length):
    """Scores in the order of uint32; those that are not there are the lowest, 0."""
    scores = tl.load(scores_ptr + s, mask=s < length, other=0.0)
    return tl.where(s < length, _ordered(scores), 0)


@triton.jit
def _not_below(scores, edge, shift):
    """1 for each of edge + 1, 2, 3 << shift that a score is not below, 21 bits apart."""
    step = tl.full((), 1, tl.uint32) << shift.to(tl.uint32)
    counts = (scores >= edge + step).to(tl.int64)
    counts += (scores >= edge + 2 * step).to(tl.int64) << 21
    return counts + ((scores >= edge + 3 * step).to(tl.int64) << 42)


# A program chooses for one token. Grid: T.
@triton.jit(do_not_specialize=["columns"])
def _choose_rows_kernel(
    scores_ptr,  # [T, COLUMNS] fp32
    position_ptr,  # [1] int32: position of token 0
    chosen_ptr,  # [T, C] int32, written
    columns,
    trace_ptr,  # [programs, 3] int64 or None
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    RUN: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    token = tl.program_id(0).to(tl.int64)
    length = ((tl.load(position_ptr) + token + 1) // R).to(tl.int32)
    chosen_ptr += token * C
    scores_ptr += token * columns
    one = tl.arange(0, BLOCK)
    if length <= C:
        for s0 in range(0, length, BLOCK):
            tl.store(chosen_ptr + s0 + one, s0 + one, mask=s0 + one < length)
    else:
        first = _scores_at(scores_ptr, one, length)
        # The highest number that C scores or more are not below: the C-th highest score, or a
        # number between it and the next, if the search ends where just C are not below.
        edge = tl.zeros((), tl.uint32)
        shift = tl.full((), 30, tl.int32)
        count = length
        while (shift >= 0) & (count != C):
            counts = _not_below(first, edge, shift)
            for s0 in range(BLOCK, length, BLOCK):
                counts += _not_below(_scores_at(scores_ptr, s0 + one, length), edge, shift)
            total = tl.sum(counts)
            digit = 0
            for guess in tl.static_range(1, 4):
                found = (total >> (21 * (guess - 1))).to(tl.int32) & 0x1FFFFF
                if found >= C:
                    digit = guess
                    count = found
            edge += tl.cast(digit, tl.uint32) << shift.to(tl.uint32)
            shift -= 2
        above = tl.sum((first > edge).to(tl.int32))
        for s0 in range(BLOCK, length, BLOCK):
            above += tl.sum((_scores_at(scores_ptr, s0 + one, length) > edge).to(tl.int32))
        missing = C - above  # how many of the scores that are equal to the edge are chosen
        # Lanes take RUN scores in a row: a scan of their sums is short. What is above the edge is
        # counted in the lower half of a number, what is equal to it in the upper.
        lane = tl.arange(0, LANES)
        done = 0
        equals = 0
        for s0 in range(0, length, LANES * RUN):
            s = s0 + lane[:, None] * RUN + tl.arange(0, RUN)[None, :]
            score = _scores_at(scores_ptr, s, length)
            is_above = score > edge
            is_equal = (score == edge) & (s < length)
            found = is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16)
            of_lane = tl.sum(found, axis=1)
            before = tl.cumsum(of_lane, axis=0) - of_lane
            rank = before[:, None] + tl.cumsum(found, axis=1)
            equal_rank = equals + (rank >> 16)
            place = done + (rank & 0xFFFF) + tl.minimum(equal_rank, missing) - 1
            keep = is_above | (is_equal & (equal_rank <= missing))
            tl.store(chosen_ptr + place, s, mask=keep)
            all_found = tl.sum(of_lane)
            done += all_found & 0xFFFF
            equals += all_found >> 16
    stamp(trace_ptr, 2)


def index_choose(
    query: Tensor,
    weights: Tensor,
    cache: Tensor,
    position: Tensor,
    scores: Tensor,
    chosen: Tensor,
    *,
    ratio: int = 1,
    trace: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The cached rows that each of T tokens at position, position + 1, ... sees.

    query:     [T, I, J] as index_rows leaves it
    weights:   [T, I] fp32, of the heads; a common positive factor changes nothing
    cache:     [S, J], keys of all rows that the tokens may see
    position:  [1] int32 on the device
    scores:    [T, columns] fp32 scratch, a column for every row
    chosen:    [T, C] int32, written: rows of the cache in rising order, C of them or all that the
               token may see; among equal scores the earlier ones. Returned.
    ratio:     R: a token may see the rows of which all R tokens are its own or before it

    Reads 2 * J bytes a cached row, and its score twice by one program a token; of further rows than
    _CHOOSE_BLOCK once more for every two bits of the edge.
    """
    tokens, heads, width = query.shape
    columns, count = scores.shape[1], chosen.shape[1]
    programs = min(_SCORE_PROGRAMS, triton.cdiv(columns, _BLOCK_S))
    _index_scores_kernel[(programs if tokens == 1 else min(programs, 8), tokens)](
        query,
        weights,
        cache,
        position,
        scores,
        columns,
        trace[0],
        I=heads,
        J=width,
        C=count,
        R=ratio,
        BLOCK_I=max(16, triton.next_power_of_2(heads)),
        BLOCK_J=max(16, triton.next_power_of_2(width)),
        BLOCK_S=_BLOCK_S,
        num_warps=4,
        **early_start(query),
    )
    _choose_rows_kernel[(tokens,)](
        scores,
        position,
        chosen,
        columns,
        trace[1],
        C=count,
        R=ratio,
        BLOCK=_CHOOSE_BLOCK,
        LANES=32 * _CHOOSE_WARPS,
        RUN=_CHOOSE_RUN,
        num_warps=_CHOOSE_WARPS,
        **early_start(query),
    )
    return chosen
