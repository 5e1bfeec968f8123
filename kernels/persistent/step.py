"""The decode step of GPT-OSS as one kernel: from the token's embedding to its logits.

One program a processor. In each, a warp for the ring of dense weights and one for the ring of
experts' weights let the copy engine fill slots; they run ahead of the arithmetic over all phases,
the dense one without end, the other from the moment the routing is known. `consumers` warpgroups
take tiles in turn, multiply, and add rows to sums in memory (exchange.py).

    phase    reads                         multiplies          adds to
    qkv      residual, its norm weight     dense tiles         qkv sums
    attend   qkv sums, cache               (few programs)      attention [tagged]
    out      attention                     dense tiles         residual
    router   residual, its norm weight     (few programs)      router sums
    gate_up  residual, router sums         4-bit tiles         gate_up sums
    down     gate_up sums                  4-bit tiles         residual
    head     residual                      dense tiles         logits (stored)

The norm's factor is one number for all rows: it multiplies what was summed, when that is read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from kernels.persistent.exchange import (
    add_to_sums,
    publish,
    sum_of,
    wait_for_sums,
    wait_for_tagged,
)
from kernels.persistent.multiply import (
    dense_tile,
    expert_tile,
    power_of_two_for,
    row_sums,
    store_bf16_terms,
    store_fp8_terms,
)

NONE = gl.constexpr(-1e30)
SAME = gl.constexpr("mov.b32 $0, $1;")
EVENTS = gl.constexpr(20)


@gluon.jit
def stamp(trace, which: gl.constexpr, layer, event: gl.constexpr, S: gl.constexpr):
    """Write the time in ns to trace [programs, consumers, layers, EVENTS]."""
    if trace is not None:
        now = gl.inline_asm_elementwise("mov.u64 $0, %globaltimer; // $1", "=l,r", [layer], dtype=gl.int64, is_pure=False, pack=1)
        place = ((gl.program_id(0) * S.consumers + which) * S.layers + layer) * EVENTS + event
        gl.store(trace + place, now)


@gluon.jit
def share(tiles, program, S: gl.constexpr):
    """First and last + 1 of a program's tiles."""
    return (tiles * program) // S.programs, (tiles * (program + 1)) // S.programs


@gluon.jit
def anew(x):
    """x, in a way that keeps what is made of it inside a loop: registers are scarcer than time."""
    return gl.inline_asm_elementwise(SAME, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


# ------------------------------------------------------------------------------------ producers
@gluon.jit
def _load_dense(desc32, desc8, tile, big, small, full, slot, S: gl.constexpr):
    bar = full.index(slot)
    at = tile * S.dense_rows
    mbarrier.expect(bar, S.dense_rows * 256)
    if S.fp8:
        tma.async_copy_global_to_shared(desc32, [at, 0], bar, big.index(slot))
        tma.async_copy_global_to_shared(desc8, [at + 32, 0], bar, small.index(slot))
    else:
        tma.async_copy_global_to_shared(desc32, [at, 0], bar, big.index(slot * 2))
        tma.async_copy_global_to_shared(desc32, [at + 32, 0], bar, big.index(slot * 2 + 1))
        tma.async_copy_global_to_shared(desc8, [at + 64, 0], bar, small.index(slot * 2))
        tma.async_copy_global_to_shared(desc8, [at + 72, 0], bar, small.index(slot * 2 + 1))


@gluon.jit
def _dense_line(desc32, desc8, base, first, last, n, big, small, full, empty, S: gl.constexpr):
    """Load tiles [first, last) of a line that begins at tile base; n counts the ring's tiles."""
    i = first
    while i < last:
        slot = n % S.dense_slots
        mbarrier.wait(empty.index(slot), ((n // S.dense_slots) & 1) ^ 1)
        _load_dense(desc32, desc8, base + i, big, small, full, slot, S)
        i += 1
        n += 1
    return n


@gluon.jit
def dense_producer(desc32, desc8, big, small, full, empty, S: gl.constexpr):
    """One warp: every dense tile of this program, in the order in which they are multiplied."""
    program = gl.program_id(0)
    qkv0, qkv1 = share(S.qkv_tiles, program, S)
    out0, out1 = share(S.out_tiles, program, S)
    n = 0
    for layer in range(S.layers):
        base = layer * S.layer_tiles
        n = _dense_line(desc32, desc8, base, qkv0, qkv1, n, big, small, full, empty, S)
        n = _dense_line(desc32, desc8, base + S.qkv_tiles, out0, out1, n, big, small, full, empty, S)
    CONSUMERS: gl.constexpr = S.consumers
    first, last = share(S.head_blocks, program, S)
    base = S.layers * S.layer_tiles
    block = first
    while block < last:  # the consumers' blocks of rows side by side
        for column in range(S.width_columns):
            for c in gl.static_range(CONSUMERS):
                if block + c < last:
                    slot = n % S.dense_slots
                    mbarrier.wait(empty.index(slot), ((n // S.dense_slots) & 1) ^ 1)
                    tile = base + (block + c) * S.width_columns + column
                    _load_dense(desc32, desc8, tile, big, small, full, slot, S)
                n += 1
        block += S.consumers


@gluon.jit
def _expert_line(desc32, desc8, desc4, expert_base, ids, tiles: gl.constexpr, offset: gl.constexpr, n, big, small, scales, full, empty, S: gl.constexpr):
    """Load this program's tiles of a phase of the chosen experts."""
    i, last = share(S.top_k * tiles, gl.program_id(0), S)
    while i < last:
        slot = n % S.expert_slots
        mbarrier.wait(empty.index(slot), ((n // S.expert_slots) & 1) ^ 1)
        place = i // tiles
        expert = gl.where(place == 0, ids[0], gl.where(place == 1, ids[1], gl.where(place == 2, ids[2], ids[3])))
        at = ((expert_base + expert) * S.expert_tiles + offset + i - place * tiles) * S.expert_rows
        bar = full.index(slot)
        mbarrier.expect(bar, (32 + 8 + 4) * 256)
        tma.async_copy_global_to_shared(desc32, [at, 0], bar, big.index(slot))
        tma.async_copy_global_to_shared(desc8, [at + 32, 0], bar, small.index(slot))
        tma.async_copy_global_to_shared(desc4, [at + 40, 0], bar, scales.index(slot))
        i += 1
        n += 1
    return n


@gluon.jit
def expert_producer(desc32, desc8, desc4, big, small, scales, full, empty, chosen, routed, S: gl.constexpr):
    """One warp: the tiles of the experts of each layer, once the routing is known."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    n = 0
    for layer in range(S.layers):
        mbarrier.wait(routed.index(0), layer & 1)
        e0 = gl.sum(chosen.index(0).load(ONE), 0)
        e1 = gl.sum(chosen.index(1).load(ONE), 0)
        e2 = gl.sum(chosen.index(2).load(ONE), 0)
        e3 = gl.sum(chosen.index(3).load(ONE), 0)
        base = layer * S.experts
        ids = (e0, e1, e2, e3)
        n = _expert_line(desc32, desc8, desc4, base, ids, S.gate_up_tiles, 0, n, big, small, scales, full, empty, S)
        n = _expert_line(desc32, desc8, desc4, base, ids, S.down_tiles, S.gate_up_tiles, n, big, small, scales, full, empty, S)


# ------------------------------------------------------------------------- slices of the vector
@gluon.jit
def _scaled(v, GROUPS: gl.constexpr):
    """v times a power of two that E4M3 holds, and the inverse of that."""
    scale, unscale = power_of_two_for(gl.max(gl.max(gl.abs(v), 1), 0))
    return v * scale, unscale


@gluon.jit
def _share_slices(ready, phase, S: gl.constexpr):
    """Until the slices of all consumers of this program stand in shared memory."""
    fence_async_shared()
    bar = ready.index(phase & 1)
    mbarrier.arrive(bar, count=1)
    mbarrier.wait(bar, (phase >> 1) & 1)


@gluon.jit
def _store_dense(v, store, xscale, at, S: gl.constexpr):
    """A slice of 160 columns for dense tiles, v [8, 32] or [16, 16]."""
    SCALAR: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    if S.fp8:
        v, unscale = _scaled(v, 8)
        store_fp8_terms(v, store.index(at), 8)
        xscale.index(at).store(gl.full([1], 0.0, gl.float32, layout=SCALAR) + unscale)
    else:
        store_bf16_terms(v, store.index(at), 16)


@gluon.jit
def _dense_places(column, S: gl.constexpr):
    """Layout-bearing group and element numbers of a slice of 160 columns."""
    if S.fp8:
        L: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        g = gl.arange(0, 8, layout=gl.SliceLayout(1, L))
        i = gl.arange(0, 32, layout=gl.SliceLayout(0, L))
        inside = (g < 5)[:, None] & (i >= 0)[None, :]
        k = column * 160 + gl.minimum(g, 4)[:, None] * 32 + i[None, :]
    else:
        L: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
        g = gl.arange(0, 16, layout=gl.SliceLayout(1, L))
        i = gl.arange(0, 16, layout=gl.SliceLayout(0, L))
        inside = (g < 10)[:, None] & (i >= 0)[None, :]
        k = column * 160 + gl.minimum(g, 9)[:, None] * 16 + i[None, :]
    return g, inside, k


@gluon.jit
def _residual_slice(x_ptr, norm_ptr, count, column, S: gl.constexpr):
    """160 numbers of the residual: plain ones, weighted by the norm, and the sums of squares."""
    g, inside, k = _dense_places(column, S)
    inside = inside & (k < S.width)
    k = gl.minimum(k, S.width - 1)
    weight = gl.load(norm_ptr + k).to(gl.float32)
    zero = gl.zeros_like(k.to(gl.int64))
    x = sum_of(wait_for_sums(x_ptr + k, zero, zero + count, 2), zero)
    x = gl.where(inside, x, 0.0)
    return g, x * weight, gl.sum(x * x, 1)


@gluon.jit
def _expert_places(column):
    """Group and element numbers of a slice of 320 columns, [16, 32]."""
    L: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    g = gl.arange(0, 16, layout=gl.SliceLayout(1, L))
    i = gl.arange(0, 32, layout=gl.SliceLayout(0, L))
    inside = (g < 10)[:, None] & (i >= 0)[None, :]
    return inside, column * 320 + gl.minimum(g, 9)[:, None] * 32 + i[None, :]


# ---------------------------------------------------------------------------------- attention
@gluon.jit
def _cached(ptr, begin, end, slots, half: gl.constexpr, WIDTH: gl.constexpr, L: gl.constexpr, C: gl.constexpr):
    """Rows [128, WIDTH] of the cache from position begin on; zeros from end on."""
    s = begin + gl.arange(0, 128, layout=gl.SliceLayout(1, L))
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L))
    mask = (s < end)[:, None] & (c >= 0)[None, :]
    return gl.load(ptr + (s % slots)[:, None] * C + (half * WIDTH + c)[None, :], mask=mask, other=0.0)


@gluon.jit
def _attend_block(q_lo, q_hi, k_lo, k_hi, v, begin, end, biggest, total, acc, factor: gl.constexpr):
    """128 cached positions more."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    scores = gl.zeros([16, 128], gl.float32, layout=MMA)
    scores = mma_v2(q_lo, gl.convert_layout(k_lo.permute([1, 0]), B), scores)
    scores = mma_v2(q_hi, gl.convert_layout(k_hi.permute([1, 0]), B), scores) * factor
    there = (begin + gl.arange(0, 128, layout=gl.SliceLayout(0, MMA)) < end)[None, :]
    scores = gl.where(there, scores, NONE)
    new = gl.maximum(biggest, gl.max(scores, 1))
    p = gl.where(there, gl.exp(scores - new[:, None]), 0.0)
    shrink = gl.exp(biggest - new)
    total = total * shrink + gl.sum(p, 1)
    p = gl.convert_layout(p.to(gl.bfloat16), A)
    acc = mma_v2(p, gl.convert_layout(v, B), acc * shrink[:, None])
    return new, total, acc


@gluon.jit
def _qkv_places(kv_head, S: gl.constexpr):
    """Rows of the qkv projection that a kv head's programs read, [16, C / 2]: the first halves of
    its query heads, of its key and of its value; the second halves are C / 2 further on."""
    C: gl.constexpr = S.head_width
    R: gl.constexpr = S.heads_per_kv
    L: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    r = gl.arange(0, 16, layout=gl.SliceLayout(1, L))
    head = gl.where(r < R, kv_head * R + r, S.heads + kv_head + gl.where(r == R, 0, S.kv_heads))
    return r, head[:, None] * C + gl.arange(0, C // 2, layout=gl.SliceLayout(0, L))[None, :]


@gluon.jit
def qkv_words(sums, kv_head, S: gl.constexpr):
    """What the sums of a kv head's rows are now; all loads are under way together.

    Called between two phases that add to them: the next use begins from here.
    """
    _, place = _qkv_places(kv_head, S)
    lo = gl.load(sums + place, volatile=True)
    return lo, gl.load(sums + place + S.head_width // 2, volatile=True)


@gluon.jit
def _lacks(words, old, count, before):
    """Not zero where words do not have `count` contributions, or old words not `before`."""
    return (((words & 255) ^ count) | ((old & 255) ^ before)).to(gl.int32)


@gluon.jit
def wait_for_qkv(sums, kv_head, old_lo, old_hi, layer, S: gl.constexpr):
    """fp32 sums of a kv head's rows in this layer, before norm, scales and bias."""
    count = ((layer + 1) * S.width_columns) & 255
    before = (layer * S.width_columns) & 255
    lo, hi = qkv_words(sums, kv_head, S)
    while gl.max(gl.max(_lacks(lo, old_lo, count, before) | _lacks(hi, old_hi, count, before), 1), 0) != 0:
        lo, hi = qkv_words(sums, kv_head, S)
    return sum_of(lo, old_lo), sum_of(hi, old_hi)


@gluon.jit
def _row(x, r, which: gl.constexpr):
    """One row of x [16, n]."""
    return gl.sum(gl.where((r == which)[:, None], x, 0.0), 0)


@gluon.jit
def attend(
    old_lo, old_hi, layer, kv_head, split, used, position, first, tag, squares, qkv, parts,
    attention, qkv_scale, qkv_bias, sinks, cos, sin, k_cache, v_cache, slots, trace,
    S: gl.constexpr,
):  # fmt: skip
    """One kv head's share of the cache: rotate, write the new row, attend, publish."""
    C: gl.constexpr = S.head_width
    R: gl.constexpr = S.heads_per_kv
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    L: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    KL: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    VL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    per = gl.cdiv(position - first, used)
    begin = first + split * per
    end = gl.minimum(begin + per, position)
    k_at = k_cache + kv_head * slots * C
    v_at = v_cache + kv_head * slots * C
    # What earlier tokens left is asked for before this token's is waited for.
    k_lo = _cached(k_at, begin, end, slots, 0, C // 2, KL, C)
    k_hi = _cached(k_at, begin, end, slots, 1, C // 2, KL, C)
    v = _cached(v_at, begin, end, slots, 0, C, VL, C)
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
    EACH: gl.constexpr = gl.BlockedLayout([PARTS // 32], [32], [4], [0])  # in every warp
    groups = gl.arange(0, PARTS, layout=EACH)
    found = wait_for_tagged(squares + gl.minimum(groups, S.norm_groups - 1), tag, 4)
    factor = gl.rsqrt(gl.sum(gl.where(groups < S.norm_groups, found, 0.0), 0) / S.width + S.eps)
    lo, hi = wait_for_qkv(qkv, kv_head, old_lo, old_hi, layer, S)
    stamp(trace, 0, layer, 4, S)
    if S.fp8:
        lo = lo * (factor * scale_lo) + bias_lo
        hi = hi * (factor * scale_hi) + bias_hi
    else:
        lo = lo * factor + bias_lo
        hi = hi * factor + bias_hi
    turned = (r <= R)[:, None]
    q_lo = gl.where(turned, lo * cosine - hi * sine, lo).to(gl.bfloat16)
    q_hi = gl.where(turned, hi * cosine + lo * sine, hi).to(gl.bfloat16)
    lo = q_lo.to(gl.float32)
    hi = q_hi.to(gl.float32)
    new_lo = _row(lo, r, R)
    new_hi = _row(hi, r, R)
    value_lo = _row(lo, r, R + 1)
    value_hi = _row(hi, r, R + 1)
    scale: gl.constexpr = C**-0.5
    biggest = gl.full([16], NONE, gl.float32, layout=gl.SliceLayout(1, MMA))
    total = gl.zeros([16], gl.float32, layout=gl.SliceLayout(1, MMA))
    acc = gl.zeros([16, C], gl.float32, layout=MMA)
    if split == 0:
        slot = (position % slots) * C
        gl.store(k_at + slot + half, new_lo.to(gl.bfloat16))
        gl.store(k_at + slot + C // 2 + half, new_hi.to(gl.bfloat16))
        gl.store(v_at + slot + half, value_lo.to(gl.bfloat16))
        gl.store(v_at + slot + C // 2 + half, value_hi.to(gl.bfloat16))
        own = gl.sum(lo * new_lo[None, :] + hi * new_hi[None, :], 1) * scale
        biggest = gl.convert_layout(own, gl.SliceLayout(1, MMA))
        total = total + 1.0
        value = gl.join(value_lo, value_hi).permute([1, 0]).reshape([C])
        acc = acc + gl.convert_layout(value, gl.SliceLayout(0, MMA))[None, :]
    q_lo = gl.convert_layout(q_lo, A)
    q_hi = gl.convert_layout(q_hi, A)
    biggest, total, acc = _attend_block(
        q_lo, q_hi, k_lo, k_hi, v, begin, end, biggest, total, acc, scale
    )
    s = begin + 128
    while s < end:
        k_lo = _cached(k_at, s, end, slots, 0, C // 2, KL, C)
        k_hi = _cached(k_at, s, end, slots, 1, C // 2, KL, C)
        v = _cached(v_at, s, end, slots, 0, C, VL, C)
        biggest, total, acc = _attend_block(
            q_lo, q_hi, k_lo, k_hi, v, s, end, biggest, total, acc, scale
        )
        s += 128
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, MMA))
    column = gl.arange(0, C, layout=gl.SliceLayout(0, MMA))
    if used == 1:
        sink = gl.load(sinks + layer * S.heads + kv_head * R + row % R).to(gl.float32)
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
        _merge(layer, kv_head, split, tag, parts, attention, sinks, S)


@gluon.jit
def _merge(layer, kv_head, split, tag, parts, attention, sinks, S: gl.constexpr):
    """A split's share of its kv head's outputs, from what all splits published."""
    C: gl.constexpr = S.head_width
    R: gl.constexpr = S.heads_per_kv
    MINE: gl.constexpr = R * C // S.splits
    L: gl.constexpr = gl.BlockedLayout([4, 1], [8, 4], [1, 4], [0, 1])
    accs, peaks, totals = parts
    e = split * MINE + gl.arange(0, MINE, layout=gl.SliceLayout(0, L))
    s = gl.arange(0, S.splits, layout=gl.SliceLayout(1, L))
    part = (kv_head * S.splits + s)[:, None] * R + (e // C)[None, :]
    acc = wait_for_tagged(accs + part * C + (e % C)[None, :], tag, 4)
    peak = wait_for_tagged(peaks + part, tag, 4)
    total = wait_for_tagged(totals + part, tag, 4)
    head = kv_head * R + e // C
    sink = gl.load(sinks + layer * S.heads + head).to(gl.float32)
    biggest = gl.maximum(gl.max(peak, 0), sink)
    grow = gl.exp(peak - biggest[None, :])
    out = gl.sum(acc * grow, 0) / (gl.sum(total * grow, 0) + gl.exp(sink - biggest))
    publish(attention + kv_head * R * C + e, out, tag, e >= 0)


# -------------------------------------------------------------------------------------- router
@gluon.jit
def route_part(program, layer, x_ptr, norm_ptr, router, count, tag, sums, squares, S: gl.constexpr, E2: gl.constexpr):
    """64 columns of the router: their part of all experts' logits, and their squares."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    e = gl.arange(0, E2, layout=gl.SliceLayout(1, L))
    k = program * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, L))
    inside = k < S.width
    row = gl.minimum(e, S.experts - 1)
    w = gl.load(router + ((layer * S.router_programs + program) * S.experts + row)[:, None] * 64 + (k - program * 64)[None, :])
    k = gl.minimum(k, S.width - 1)
    weight = gl.load(norm_ptr + k).to(gl.float32)
    zero = gl.zeros_like(k.to(gl.int64))
    x = gl.where(inside, sum_of(wait_for_sums(x_ptr + k, zero, zero + count, 4), zero), 0.0)
    z = gl.sum(w.to(gl.float32) * (x * weight)[None, :], 1)
    fixed = (z * 268435456.0).to(gl.int64) * 256 + 1
    gl.atomic_add(sums + row, fixed, mask=e < S.experts, sem="relaxed", scope="gpu")
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    one = gl.arange(0, 1, layout=ONE)
    publish(squares + program + one, gl.zeros([1], gl.float32, layout=ONE) + gl.sum(x * x, 0), tag, one == 0)


@gluon.jit
def choose(layer, bias, old, tag, sums, squares, S: gl.constexpr, E2: gl.constexpr):
    """The experts of this token by falling logit, their weights, the norm's factor, new olds.

    Every warp does it alone: 128 logits are four a lane.
    """
    EACH: gl.constexpr = gl.BlockedLayout([E2 // 32], [32], [4], [0])
    Q: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    part = gl.arange(0, 64, layout=Q)
    found = wait_for_tagged(squares + gl.minimum(part, S.router_programs - 1), tag, 2)
    factor = gl.rsqrt(gl.sum(gl.where(part < S.router_programs, found, 0.0), 0) / S.width + S.eps)
    e = gl.arange(0, E2, layout=EACH)
    row = gl.minimum(e, S.experts - 1)
    add = gl.load(bias + layer * S.experts + row).to(gl.float32)
    words = wait_for_sums(sums + row, old, gl.zeros_like(old) + S.router_programs, E2 // 32)
    logits = sum_of(words, old) * factor + add
    bits = logits.to(gl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # orders as the floats do
    # NaN (weights that overflow) must not lead to an expert that does not exist.
    key = gl.where((e < S.experts) & (logits == logits), key, -2147483647)
    key = gl.where(e < S.experts, key, -2147483647 - 1)
    ids = ()
    peaks = ()
    for _ in gl.static_range(4):
        best = gl.max(key, 0)
        at = gl.min(gl.where(key == best, e, S.experts - 1), 0)
        key = gl.where(e == at, -2147483647 - 1, key)
        back = best ^ ((best >> 31) & 0x7FFFFFFF)
        ids = ids + (at,)
        peaks = peaks + (back.to(gl.float32, bitcast=True),)
    w1 = gl.exp(peaks[1] - peaks[0])
    w2 = gl.exp(peaks[2] - peaks[0])
    w3 = gl.exp(peaks[3] - peaks[0])
    all = 1.0 + w1 + w2 + w3
    return ids, (1.0 / all, w1 / all, w2 / all, w3 / all), factor, words


@gluon.jit
def pick(place, four):
    """One of four scalars."""
    return gl.where(place == 0, four[0], gl.where(place == 1, four[1], gl.where(place == 2, four[2], four[3])))


# ------------------------------------------------------------------------------------ consumers
@gluon.jit
def _begin(program, token, embedding, residual, S: gl.constexpr):
    """The token's embedding is the first contribution to the residual."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    d = program * 128 + gl.arange(0, 128, layout=L)
    row = embedding + gl.load(token).to(gl.int64) * S.width
    x = gl.load(row + d, mask=d < S.width, other=0.0).to(gl.float32)
    fixed = (x * 268435456.0).to(gl.int64) * 256 + 1
    gl.atomic_add(residual + d, fixed, mask=d < S.width, sem="relaxed", scope="gpu")


@gluon.jit
def _gate_up_slice(x_ptr, norm_ptr, count, column, S: gl.constexpr):
    """320 numbers of the residual, weighted by the norm, [16, 32]."""
    inside, k = _expert_places(column)
    inside = inside & (k < S.width)
    k = gl.minimum(k, S.width - 1)
    weight = gl.load(norm_ptr + k).to(gl.float32)
    zero = gl.zeros_like(k.to(gl.int64))
    x = sum_of(wait_for_sums(x_ptr + k, zero, zero + count, 4), zero)
    return gl.where(inside, x * weight, 0.0)


@gluon.jit
def _down_slice(sums_ptr, bias_ptr, old_gate, old_up, factor, column, S: gl.constexpr):
    """320 activations of an expert, [16, 32], and what the sums were."""
    inside, k = _expert_places(column)
    inside = inside & (k < S.hidden)
    k = gl.minimum(k, S.hidden - 1)
    gate_bias = gl.load(bias_ptr + 2 * k).to(gl.float32)
    up_bias = gl.load(bias_ptr + 2 * k + 1).to(gl.float32)
    complete = gl.zeros_like(old_gate) + S.gate_up_columns
    gates = wait_for_sums(sums_ptr + 2 * k, old_gate, complete, 4)
    ups = wait_for_sums(sums_ptr + 2 * k + 1, old_up, complete, 4)
    gate = gl.minimum(sum_of(gates, old_gate) * factor + gate_bias, S.limit)
    up = gl.minimum(gl.maximum(sum_of(ups, old_up) * factor + up_bias, -S.limit), S.limit)
    hidden = gate / (1.0 + gl.exp(-S.alpha * gate)) * (up + 1.0)
    return gl.where(inside, hidden, 0.0), gates, ups


@gluon.jit
def _store_expert(v, xe_store, xscale, at):
    SCALAR: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    v, unscale = _scaled(v, 16)
    store_fp8_terms(v, xe_store.index(at), 16)
    xscale.index(at).store(gl.zeros([1], gl.float32, layout=SCALAR) + unscale)


@gluon.jit
def _attention_slice(attention, tag, column, S: gl.constexpr):
    """160 outputs of attention."""
    g, inside, k = _dense_places(column, S)
    inside = inside & (k < S.attention_width)
    a = wait_for_tagged(attention + gl.minimum(k, S.attention_width - 1), tag, 2)
    return gl.where(inside, a, 0.0)


@gluon.jit
def _clear(program, words, COUNT: gl.constexpr, S: gl.constexpr):
    """Zeros in the set of sums that the next launch uses."""
    L: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    at = program * 256 + gl.arange(0, 256, layout=L)
    for _ in range(0, gl.cdiv(COUNT, S.programs * 256)):
        gl.store(words + at, gl.zeros([256], gl.int64, layout=L), mask=at < COUNT)
        at += S.programs * 256


@gluon.jit
def _scalar(memory, at):
    """A number that stands alone in shared memory."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.sum(memory.index(at).load(L), 0)


@gluon.jit
def _qkv_tiles(which, first, last, done, c0, buffer, big, small, xd, xscale, full, empty, sums, S: gl.constexpr):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32 if S.fp8 else 16])
    GROUPS: gl.constexpr = 8 if S.fp8 else 16
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    zero = gl.zeros([64, 8], gl.float32, layout=MMA)
    if S.fp8:
        unscale0 = _scalar(xscale, buffer)
        unscale1 = _scalar(xscale, buffer + 1)
    i = first + which
    n = done + which
    while i < last:
        column = i // S.qkv_blocks
        slot = n % S.dense_slots
        mbarrier.wait(full.index(slot), (n // S.dense_slots) & 1)
        acc = dense_tile(big, small, xd, (buffer + column - c0) * GROUPS, slot, zero, S)
        mbarrier.arrive(empty.index(slot), count=1)
        value = row_sums(acc, MMA, S.fp8)
        if S.fp8:
            value *= gl.where(column == c0, unscale0, unscale1)
        add_to_sums(sums + (i - column * S.qkv_blocks) * 64 + lane, value, 1)
        i += S.consumers
        n += S.consumers


@gluon.jit
def _out_tiles(which, first, last, done, c0, buffer, big, small, xd, xscale, full, empty, scale_ptr, bias_ptr, sums, S: gl.constexpr):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32 if S.fp8 else 16])
    GROUPS: gl.constexpr = 8 if S.fp8 else 16
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    zero = gl.zeros([64, 8], gl.float32, layout=MMA)
    if S.fp8:
        unscale0 = _scalar(xscale, buffer)
        unscale1 = _scalar(xscale, buffer + 1)
    i = first + which
    n = done + which
    while i < last:
        column = i // S.out_blocks
        slot = n % S.dense_slots
        row = (i - column * S.out_blocks) * 64 + lane
        safe = gl.minimum(row, S.width - 1)
        bias = gl.load(bias_ptr + safe).to(gl.float32)
        if S.fp8:
            scale = gl.load(scale_ptr + safe)
        mbarrier.wait(full.index(slot), (n // S.dense_slots) & 1)
        acc = dense_tile(big, small, xd, (buffer + column - c0) * GROUPS, slot, zero, S)
        mbarrier.arrive(empty.index(slot), count=1)
        value = row_sums(acc, MMA, S.fp8)
        if S.fp8:
            value *= gl.where(column == c0, unscale0, unscale1) * scale
        add_to_sums(sums + row, value + gl.where(column == 0, bias, 0.0), 1)
        i += S.consumers
        n += S.consumers


@gluon.jit
def _gate_up_tiles(which, first, last, done, c0, buffer, big, small, scales, xe, xscale, full, empty, sums, S: gl.constexpr):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    zero = gl.zeros([64, 8], gl.float32, layout=MMA)
    unscale0 = _scalar(xscale, buffer) * 64.0
    unscale1 = _scalar(xscale, buffer + 1) * 64.0
    i = first + which
    n = done + which
    while i < last:
        column = i // S.gate_up_blocks
        block = i - column * S.gate_up_blocks + column // S.gate_up_columns * S.gate_up_blocks
        slot = n % S.expert_slots
        mbarrier.wait(full.index(slot), (n // S.expert_slots) & 1)
        acc = expert_tile(big, small, scales, xe, (buffer + column - c0) * 16, slot, zero)
        mbarrier.arrive(empty.index(slot), count=1)
        value = row_sums(acc, MMA, True) * gl.where(column == c0, unscale0, unscale1)
        add_to_sums(sums + block * 64 + lane, value, 1)
        i += S.consumers
        n += S.consumers


@gluon.jit
def _down_tiles(which, first, last, done, c0, buffer, big, small, scales, xe, xscale, full, empty, bias_ptr, ids, mixing, sums, S: gl.constexpr):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    zero = gl.zeros([64, 8], gl.float32, layout=MMA)
    unscale0 = _scalar(xscale, buffer) * 64.0
    unscale1 = _scalar(xscale, buffer + 1) * 64.0
    i = first + which
    n = done + which
    while i < last:
        column = i // S.down_blocks
        place = column // S.down_columns
        row = (i - column * S.down_blocks) * 64 + lane
        bias = gl.load(bias_ptr + pick(place, ids) * S.width + gl.minimum(row, S.width - 1))
        slot = n % S.expert_slots
        mbarrier.wait(full.index(slot), (n // S.expert_slots) & 1)
        acc = expert_tile(big, small, scales, xe, (buffer + column - c0) * 16, slot, zero)
        mbarrier.arrive(empty.index(slot), count=1)
        value = row_sums(acc, MMA, True) * gl.where(column == c0, unscale0, unscale1)
        value += gl.where(column % S.down_columns == 0, bias.to(gl.float32), 0.0)
        add_to_sums(sums + row, value * pick(place, mixing), 1)
        i += S.consumers
        n += S.consumers


@gluon.jit
def _head_slices(which, x_ptr, norm_ptr, count, phase, hstore, hscale, hsquares, ready, S: gl.constexpr):
    """The whole residual for the head; returns its norm's factor."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    CONSUMERS: gl.constexpr = S.consumers
    column = which
    mine = gl.zeros([1], gl.float32, layout=L)
    for column in range(which, S.width_columns, CONSUMERS):
        g, x, squares = _residual_slice(x_ptr, norm_ptr, count, column, S)
        mine += gl.sum(squares, 0)
        _store_dense(x, hstore, hscale, column, S)
    hsquares.index(which).store(mine)
    _share_slices(ready, phase, S)
    total = _scalar(hsquares, 0)
    for c in gl.static_range(1, CONSUMERS):
        total += _scalar(hsquares, c)
    return gl.rsqrt(total / S.width + S.eps)


@gluon.jit
def _head_tiles(which, done, factor, big, small, xh, hscale, full, empty, scale_ptr, logits, S: gl.constexpr):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32 if S.fp8 else 16])
    GROUPS: gl.constexpr = 8 if S.fp8 else 16
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    zero = gl.zeros([64, 8], gl.float32, layout=MMA)
    first, last = share(S.head_blocks, gl.program_id(0), S)
    block = first + which
    n = done + which
    while block < last:
        row = block * 64 + lane
        safe = gl.minimum(row, S.vocabulary - 1)
        if S.fp8:
            scale = gl.load(scale_ptr + safe)
        acc = zero
        for column in range(S.width_columns):
            slot = n % S.dense_slots
            mbarrier.wait(full.index(slot), (n // S.dense_slots) & 1)
            part = dense_tile(big, small, xh, column * GROUPS, slot, zero, S)
            mbarrier.arrive(empty.index(slot), count=1)
            if S.fp8:
                acc += part * _scalar(hscale, column)
            else:
                acc += part
            n += S.consumers
        value = row_sums(acc, MMA, S.fp8) * factor
        if S.fp8:
            value *= scale
        gl.store(logits + row, value, mask=row < S.vocabulary)
        block += S.consumers


@gluon.jit
def consumer(
    which: gl.constexpr, token, position_ptr, counter, embedding, norms, moe_norms, final_norm,
    qkv_scale, qkv_bias, sinks, out_scale, out_bias, router, router_bias, gate_up_bias, down_bias,
    head_scale, cos, sin, cache, cache_table, sums, tagged, logits,
    dbig, dsmall, dfull, dempty, ebig, esmall, escales, efull, eempty, chosen, routed,
    xs, xscale, ready, hs, hscale, hsquares, trace, S: gl.constexpr, E2: gl.constexpr,
):  # fmt: skip
    """A warpgroup: every consumers-th tile of this program, and its share of the rest."""
    SWIZZLED8: gl.constexpr = gl.NVMMASharedLayout(32, 8, rank=2)
    SWIZZLED8_3: gl.constexpr = gl.NVMMASharedLayout(32, 8, rank=3)
    SWIZZLED16: gl.constexpr = gl.NVMMASharedLayout(32, 16, rank=2)
    SWIZZLED16_3: gl.constexpr = gl.NVMMASharedLayout(32, 16, rank=3)
    FLAT5: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[3, 2, 1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    SCALAR: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    UNITS: gl.constexpr = S.dense_slots * (1 if S.fp8 else 2)
    if S.fp8:
        big = dbig._reinterpret(gl.float8e4nv, [UNITS * 4, 64, 32], SWIZZLED8)
        small = dsmall._reinterpret(gl.float8e4nv, [UNITS, 64, 32], SWIZZLED8)
        xd = xs._reinterpret(gl.float8e4nv, [64, 8, 32], SWIZZLED8)
        xh = hs._reinterpret(gl.float8e4nv, [S.width_columns * 8, 8, 32], SWIZZLED8)
        xstore = xs._reinterpret(gl.float8e4nv, [8, 8, 8, 32], SWIZZLED8_3)
        hstore = hs._reinterpret(gl.float8e4nv, [S.width_columns, 8, 8, 32], SWIZZLED8_3)
    else:
        big = dbig._reinterpret(gl.bfloat16, [UNITS * 4, 64, 16], SWIZZLED16)
        small = dsmall._reinterpret(gl.bfloat16, [UNITS, 64, 16], SWIZZLED16)
        xd = xs._reinterpret(gl.bfloat16, [64, 8, 16], SWIZZLED16)
        xh = hs._reinterpret(gl.bfloat16, [S.width_columns * 16, 8, 16], SWIZZLED16)
        xstore = xs._reinterpret(gl.bfloat16, [4, 16, 8, 16], SWIZZLED16_3)
        hstore = hs._reinterpret(gl.bfloat16, [S.width_columns, 16, 8, 16], SWIZZLED16_3)
    xe_store = xs._reinterpret(gl.float8e4nv, [4, 16, 8, 32], SWIZZLED8_3)
    xe = xs._reinterpret(gl.float8e4nv, [64, 8, 32], SWIZZLED8)
    wbig = ebig._reinterpret(gl.int32, [S.expert_slots * 4, 4, 8, 4, 4], FLAT5)
    wsmall = esmall._reinterpret(gl.int32, [S.expert_slots, 4, 8, 4, 4], FLAT5)
    wscales = escales._reinterpret(gl.int32, [S.expert_slots * 4, 64], FLAT)

    program = gl.program_id(0)
    position = gl.load(position_ptr)
    launch = gl.load(counter)

    # Sums: two sets, of which this launch uses one and clears the other.
    QKV: gl.constexpr = S.out_blocks * 64
    GATE_UP: gl.constexpr = QKV + S.qkv_blocks * 64
    ROUTER: gl.constexpr = GATE_UP + S.top_k * S.gate_up_blocks * 64
    WORDS: gl.constexpr = ROUTER + E2
    mine = sums + (launch & 1) * WORDS
    if which == S.consumers - 1:
        _clear(program, sums + ((launch & 1) ^ 1) * WORDS, WORDS, S)
    residual = mine
    qkv = mine + QKV
    gate_up = mine + GATE_UP
    router_sums = mine + ROUTER
    squares = tagged
    router_squares = tagged + 256
    attention = tagged + 320
    accs = attention + S.attention_width
    peaks = accs + S.splits * S.attention_width
    totals = peaks + S.splits * S.heads
    parts = (accs, peaks, totals)

    if which == 0:
        _begin(program, token, embedding, residual, S)

    # What the sums were when this consumer read them last.
    QL: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    HALF: gl.constexpr = S.head_width // 2
    old_lo = gl.zeros([16, HALF], gl.int64, layout=QL)
    old_hi = gl.zeros([16, HALF], gl.int64, layout=QL)
    EACH: gl.constexpr = gl.BlockedLayout([E2 // 32], [32], [4], [0])
    old_router = gl.zeros([E2], gl.int64, layout=EACH)
    XL: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    old_gate = gl.zeros([16, 32], gl.int64, layout=XL)
    old_up = gl.zeros([16, 32], gl.int64, layout=XL)

    dn = 0  # tiles of the rings so far
    en = 0
    phase = 0
    count = 1  # contributions to a row of the residual so far
    for layer in range(S.layers):
        tag = launch * S.layers + layer + 1
        if trace is not None:
            sm = gl.inline_asm_elementwise("mov.u32 $0, %smid; // $1", "=r,r", [layer], dtype=gl.int32, is_pure=False, pack=1)
            gl.store(trace + ((program * S.consumers + which) * S.layers + layer) * EVENTS + 19, sm.to(gl.int64))
        # ---- qkv
        stamp(trace, which, layer, 0, S)
        buffer = (phase & 1) * 2
        qkv0, qkv1 = share(S.qkv_tiles, anew(program), S)
        c0 = qkv0 // S.qkv_blocks
        if which < 2:
            column = c0 + which
            if (column * S.qkv_blocks < qkv1) & (qkv0 < qkv1):
                g, x, ss = _residual_slice(residual, norms + layer * S.width, count, column, S)
                if column * S.qkv_blocks >= qkv0:
                    per: gl.constexpr = 160 // S.group
                    publish(squares + column * per + g, ss, tag, g < per)
                _store_dense(x, xstore, xscale, buffer + which, S)
        stamp(trace, which, layer, 1, S)
        _share_slices(ready, phase, S)
        stamp(trace, which, layer, 2, S)
        _qkv_tiles(which, qkv0, qkv1, dn, c0, buffer, big, small, xd, xscale, dfull, dempty, qkv, S)
        dn += qkv1 - qkv0
        stamp(trace, which, layer, 3, S)
        phase += 1
        # ---- attention
        if which == 0:
            worker = anew(program)
            split = worker // S.kv_heads
            kv_head = worker % S.kv_heads
            k_cache = cache + gl.load(cache_table + layer * 4) * 64
            v_cache = cache + gl.load(cache_table + layer * 4 + 1) * 64
            slots = gl.load(cache_table + layer * 4 + 2).to(gl.int32)
            is_sliding = gl.load(cache_table + layer * 4 + 3).to(gl.int32)
            first = gl.where(is_sliding != 0, gl.maximum(position - S.window + 1, 0), 0)
            used = gl.where(position - first > S.single, S.splits, 1)
            if split < used:
                attend(
                    old_lo, old_hi, layer, kv_head, split, used, position, first, tag, squares, qkv,
                    parts, attention, qkv_scale, qkv_bias, sinks, cos, sin, k_cache, v_cache, slots,
                    trace, S,
                )  # fmt: skip
        stamp(trace, which, layer, 6, S)
        # ---- output projection
        buffer = (phase & 1) * 2
        out0, out1 = share(S.out_tiles, anew(program), S)
        c0 = out0 // S.out_blocks
        if which < 2:
            column = c0 + which
            if (column * S.out_blocks < out1) & (out0 < out1):
                _store_dense(_attention_slice(attention, tag, column, S), xstore, xscale, buffer + which, S)
        stamp(trace, which, layer, 7, S)
        _share_slices(ready, phase, S)
        stamp(trace, which, layer, 8, S)
        _out_tiles(which, out0, out1, dn, c0, buffer, big, small, xd, xscale, dfull, dempty, out_scale + layer * S.width, out_bias + layer * S.width, residual, S)
        dn += out1 - out0
        stamp(trace, which, layer, 9, S)
        phase += 1
        count += S.out_columns
        # ---- router
        if which == 0:
            if program < S.router_programs:
                route_part(program, layer, residual, moe_norms + layer * S.width, router, count, tag, router_sums, router_squares, S, E2)
        stamp(trace, which, layer, 10, S)
        # ---- gate_up
        buffer = (phase & 1) * 2
        gu0, gu1 = share(S.top_k * S.gate_up_tiles, anew(program), S)
        c0 = gu0 // S.gate_up_blocks  # of all experts' columns, one after the other
        if which < 2:
            column = c0 + which
            if (column * S.gate_up_blocks < gu1) & (gu0 < gu1):
                x = _gate_up_slice(residual, moe_norms + layer * S.width, count, column % S.gate_up_columns, S)
                _store_expert(x, xe_store, xscale, buffer + which)
        stamp(trace, which, layer, 11, S)
        ids, mixing, factor, old_router = choose(layer, router_bias, old_router, tag, router_sums, router_squares, S, E2)
        stamp(trace, which, layer, 12, S)
        if which == 0:
            for j in gl.static_range(4):
                chosen.index(j).store(gl.zeros([1], gl.int32, layout=SCALAR) + ids[j])
            mbarrier.arrive(routed.index(0), count=1)
        if which == 0:
            worker = anew(program)
            if worker < S.splits * S.kv_heads:
                old_lo, old_hi = qkv_words(qkv, worker % S.kv_heads, S)
        stamp(trace, which, layer, 13, S)
        _share_slices(ready, phase, S)
        stamp(trace, which, layer, 14, S)
        _gate_up_tiles(which, gu0, gu1, en, c0, buffer, wbig, wsmall, wscales, xe, xscale, efull, eempty, gate_up, S)
        en += gu1 - gu0
        stamp(trace, which, layer, 15, S)
        phase += 1
        # ---- down
        buffer = (phase & 1) * 2
        down0, down1 = share(S.top_k * S.down_tiles, anew(program), S)
        c0 = down0 // S.down_blocks
        if which < 2:
            column = c0 + which
            if (column * S.down_blocks < down1) & (down0 < down1):
                place = column // S.down_columns
                bias_at = gate_up_bias + (layer * S.experts + pick(place, ids)).to(gl.int64) * (2 * S.hidden)
                at = gate_up + place * (S.gate_up_blocks * 64)
                hidden, old_gate, old_up = _down_slice(at, bias_at, old_gate, old_up, factor, column % S.down_columns, S)
                _store_expert(hidden, xe_store, xscale, buffer + which)
        stamp(trace, which, layer, 16, S)
        _share_slices(ready, phase, S)
        stamp(trace, which, layer, 17, S)
        _down_tiles(which, down0, down1, en, c0, buffer, wbig, wsmall, wscales, xe, xscale, efull, eempty, down_bias + layer.to(gl.int64) * (S.experts * S.width), ids, mixing, residual, S)
        en += down1 - down0
        stamp(trace, which, layer, 18, S)
        phase += 1
        count += S.top_k * S.down_columns
    # ---- head
    norm_factor = _head_slices(which, residual, final_norm, count, phase, hstore, hscale, hsquares, ready, S)
    _head_tiles(which, dn, norm_factor, big, small, xh, hscale, dfull, dempty, head_scale, logits, S)
    if which == 0:
        if program == 0:
            gl.store(counter, launch + 1)


# Grid: one program a processor, all resident.
@gluon.jit
def step_kernel(
    token, position, counter, embedding, norms, moe_norms, final_norm, qkv_scale, qkv_bias, sinks,
    out_scale, out_bias, router, router_bias, gate_up_bias, down_bias, head_scale, cos, sin, cache,
    cache_table, sums, tagged, logits, dense32, dense8, expert32, expert8, expert4,
    trace, S: gl.constexpr, E2: gl.constexpr,
):  # fmt: skip
    PLAIN: gl.constexpr = gl.NVMMASharedLayout(0, 8, rank=2)
    THREE: gl.constexpr = gl.NVMMASharedLayout(32, 8, rank=3)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    UNITS: gl.constexpr = S.dense_slots * (1 if S.fp8 else 2)
    dbig = gl.allocate_shared_memory(gl.uint8, [UNITS, 32, 256], PLAIN)
    dsmall = gl.allocate_shared_memory(gl.uint8, [UNITS, 8, 256], PLAIN)
    ebig = gl.allocate_shared_memory(gl.uint8, [S.expert_slots, 32, 256], PLAIN)
    esmall = gl.allocate_shared_memory(gl.uint8, [S.expert_slots, 8, 256], PLAIN)
    escales = gl.allocate_shared_memory(gl.uint8, [S.expert_slots, 4, 256], PLAIN)
    xs = gl.allocate_shared_memory(gl.float8e4nv, [4, 16, 8, 32], THREE)
    hs = gl.allocate_shared_memory(gl.float8e4nv, [S.width_columns, 8 if S.fp8 else 16, 8, 32], THREE)
    xscale = gl.allocate_shared_memory(gl.float32, [4, 1], LINE)
    hscale = gl.allocate_shared_memory(gl.float32, [S.width_columns, 1], LINE)
    hsquares = gl.allocate_shared_memory(gl.float32, [S.consumers, 1], LINE)
    chosen = gl.allocate_shared_memory(gl.int32, [4, 1], LINE)
    dfull = gl.allocate_shared_memory(gl.int64, [S.dense_slots, 1], mbarrier.MBarrierLayout())
    dempty = gl.allocate_shared_memory(gl.int64, [S.dense_slots, 1], mbarrier.MBarrierLayout())
    efull = gl.allocate_shared_memory(gl.int64, [S.expert_slots, 1], mbarrier.MBarrierLayout())
    eempty = gl.allocate_shared_memory(gl.int64, [S.expert_slots, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    routed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    DENSE: gl.constexpr = S.dense_slots
    EXPERT: gl.constexpr = S.expert_slots
    for s in gl.static_range(DENSE):
        mbarrier.init(dfull.index(s), count=1)
        mbarrier.init(dempty.index(s), count=1)
    for s in gl.static_range(EXPERT):
        mbarrier.init(efull.index(s), count=1)
        mbarrier.init(eempty.index(s), count=1)
    for s in gl.static_range(2):
        mbarrier.init(ready.index(s), count=S.consumers)
    mbarrier.init(routed.index(0), count=1)
    gl.warp_specialize(
        [
            (consumer, (0, token, position, counter, embedding, norms, moe_norms, final_norm, qkv_scale, qkv_bias,
        sinks, out_scale, out_bias, router, router_bias, gate_up_bias, down_bias, head_scale, cos,
        sin, cache, cache_table, sums, tagged, logits, dbig, dsmall, dfull, dempty, ebig, esmall,
        escales, efull, eempty, chosen, routed, xs, xscale, ready, hs, hscale, hsquares, trace, S, E2)),
            (consumer, (1, token, position, counter, embedding, norms, moe_norms, final_norm, qkv_scale, qkv_bias,
        sinks, out_scale, out_bias, router, router_bias, gate_up_bias, down_bias, head_scale, cos,
        sin, cache, cache_table, sums, tagged, logits, dbig, dsmall, dfull, dempty, ebig, esmall,
        escales, efull, eempty, chosen, routed, xs, xscale, ready, hs, hscale, hsquares, trace, S, E2)),
            (dense_producer, (dense32, dense8, dbig, dsmall, dfull, dempty, S)),
            (expert_producer, (expert32, expert8, expert4, ebig, esmall, escales, efull, eempty, chosen, routed, S)),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )
