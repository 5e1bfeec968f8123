"""The indexer of V3.2 and V4: which cached rows the attention of a token sees.

A row is a token; in V4 it is a few tokens compressed to one row, seen once all of them are there.
Each row has an index key. A token scores every key, the weighted sum over index heads of
relu(query . key), and sees the C rows of the highest scores; all of them while there are no more
than C. The choice is made on the device, one program a token: the C-th highest score is found two
bits at a time, by counting the scores that are not below a guess, and what is above it is written
in the order of the cache. Scores of up to _CHOOSE_BLOCK rows stay in registers meanwhile. Of more
rows, many programs first leave out most that cannot be chosen: each takes every P-th score and
finds a number that its C / P highest are not below; the lowest of these numbers is not above the
C-th highest score of all.
index_rows makes V3.2's queries and keys; V4's come from kernels/shared_rows.py and
kernels/compressed_rows.py.

T tokens, I index heads, J index width, P rotary width, S cached rows, C chosen ones, R tokens of a
row.
"""

import torch
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
_CHOOSE_CUT_BLOCK = 8192  # the same with a cut, which leaves fewer
_CUT_BLOCK = 1024  # scores of one of the programs that leave out what cannot be chosen


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


@triton.jit
def _highest_edge(scores, more_ptr, last, count, least, enough, BLOCK: tl.constexpr):
    """The highest number that `least` scores or more are not below, or one that no more than
    `enough` are not below, where the search ends.

    scores: [BLOCK]; more_ptr: where scores from BLOCK to last are read anew for each count
    count:  of all scores
    """
    one = tl.arange(0, BLOCK)
    edge = tl.zeros((), tl.uint32)
    shift = tl.full((), 30, tl.int32)
    while (shift >= 0) & (count > enough):
        counts = _not_below(scores, edge, shift)
        for s0 in range(BLOCK, last, BLOCK):
            counts += _not_below(_scores_at(more_ptr, s0 + one, last), edge, shift)
        total = tl.sum(counts)
        digit = 0
        for guess in tl.static_range(1, 4):
            found = (total >> (21 * (guess - 1))).to(tl.int32) & 0x1FFFFF
            if found >= least:
                digit = guess
                count = found
        edge += tl.cast(digit, tl.uint32) << shift.to(tl.uint32)
        shift -= 2
    return edge


# A program finds an edge among every P-th score of a token. Grid: P.
@triton.jit
def _edges_kernel(
    scores_ptr,  # [columns] fp32
    position_ptr,  # [1] int32
    edges_ptr,  # [P] int32: bits of a uint32, written
    trace_ptr,  # [programs, 3] int64 or None
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    FROM: tl.constexpr,  # rows up to which nothing is left out
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    length = ((tl.load(position_ptr) + 1) // R).to(tl.int32)
    if length > FROM:
        programs = tl.num_programs(0)
        s = tl.program_id(0) + tl.arange(0, BLOCK) * programs
        least = tl.cdiv(C, programs)
        scores = _scores_at(scores_ptr, s, length)
        count = tl.full((), BLOCK, tl.int32)
        edge = _highest_edge(scores, scores_ptr, 0, count, least, least + least // 4, BLOCK)
        tl.store(edges_ptr + tl.program_id(0), edge.to(tl.int32, bitcast=True))
    stamp(trace_ptr, 2)


# A program keeps those of every P-th score of a token that may be chosen. Grid: P.
@triton.jit(do_not_specialize=["room"])
def _keep_kernel(
    scores_ptr,  # [columns] fp32
    position_ptr,  # [1] int32
    edges_ptr,  # [P] int32: bits of a uint32
    counts_ptr,  # [P] int32, written: how many may be chosen; what has no room is lost
    kept_ptr,  # [P, room] int32, written: bits of ordered scores, then zeros
    room,
    trace_ptr,  # [programs, 3] int64 or None
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    FROM: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    length = ((tl.load(position_ptr) + 1) // R).to(tl.int32)
    if length > FROM:
        programs = tl.num_programs(0)
        i = tl.arange(0, BLOCK)
        s = tl.program_id(0) + i * programs
        scores = _scores_at(scores_ptr, s, length)
        edges = tl.load(edges_ptr + i, mask=i < programs, other=-1).to(tl.int64) & 0xFFFFFFFF
        keep = (scores.to(tl.int64) >= tl.min(edges)) & (s < length)
        place = tl.cumsum(keep.to(tl.int32)) - 1
        count = tl.sum(keep.to(tl.int32))
        kept_ptr += tl.program_id(0) * room
        tl.store(kept_ptr + place, scores.to(tl.int32, bitcast=True), mask=keep & (place < room))
        tl.store(kept_ptr + i, 0, mask=(i >= count) & (i < room))
        tl.store(counts_ptr + tl.program_id(0), count)
    stamp(trace_ptr, 2)


# A program chooses for one token. Grid: T.
@triton.jit(do_not_specialize=["columns", "parts", "room"])
def _choose_rows_kernel(
    scores_ptr,  # [T, COLUMNS] fp32
    position_ptr,  # [1] int32: position of token 0
    chosen_ptr,  # [T, C] int32, written
    columns,
    counts_ptr,  # [PARTS] int32 and
    kept_ptr,  # [PARTS, room] int32 of _keep_kernel, of a single token; or None
    parts,
    room,
    trace_ptr,  # [programs, 3] int64 or None
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST_PARTS: tl.constexpr,
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
        last = length
        if kept_ptr is None:
            first = _scores_at(scores_ptr, one, length)
        else:
            # What is left of the cut, if no part had more than it has room for; else all scores.
            most = room + 1
            if length > BLOCK:
                part = tl.arange(0, MOST_PARTS)
                most = tl.max(tl.load(counts_ptr + part, mask=part < parts, other=0))
            if most <= room:
                kept = tl.load(kept_ptr + one, mask=one < parts * room, other=0)
                first = kept.to(tl.uint32, bitcast=True)
                last = BLOCK
            else:
                first = _scores_at(scores_ptr, one, length)
        # The C-th highest score, or a number between it and the next, if just C are not below.
        edge = _highest_edge(first, scores_ptr, last, length, C, C, BLOCK)
        above = tl.sum((first > edge).to(tl.int32))
        for s0 in range(BLOCK, last, BLOCK):
            above += tl.sum((_scores_at(scores_ptr, s0 + one, length) > edge).to(tl.int32))
        missing = C - above  # how many of the scores that are equal to the edge are chosen
        # Lanes take RUN scores in a row: a scan of their sums is short. What is above the edge is
        # counted in the lower half of a number, what is equal to it in the upper.
        lane = tl.arange(0, LANES)
        done = 0
        equals = 0
        s = lane[:, None] * RUN + tl.arange(0, RUN)[None, :]
        next_score = _scores_at(scores_ptr, s, length)
        for _ in range(0, length, LANES * RUN):
            score = next_score
            next_score = _scores_at(scores_ptr, s + LANES * RUN, length)
            is_above = score > edge
            is_equal = (score == edge) & (s < length)
            found = is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16)
            of_lane = tl.sum(found, axis=1)
            before = tl.cumsum(of_lane, axis=0) - of_lane
            rank = before[:, None] + tl.cumsum(found, axis=1)
            equal_rank = equals + (rank >> 16)
            place = done + (rank & 0xFFFF) + tl.minimum(equal_rank, missing) - 1
            keep = is_above | (is_equal & (equal_rank <= missing))
            tl.store(chosen_ptr + place, s, mask=keep & (place < C))
            all_found = tl.sum(of_lane)
            done += all_found & 0xFFFF
            equals += all_found >> 16
            s += LANES * RUN
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
    cut: Tensor | None = None,
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
    cut:       of cut_scratch, for a single token: others than the best are left out before

    Reads 2 * J bytes a cached row, and its score twice by one program a token (twice more by others
    with a cut); of further rows than _CHOOSE_BLOCK without a cut once more for every two bits of
    the edge, and also in the rare case that a P-th part has far more of the best than others.
    """
    assert cut is None or len(query) == 1
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
        None,
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
    parts = room = 0
    counts = kept = None
    block = _CHOOSE_BLOCK
    if cut is not None:
        block = _CHOOSE_CUT_BLOCK
        parts = triton.cdiv(columns, _CUT_BLOCK)
        room = block // parts
        edges, counts, kept = cut.split((parts, parts, parts * room))
        assert parts <= _CUT_BLOCK
        sizes = {"R": ratio, "BLOCK": _CUT_BLOCK, "FROM": max(block, count)}
        options = sizes | {"num_warps": 4} | early_start(query)
        _edges_kernel[(parts,)](scores, position, edges, None, C=count, **options)
        _keep_kernel[(parts,)](scores, position, edges, counts, kept, room, None, **options)
    _choose_rows_kernel[(tokens,)](
        scores,
        position,
        chosen,
        columns,
        counts,
        kept,
        parts,
        room,
        None,
        C=count,
        R=ratio,
        BLOCK=block,
        MOST_PARTS=_CUT_BLOCK,
        LANES=32 * _CHOOSE_WARPS,
        RUN=_CHOOSE_RUN,
        num_warps=_CHOOSE_WARPS,
        **early_start(query),
    )
    return chosen


def cut_scratch(columns: int, device: torch.device) -> Tensor | None:
    """Scratch for index_choose's cut among so many rows; None where a cut would save nothing."""
    if columns <= _CHOOSE_BLOCK:
        return None
    parts = triton.cdiv(columns, _CUT_BLOCK)
    size = 2 * parts + _CHOOSE_CUT_BLOCK // parts * parts
    return torch.empty(size, dtype=torch.int32, device=device)
