"""Attention of one token over the cache: a program or several for each kv head.

What a program has seen of a softmax is its largest score, the sum of exponentials and the weighted
sum of values. Where the cache is split, programs publish these three, and each merges a part of the
outputs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kernels.persistent.exchange import publish, wait_for_tagged, wait_for_two_sums
from kernels.persistent.gluon_names import seen_as, wait_for_warps
from kernels.persistent.stamps import ATTENTION, READY, stamp

NONE = gl.constexpr(-1e30)

# A block is 128 cached positions, 16 a warp: every warp has a softmax of its own, and tensors have
# the warps in front. A thread loads pieces of 16 bytes of rows. Of keys, that is what the tensor
# cores take: they may add up columns in any order if the queries' is the same. Values' columns may
# come in any order too.
MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [8, 1, 1], [1, 16, 8]))
QUERIES = gl.constexpr(gl.DotOperandLayout(0, MMA, 2))
KEYS = gl.constexpr(gl.DotOperandLayout(1, MMA, 2))
VALUES = gl.constexpr(gl.DotOperandLayout(0, MMA, 2))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(1, MMA, 2))
_WARPS = [[1, 0, 0], [2, 0, 0], [4, 0, 0]]
# Words of two columns, [8, 16 positions, 32]. Lane 4 g + t has of keys pieces t and t + 4 of
# positions g and g + 8; of values piece g of positions 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
KEY_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 16], [0, 8, 0]],
        [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]], _WARPS, [], [8, 16, 32],
    )
)  # fmt: skip
VALUE_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 8, 0]],
        [[0, 2, 0], [0, 4, 0], [0, 0, 4], [0, 0, 8], [0, 0, 16]], _WARPS, [], [8, 16, 32],
    )
)  # fmt: skip


# Eight heads of queries [8, 64]: pieces t and t + 4 of row g.
HEADS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[0, 0], [0, 0], [0, 0]], [], [8, 64],
    )
)  # fmt: skip
# [8, 8 heads, 16 positions], as the tensor cores have the first 8 of 16 rows.
SCORES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 8]], [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]], _WARPS, [],
        [8, 8, 16],
    )
)  # fmt: skip
# [8, 8 heads, columns]: a warp has one head of all eight.
ALL_WARPS = gl.constexpr(gl.BlockedLayout([8, 1, 2], [1, 1, 32], [1, 8, 1], [2, 1, 0]))
# $0, $1: lower and upper halves of two words.
PAIRS = gl.constexpr("prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;")
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _rows(ptr, slot, count, slots, before, C: gl.constexpr, L: gl.constexpr):
    """Words of the rows of 128 positions of the ring from a slot on; of the last of `count` again
    behind it. If `count` is not above zero: what was there before."""
    W: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L))
    I: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, L))
    i = gl.arange(0, 8, layout=W)[:, None, None] * 16 + gl.arange(0, 16, layout=I)[None, :, None]
    c = gl.arange(0, C // 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    at = slot + gl.minimum(i, count - 1)
    at = gl.minimum(at.to(gl.uint32), (at - slots).to(gl.uint32))  # below zero is far above
    words = ptr.to(gl.pointer_type(gl.int32), bitcast=True) + c
    there = (i >= 0) & (c >= 0) & (count > 0)
    return gl.load(words + at.to(gl.int32).to(gl.int64) * (C // 2), mask=there, other=before)


@gluon.jit
def _bf16(words):
    """Words [..] as two numbers each, [.., 2]."""
    first = (words & 0xFFFF).to(gl.int16).to(gl.bfloat16, bitcast=True)
    return gl.join(first, (words >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True))


@gluon.jit
def _queries(qs, C: gl.constexpr):
    """Eight queries as an operand [8, 16, C / 2]: the first halves of their pieces in rows 0 to 7,
    the second halves in rows 8 to 15."""
    # [row, 32 columns, piece, half, word of it, column of that]: words are in front of pieces then
    q = qs.slice(0, 8).load(HEADS).reshape([8, C // 32, 4, 2, 2, 2])
    q = q.permute([3, 0, 1, 4, 2, 5]).reshape([16, C // 2])
    q = gl.convert_layout(q, gl.SliceLayout(0, QUERIES), assert_trivial=True)[None, :, :]
    return gl.broadcast(q, gl.zeros([8, 16, C // 2], gl.bfloat16, layout=QUERIES))[0]


@gluon.jit
def _half_of_keys(words, C: gl.constexpr):
    """Words [8, 16, 32 columns, word of half a piece, piece] as an operand [8, C / 2, 16]."""
    k = _bf16(words).reshape([8, 16, C // 2]).permute([0, 2, 1])
    return gl.convert_layout(k, KEYS, assert_trivial=True)


@gluon.jit
def _scores(q, words, C: gl.constexpr):
    """Scores [8, 8, 16], as powers of two, of the queries and a block's keys."""
    words = words.reshape([8, 16, C // 32, 4, 2, 2]).permute([0, 1, 2, 5, 3, 4])
    words, others = gl.split(words)
    zero = gl.zeros([8, 16, 16], gl.float32, layout=MMA)
    first = mma_v2(q, _half_of_keys(words, C), zero)
    second = mma_v2(q, _half_of_keys(others, C), zero)
    first, _ = gl.split(first.reshape([8, 2, 8, 16]).permute([0, 2, 3, 1]))
    _, second = gl.split(second.reshape([8, 2, 8, 16]).permute([0, 2, 3, 1]))
    return gl.convert_layout(first + second, SCORES, assert_trivial=True) * (C**-0.5 * LOG2_E)


@gluon.jit
def _weights(scores, left, biggest):
    """Of a block's scores, of which `left` positions are there: exponentials [8, 8, 16], the
    biggest scores so far [8, 8], and what makes up for the change of these."""
    W: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, SCORES))
    I: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, SCORES))
    i = gl.arange(0, 8, layout=W)[:, None, None] * 16 + gl.arange(0, 16, layout=I)[None, None, :]
    scores = gl.where(i < left, scores, NONE)
    new = gl.maximum(biggest, gl.max(scores, 2))
    return gl.exp2(scores - new[:, :, None]), new, gl.exp2(biggest - new)


@gluon.jit
def _sum_values(v, p, shrink, acc):
    """acc * shrink + values [8, C, 16] * p: [8, C, 8], columns in another order."""
    p = gl.convert_layout(p.to(gl.bfloat16).permute([0, 2, 1]), WEIGHTS, assert_trivial=True)
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, MMA))
    return mma_v2(v, p, acc * shrink[:, None, :])


@gluon.jit
def _values(words, C: gl.constexpr):
    """Words of values as an operand [8, C, 16]: column 8 g + j stands in row 8 j + g."""
    W: gl.constexpr = C // 2
    even, odd = gl.split(words.reshape([8, 8, 2, W]).permute([0, 1, 3, 2]))  # positions
    first, second = gl.inline_asm_elementwise(
        PAIRS, "=&r,=r,r,r", [even, odd], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
    )
    # [8, pair, piece, word of it, column of that, position] to [8, word, column, piece, pair, ..]
    v = _bf16(gl.join(first, second)).reshape([8, 8, 8, W // 8, 2, 2])
    v = v.permute([0, 3, 4, 2, 1, 5]).reshape([8, C, 16])
    return gl.convert_layout(v, VALUES, assert_trivial=True)


@gluon.jit
def _own_score(qs, there, C: gl.constexpr, R: gl.constexpr):
    """Scores [8], as powers of two, of the queries and the token's own key, if it is `there`."""
    OUT: gl.constexpr = gl.SliceLayout(0, ALL_WARPS)
    q = qs.slice(0, 8).load(OUT).to(gl.float32)
    score = gl.sum(q * qs.slice(R, 1).load(OUT).to(gl.float32), 1)
    return gl.where(there, score * (C**-0.5 * LOG2_E), NONE)


@gluon.jit
def _over_warps(biggest, total, acc, own, own_value, spare, S: gl.constexpr):
    """The warps' parts and the token's own row as one: biggest score and sum [8], weighted sum of
    values [8, C]."""
    C: gl.constexpr = S.head_width
    BY_HEAD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0, 1])
    PEAKS: gl.constexpr = gl.SliceLayout(2, ALL_WARPS)
    OUT: gl.constexpr = gl.SliceLayout(0, ALL_WARPS)
    large, small, other = spare
    BY_WARP: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, order=[2, 1, 0])
    N: gl.constexpr = S.all_slots * S.tiles.boxes[0] * 256 // (256 * C)
    accs = seen_as(large, gl.float32, [N, 8, 8, C], BY_WARP).index(N - 1)
    M: gl.constexpr = S.all_slots * S.tiles.boxes[1]
    peaks = seen_as(small, gl.float32, [M, 8, 8], BY_HEAD).index(M - 1)
    totals = seen_as(other, gl.float32, [1, 8, 8], BY_HEAD).index(0)
    peaks.store(biggest)
    totals.store(gl.sum(total, 2))
    accs.store(acc.reshape([8, C // 8, 8, 8]).permute([0, 3, 2, 1]).reshape([8, 8, C]))
    wait_for_warps()
    peak = peaks.load(PEAKS)
    own = gl.convert_layout(own, gl.SliceLayout(0, PEAKS), assert_trivial=True)
    biggest = gl.maximum(gl.max(peak, 0), own)
    grow = gl.exp2(peak - biggest[None, :])
    grow_own = gl.exp2(own - biggest)
    total = gl.sum(totals.load(PEAKS) * grow, 0) + grow_own
    acc = gl.sum(accs.load(ALL_WARPS) * grow[:, :, None], 0)
    grow_own = gl.convert_layout(grow_own, gl.SliceLayout(1, OUT), assert_trivial=True)
    acc += grow_own[:, None] * own_value.load(OUT).to(gl.float32)
    biggest = gl.convert_layout(biggest, gl.SliceLayout(1, OUT), assert_trivial=True)
    return biggest, gl.convert_layout(total, gl.SliceLayout(1, OUT), assert_trivial=True), acc


@gluon.jit
def _qkv_places(kv_head, S: gl.constexpr):
    """Rows of the qkv projection that a kv head's programs read, [16, C / 2]: the first halves of
    its query heads, of its key and of its value; the second halves are C / 2 further on."""
    C: gl.constexpr = S.head_width
    R: gl.constexpr = S.heads_per_kv
    L: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [8, 1], [1, 0])
    r = gl.arange(0, 16, layout=gl.SliceLayout(1, L))
    head = gl.where(r < R, kv_head * R + r, S.heads + kv_head + gl.where(r == R, 0, S.kv_heads))
    return r, head[:, None] * C + gl.arange(0, C // 2, layout=gl.SliceLayout(0, L))[None, :]


@gluon.jit
def _turn(
    layer, kv_head, position, tag, squares, qkv, qkv_scale, qkv_bias, cos, sin, qs, trace,
    S: gl.constexpr,
):  # fmt: skip
    """Wait for a kv head's queries, key and value; finish and rotate them; rows of qs, in bf16."""
    C: gl.constexpr = S.head_width
    L: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [8, 1], [1, 0])
    half = gl.arange(0, C // 2, layout=gl.SliceLayout(0, L))
    cosine = gl.load(cos + position * (C // 2) + half)[None, :]
    sine = gl.load(sin + position * (C // 2) + half)[None, :]
    r, place = _qkv_places(kv_head, S)
    bias_lo = gl.load(qkv_bias + layer * S.qkv_rows + place).to(gl.float32)
    bias_hi = gl.load(qkv_bias + layer * S.qkv_rows + place + C // 2).to(gl.float32)
    if S.fp8:
        scale_lo = gl.load(qkv_scale + layer * S.qkv_rows + place)
        scale_hi = gl.load(qkv_scale + layer * S.qkv_rows + place + C // 2)
    # The norm's factor, from the squares of the residual.
    PARTS: gl.constexpr = 128 if S.norm_groups <= 128 else 256
    EACH: gl.constexpr = gl.BlockedLayout([PARTS // 32], [32], [8], [0])  # in every warp
    groups = gl.arange(0, PARTS, layout=EACH)
    found = wait_for_tagged(squares + gl.minimum(groups, S.norm_groups - 1), tag, 4)
    factor = gl.rsqrt(gl.sum(gl.where(groups < S.norm_groups, found, 0.0), 0) / S.width + S.eps)
    at = qkv + place
    lo, hi = wait_for_two_sums(at, at + C // 2, S.width_columns)
    stamp(trace, layer, ATTENTION, READY, True, S)
    if S.fp8:
        lo = lo * (factor * scale_lo) + bias_lo
        hi = hi * (factor * scale_hi) + bias_hi
    else:
        lo = lo * factor + bias_lo
        hi = hi * factor + bias_hi
    turned = (r <= S.heads_per_kv)[:, None]
    row = gl.join(
        gl.where(turned, lo * cosine - hi * sine, lo), gl.where(turned, hi * cosine + lo * sine, hi)
    )  # stored at once: the compiler puts a barrier between two stores
    qs.store(row.permute([0, 2, 1]).reshape([16, C]).to(gl.bfloat16))
    wait_for_warps()


@gluon.jit
def attend(
    layer, kv_head, split, used, per, position, first, tag, squares, qkv, parts, attention,
    qkv_scale, qkv_bias, sinks, cos, sin, k_cache, v_cache, slots, qs, spare, trace,
    S: gl.constexpr,
):  # fmt: skip
    """One kv head's share of the cache: rotate, write the new row, attend, publish; and the share
    of all programs of the head in what several have attended to.

    split, used: this program's place among those of the head, and how many of them attend,
                 each to `per` positions
    spare: three pieces of shared memory whose ends nobody needs meanwhile
    """
    if split < used:
        _attend_part(
            layer, kv_head, split, used, per, position, first, tag, squares, qkv, parts, attention,
            qkv_scale, qkv_bias, sinks, cos, sin, k_cache, v_cache, slots, qs, spare, trace, S,
        )  # fmt: skip
    else:
        stamp(trace, layer, ATTENTION, READY, True, S)
    if used > 1:
        _merge(layer, kv_head, split, used, tag, parts, attention, sinks, S)


@gluon.jit
def _attend_part(
    layer, kv_head, split, used, per, position, first, tag, squares, qkv, parts, attention,
    qkv_scale, qkv_bias, sinks, cos, sin, k_cache, v_cache, slots, qs, spare, trace,
    S: gl.constexpr,
):  # fmt: skip
    """A part of a kv head's cache; the first program of the head also writes the new row."""
    C: gl.constexpr = S.head_width
    R: gl.constexpr = S.heads_per_kv
    OUT: gl.constexpr = gl.SliceLayout(0, ALL_WARPS)
    ROW: gl.constexpr = gl.BlockedLayout([2], [32], [8], [0])
    begin = first + split * per
    end = gl.minimum(begin + per, position)
    k_at = k_cache + kv_head * slots * C
    v_at = v_cache + kv_head * slots * C
    row = gl.arange(0, 8, layout=gl.SliceLayout(1, OUT))
    column = gl.arange(0, C, layout=gl.SliceLayout(0, OUT))
    sink = gl.load(sinks + layer * S.heads + kv_head * R + row % R).to(gl.float32)
    # Earlier tokens' rows are asked for before this one's is waited for.
    slot = begin % slots
    own_slot = slot + position - begin
    own_slot = gl.where(own_slot >= slots, own_slot - slots, own_slot)
    left = end - begin
    k = gl.zeros([8, 16, C // 2], gl.int32, layout=KEY_WORDS)
    v = gl.zeros([8, 16, C // 2], gl.int32, layout=VALUE_WORDS)
    k = _rows(k_at, slot, left, slots, k, C, KEY_WORDS)
    v = _rows(v_at, slot, left, slots, v, C, VALUE_WORDS)
    _turn(
        layer, kv_head, position, tag, squares, qkv, qkv_scale, qkv_bias, cos, sin, qs, trace, S,
    )  # fmt: skip
    q = _queries(qs, C)
    scores = _scores(q, k, C)
    own = _own_score(qs, split == 0, C, R)
    biggest = gl.full([8, 8], NONE, gl.float32, layout=gl.SliceLayout(2, SCORES))
    total = gl.zeros([8, 8, 16], gl.float32, layout=SCORES)
    acc = gl.zeros([8, C, 8], gl.float32, layout=MMA)
    while left > 0:
        slot += 128
        slot = gl.where(slot >= slots, slot - slots, slot)
        values = _values(v, C)
        k = _rows(k_at, slot, left - 128, slots, k, C, KEY_WORDS)
        v = _rows(v_at, slot, left - 128, slots, v, C, VALUE_WORDS)
        p, biggest, shrink = _weights(scores, left, biggest)
        total = total * shrink[:, :, None] + p
        acc = _sum_values(values, p, shrink, acc)
        left -= 128
        if left > 0:
            scores = _scores(q, k, C)
    biggest, total, acc = _over_warps(biggest, total, acc, own, qs.slice(R + 1, 1), spare, S)
    there = (row < R)[:, None] & (column >= 0)[None, :]
    if used == 1:
        out = acc * (1.0 / (total + gl.exp2(sink * LOG2_E - biggest)))[:, None]
        publish(attention + ((kv_head * R + row)[:, None] * C + column[None, :]), out, tag, there)
    else:
        accs, peaks, totals = parts
        part = (kv_head * S.splits + split) * R + row
        publish(accs + (part[:, None] * C + column[None, :]), acc, tag, there)
        publish(peaks + part, biggest * (1.0 / LOG2_E), tag, row < R)
        publish(totals + part, total, tag, row < R)
    if split == 0:  # for the tokens behind this one; nobody waits for it
        at = own_slot * C + gl.arange(0, C, layout=ROW)
        rows = seen_as(qs, gl.bfloat16, [16, C], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
        gl.store(k_at + at, rows.index(R).load(ROW))
        gl.store(v_at + at, rows.index(R + 1).load(ROW))


@gluon.jit
def _merge(layer, kv_head, split, used, tag, parts, attention, sinks, S: gl.constexpr):
    """A program's share of its kv head's outputs, from what `used` programs published."""
    C: gl.constexpr = S.head_width
    R: gl.constexpr = S.heads_per_kv
    MINE: gl.constexpr = R * C // S.splits
    L: gl.constexpr = gl.BlockedLayout([2, 1], [8, 4], [1, 8], [0, 1])
    accs, peaks, totals = parts
    e = split * MINE + gl.arange(0, MINE, layout=gl.SliceLayout(0, L))
    s = gl.arange(0, S.splits, layout=gl.SliceLayout(1, L))
    s_used = gl.minimum(s, used - 1)
    part = (kv_head * S.splits + s_used)[:, None] * R + (e // C)[None, :]
    acc = wait_for_tagged(accs + part * C + (e % C)[None, :], tag, 2)
    peak = wait_for_tagged(peaks + part, tag, 2)
    total = wait_for_tagged(totals + part, tag, 2)
    peak = gl.where((s < used)[:, None] & (e >= 0)[None, :], peak, NONE)
    head = kv_head * R + e // C
    sink = gl.load(sinks + layer * S.heads + head).to(gl.float32)
    biggest = gl.maximum(gl.max(peak, 0), sink)
    grow = gl.exp(peak - biggest[None, :])
    out = gl.sum(acc * grow, 0) / (gl.sum(total * grow, 0) + gl.exp(sink - biggest))
    publish(attention + kv_head * R * C + e, out, tag, e >= 0)
