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


@gluon.jit
def _cached(ptr, slot, count, slots, half: gl.constexpr, WIDTH: gl.constexpr, L: gl.constexpr,
            C: gl.constexpr):  # fmt: skip
    """Rows [128, WIDTH] of the ring from a slot on; zeros from row `count` on."""
    i = gl.arange(0, 128, layout=gl.SliceLayout(1, L))
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L))
    at = slot + i
    at = gl.where(at >= slots, at - slots, at)
    mask = (i < count)[:, None] & (c >= 0)[None, :]
    return gl.load(ptr + at[:, None] * C + (half * WIDTH + c)[None, :], mask=mask, other=0.0)


@gluon.jit
def _cached_block(k_ptr, v_ptr, slot, count, slots, C: gl.constexpr):
    """Keys (in two halves) and values of up to 128 positions."""
    KL: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [8, 1], [1, 0])
    VL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    k_lo = _cached(k_ptr, slot, count, slots, 0, C // 2, KL, C)
    k_hi = _cached(k_ptr, slot, count, slots, 1, C // 2, KL, C)
    return k_lo, k_hi, _cached(v_ptr, slot, count, slots, 0, C, VL, C)


@gluon.jit
def _as_operands(k_lo, k_hi, v):
    """A block as the tensor cores take it."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 8], [16, 8])
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    k_lo = gl.convert_layout(k_lo.permute([1, 0]), B)
    k_hi = gl.convert_layout(k_hi.permute([1, 0]), B)
    return k_lo, k_hi, gl.convert_layout(v, B)


@gluon.jit
def _row_max(scores):
    """Largest of each row of [16, 128]. A warp has columns 8 w to 8 w + 7 of both halves; each
    writes its own largest, and every thread reads those of its rows."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 8], [16, 8])
    BY_ROW: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        [[0, 0], [0, 0], [0, 0]], [], [16, 8],
    )  # fmt: skip
    of_warps = gl.max(gl.max(scores.reshape([16, 2, 8, 8]), 3), 1)
    found = gl.max(gl.convert_layout(of_warps, BY_ROW), 1)
    return gl.convert_layout(found, gl.SliceLayout(1, MMA), assert_trivial=True)


@gluon.jit
def _attend_block(q_lo, q_hi, k_lo, k_hi, v, begin, end, biggest, total, acc, factor: gl.constexpr):
    """128 cached positions more."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 8], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    scores = gl.zeros([16, 128], gl.float32, layout=MMA)
    scores = mma_v2(q_lo, k_lo, scores)
    scores = mma_v2(q_hi, k_hi, scores) * factor
    there = (begin + gl.arange(0, 128, layout=gl.SliceLayout(0, MMA)) < end)[None, :]
    scores = gl.where(there, scores, NONE)
    new = gl.maximum(biggest, _row_max(scores))
    p = gl.where(there, gl.exp(scores - new[:, None]), 0.0)
    shrink = gl.exp(biggest - new)
    p = gl.convert_layout(p.to(gl.bfloat16), A)
    acc = mma_v2(p, v, acc * shrink[:, None])
    # The tensor cores add up the row too: eight columns of the same, in every warp.
    ones = gl.full([128, 8], 1.0, gl.bfloat16, layout=gl.DotOperandLayout(1, MMA, 2))
    sums = mma_v2(p, ones, gl.zeros([16, 8], gl.float32, layout=MMA))
    return new, total * shrink + gl.max(sums, 1), acc


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
    layer, kv_head, position, tag, squares, qkv, qkv_scale, qkv_bias, cos, sin, qs,
    trace, S: gl.constexpr,
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
    qs.slice(0, C // 2, dim=1).store(gl.where(turned, lo * cosine - hi * sine, lo).to(gl.bfloat16))
    qs.slice(C // 2, C // 2, dim=1).store(
        gl.where(turned, hi * cosine + lo * sine, hi).to(gl.bfloat16)
    )
    wait_for_warps()


@gluon.jit
def attend(
    layer, kv_head, split, used, per, position, first, tag, squares, qkv, parts,
    attention, qkv_scale, qkv_bias, sinks, cos, sin, k_cache, v_cache, slots, qs, trace,
    S: gl.constexpr,
):  # fmt: skip
    """One kv head's share of the cache: rotate, write the new row, attend, publish; and the share
    of all programs of the head in what several have attended to.

    split, used: this program's place among those of the head, and how many of them attend,
                 each to `per` positions
    """
    if split < used:
        _attend_part(
            layer, kv_head, split, used, per, position, first, tag, squares, qkv,
            parts, attention, qkv_scale, qkv_bias, sinks, cos, sin, k_cache, v_cache, slots, qs,
            trace, S,
        )  # fmt: skip
    else:
        stamp(trace, layer, ATTENTION, READY, True, S)
    if used > 1:
        _merge(layer, kv_head, split, used, tag, parts, attention, sinks, S)


@gluon.jit
def _attend_part(
    layer, kv_head, split, used, per, position, first, tag, squares, qkv, parts,
    attention, qkv_scale, qkv_bias, sinks, cos, sin, k_cache, v_cache, slots, qs, trace,
    S: gl.constexpr,
):  # fmt: skip
    """A part of a kv head's cache; the first program of the head also writes the new row."""
    C: gl.constexpr = S.head_width
    R: gl.constexpr = S.heads_per_kv
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 8], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    L: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [8, 1], [1, 0])
    begin = first + split * per
    end = gl.minimum(begin + per, position)
    k_at = k_cache + kv_head * slots * C
    v_at = v_cache + kv_head * slots * C
    half = gl.arange(0, C // 2, layout=gl.SliceLayout(0, L))
    column = gl.arange(0, C, layout=gl.SliceLayout(0, MMA))
    scale: gl.constexpr = C**-0.5
    biggest = gl.full([16], NONE, gl.float32, layout=gl.SliceLayout(1, MMA))
    total = gl.zeros([16], gl.float32, layout=gl.SliceLayout(1, MMA))
    acc = gl.zeros([16, C], gl.float32, layout=MMA)
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, MMA))
    sink = gl.load(sinks + layer * S.heads + kv_head * R + row % R).to(gl.float32)
    # Earlier tokens' rows are asked for before this one's is waited for.
    slot = begin % slots
    own_slot = (position % slots) * C
    k_lo, k_hi, v = _cached_block(k_at, v_at, slot, end - begin, slots, C)
    k_lo, k_hi, v = _as_operands(k_lo, k_hi, v)
    _turn(
        layer, kv_head, position, tag, squares, qkv, qkv_scale, qkv_bias, cos, sin,
        qs, trace, S,
    )  # fmt: skip
    rows = seen_as(qs, gl.bfloat16, [32, C // 2], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    whole = seen_as(qs, gl.bfloat16, [16, C], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    q_lo = qs.slice(0, C // 2, dim=1).load(A)
    q_hi = qs.slice(C // 2, C // 2, dim=1).load(A)
    if split == 0:
        # The token's own key, eight times: every warp has its scores, no warp needs another's.
        none = gl.zeros([C // 2, 8], gl.bfloat16, layout=B)
        own_lo = rows.index(2 * R).load(gl.SliceLayout(1, B))[:, None] + none
        own_hi = rows.index(2 * R + 1).load(gl.SliceLayout(1, B))[:, None] + none
        own = mma_v2(q_lo, own_lo, gl.zeros([16, 8], gl.float32, layout=MMA))
        biggest = gl.max(mma_v2(q_hi, own_hi, own), 1) * scale
        total = total + 1.0
        acc = acc + whole.index(R + 1).load(gl.SliceLayout(0, MMA)).to(gl.float32)[None, :]
    s = begin
    more = True
    while more:
        more = s + 128 < end
        slot += 128
        slot = gl.where(slot >= slots, slot - slots, slot)
        next_lo, next_hi, next_v = _cached_block(k_at, v_at, slot, end - s - 128, slots, C)
        q_lo = qs.slice(0, C // 2, dim=1).load(A)  # again: registers are scarcer than time
        q_hi = qs.slice(C // 2, C // 2, dim=1).load(A)
        biggest, total, acc = _attend_block(
            q_lo, q_hi, k_lo, k_hi, v, s, end, biggest, total, acc, scale
        )
        if more:
            k_lo, k_hi, v = _as_operands(next_lo, next_hi, next_v)
        s += 128
    if used == 1:
        new = gl.maximum(biggest, sink)
        shrink = gl.exp(biggest - new)
        out = acc * (shrink / (total * shrink + gl.exp(sink - new)))[:, None]
        at = attention + ((kv_head * R + row)[:, None] * C + column[None, :])
        publish(at, out, tag, (row < R)[:, None] & (column >= 0)[None, :])
    else:
        accs, peaks, totals = parts
        part = (kv_head * S.splits + split) * R + row
        at = accs + (part[:, None] * C + column[None, :])
        publish(at, acc, tag, (row < R)[:, None] & (column >= 0)[None, :])
        publish(peaks + part, biggest, tag, row < R)
        publish(totals + part, total, tag, row < R)
    if split == 0:  # for the tokens behind this one; nobody waits for it
        first_half = k_at + own_slot + half
        gl.store(first_half, rows.index(2 * R).load(gl.SliceLayout(0, L)))
        gl.store(first_half + C // 2, rows.index(2 * R + 1).load(gl.SliceLayout(0, L)))
        gl.store(v_at + own_slot + column, whole.index(R + 1).load(gl.SliceLayout(0, MMA)))


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
