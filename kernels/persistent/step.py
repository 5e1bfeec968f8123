"""The decode step of GPT-OSS as one kernel: from the token's embedding to the next token.

One program a processor. In each, a warp for the ring of dense weights and one for the ring of
experts' weights let the copy engine fill slots; they run ahead of the arithmetic over all phases,
the dense one without end, the other from the moment the routing is known. Eight warps take tile by
tile, multiply, and add rows to sums in memory (exchange.py).

    phase    reads                         multiplies          adds to
    qkv      residual, its norm weight     dense tiles         qkv sums
    attend   qkv sums, cache               (few programs)      attention [tagged]
    out      attention                     dense tiles         residual
    router   residual, its norm weight     (few programs)      router sums
    gate_up  residual, router sums         4-bit tiles         gate_up sums
    down     gate_up sums                  4-bit tiles         residual
    head     residual                      dense tiles         logits (stored)
    draw     logits                        (in the head)       next token (draw.py)

The norm's factor is one number for all rows: it multiplies what was summed, when that is read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kernels.persistent import sizes
from kernels.persistent.draw import consider, hand_in, nothing_found, pick_token
from kernels.persistent.exchange import (
    add_to_sums,
    publish,
    sign,
    sum_of,
    wait_for_all_to_sign,
    wait_for_signatures,
    wait_for_sums,
    wait_for_sums_if,
    wait_for_tagged,
    wait_for_tagged_if,
    wait_for_two_sums,
    words_now,
)
from kernels.persistent.gluon_names import copy_rows, seen_as, wait_for_warps
from kernels.persistent.multiply import (
    dense_piece,
    load_expert_tile,
    multiply_expert_tile,
    power_of_two_for,
    row_sums,
    store_bf16_terms,
    store_fp8_terms,
)

NONE = gl.constexpr(-1e30)
EXPERT_ROWS = gl.constexpr(sizes.EXPERT_ROWS)
SAME = gl.constexpr("mov.b32 $0, $1;")


# Phases of a layer, and times of a phase, as the trace has them.
QKV, ATTENTION, OUT, ROUTER, GATE_UP, DOWN = (gl.constexpr(i) for i in range(6))
PHASES = gl.constexpr(len(sizes.PHASES))
BEGINS, READY, ENDS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
CLOCK = gl.constexpr("mov.u64 $0, %globaltimer; // $1")


@gluon.jit
def stamp(trace, layer, phase, which: gl.constexpr, on, S: gl.constexpr):
    """Write the time in ns to trace [programs, layers * PHASES + 1, 3] if `on`: a phase's begin,
    when what it waits for is there, its end. Nothing if trace is None, as it is but for the time
    line; the head is phase 0 of a layer behind the last."""
    if trace is not None:
        now = gl.inline_asm_elementwise(
            CLOCK, "=l,r", [gl.program_id(0)], dtype=gl.int64, is_pure=False, pack=1
        )  # fmt: skip
        row = gl.program_id(0) * (S.layers * PHASES + 1) + layer * PHASES + phase
        gl.store(trace + row * 3 + which, now, mask=on)


@gluon.jit
def anew(x):
    """x, in a way that keeps what is made of it inside a loop: registers are scarcer than time."""
    return gl.inline_asm_elementwise(SAME, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def share(program, COLUMNS: gl.constexpr, BLOCKS: gl.constexpr, S: gl.constexpr):
    """A program's column of tiles, and its first and last + 1 block of rows in it.

    Programs that work on a column are neighbours; those without work stand evenly among the rest,
    because each group of processors has its own way to memory.
    """
    EACH: gl.constexpr = S.programs // COLUMNS
    ACTIVE: gl.constexpr = EACH * COLUMNS
    place = program * ACTIVE // S.programs
    column = place // EACH
    part = place - column * EACH
    first = BLOCKS * part // EACH
    works = (program + 1) * ACTIVE // S.programs > place
    return column, first, gl.where(works, BLOCKS * (part + 1) // EACH, first)


@gluon.jit
def duty(program, S: gl.constexpr):
    """A program's place in the order in which programs take parts of the router.

    Those without tiles of experts come first: who is late with an expert's tiles delays all.
    """
    COLUMNS: gl.constexpr = S.top_k * S.gate_up_columns
    ACTIVE: gl.constexpr = S.programs // COLUMNS * COLUMNS
    before = program * ACTIVE // S.programs
    works = (program + 1) * ACTIVE // S.programs > before
    return gl.where(works, S.programs - ACTIVE + before, program - before)


@gluon.jit
def attention_duty(program, S: gl.constexpr):
    """A program's place in the order in which programs take parts of the cache.

    First those without tiles of the qkv projection, then the first of each column of tiles, which
    has no more of them than the others: they have time to bring keys and values near.
    """
    EACH: gl.constexpr = S.programs // S.width_columns
    ACTIVE: gl.constexpr = EACH * S.width_columns
    IDLE: gl.constexpr = S.programs - ACTIVE
    before = program * ACTIVE // S.programs
    works = (program + 1) * ACTIVE // S.programs > before
    column = before // EACH
    is_first = before == column * EACH
    place = gl.where(is_first, column, S.width_columns + before - column - 1)
    return gl.where(works, IDLE + place, program - before)


@gluon.jit
def sum_words(S: gl.constexpr, E2: gl.constexpr):
    """Words of one set of sums."""
    return (S.out_blocks + S.qkv_blocks + S.top_k * S.gate_up_blocks) * 128 + E2 + 2


@gluon.jit
def parts_of(sums, launch, S: gl.constexpr, E2: gl.constexpr):
    """Sums of a launch: residual, qkv, gate_up, router, signatures of readers of the residual.

    There are two sets: a launch uses one and clears the other.
    """
    residual = sums + (launch & 1) * sum_words(S, E2)
    qkv = residual + S.out_blocks * 128
    gate_up = qkv + S.qkv_blocks * 128
    router = gate_up + S.top_k * S.gate_up_blocks * 128
    return residual, qkv, gate_up, router, router + E2


# ------------------------------------------------------------------------------------ producers
@gluon.jit
def _dense_line(
    desc128, desc32, base, first, last, n, big, small, full, empty, S: gl.constexpr
):  # fmt: skip
    """Load the tiles from base + first to base + last, slot by slot; n counts the slots."""
    for i in range((base + first) * S.pieces, (base + last) * S.pieces):
        slot = n % S.dense_slots
        bar = full.index(slot)
        mbarrier.wait(empty.index(slot), ((n // S.dense_slots) & 1) ^ 1)
        mbarrier.expect(bar, 160 * 256)
        copy_rows(desc128, [i * 160, 0], bar, big.index(slot))
        copy_rows(desc32, [i * 160 + 128, 0], bar, small.index(slot))
        n += 1
    return n


@gluon.jit
def dense_producer(desc128, desc32, big, small, full, empty, S: gl.constexpr):
    """One warp: every dense tile of this program, in the order in which they are multiplied."""
    program = gl.program_id(0)
    qkv_column, qkv0, qkv1 = share(program, S.width_columns, S.qkv_blocks, S)
    out_column, out0, out1 = share(program, S.out_columns, S.out_blocks, S)
    n = 0
    for layer in range(S.layers):
        base = layer * S.layer_tiles + qkv_column * S.qkv_blocks
        n = _dense_line(desc128, desc32, base, qkv0, qkv1, n, big, small, full, empty, S)
        base = layer * S.layer_tiles + S.qkv_tiles + out_column * S.out_blocks
        n = _dense_line(desc128, desc32, base, out0, out1, n, big, small, full, empty, S)
    first = S.head_blocks * program // S.programs * S.width_columns
    last = S.head_blocks * (program + 1) // S.programs * S.width_columns
    base = S.layers * S.layer_tiles
    _dense_line(desc128, desc32, base, first, last, n, big, small, full, empty, S)


@gluon.jit
def _expert_line(
    desc64, desc16, desc8, base, first, last, n, big, small, scales, full, empty, S: gl.constexpr
):
    for i in range(first, last):
        slot = n % S.expert_slots
        mbarrier.wait(empty.index(slot), ((n // S.expert_slots) & 1) ^ 1)
        at = (base + i) * EXPERT_ROWS
        bar = full.index(slot)
        mbarrier.expect(bar, (64 + 16 + 8) * 256)  # scales are six rows: two are read in vain
        copy_rows(desc64, [at, 0], bar, big.index(slot))
        copy_rows(desc16, [at + 64, 0], bar, small.index(slot))
        copy_rows(desc8, [at + 80, 0], bar, scales.index(slot))
        n += 1
    return n


@gluon.jit
def expert_share(half, program, S: gl.constexpr):
    """A program's part of gate_up (half 0) or down (1) of the chosen experts.

    Returns the expert's place among the chosen, its column of tiles, first and last + 1 block.
    """
    column, first, last = share(program, S.top_k * S.gate_up_columns, S.gate_up_blocks, S)
    columns = S.gate_up_columns + half * (S.down_columns - S.gate_up_columns)
    if half == 1:
        column, first, last = share(program, S.top_k * S.down_columns, S.down_blocks, S)
    place = gl.minimum(column // columns, S.top_k - 1)
    return place, column - place * columns, first, last


@gluon.jit
def expert_producer(
    desc64, desc16, desc8, signed, big, small, scales, full, empty, chosen, routed, S: gl.constexpr
):
    """One warp: the tiles of the experts of each layer, once the routing is known."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    program = gl.program_id(0)
    n = 0
    for layer in range(S.layers):
        mbarrier.wait(routed.index(0), layer & 1)
        for half in range(2):
            if half == 1:
                wait_for_signatures(signed, (layer + 1) * S.programs)
            place, column, first, last = expert_share(half, program, S)
            expert = gl.sum(chosen.index(place).load(ONE), 0)
            base = (layer * S.experts + expert) * S.expert_tiles
            base += gl.where(
                half == 0, column * S.gate_up_blocks, S.gate_up_tiles + column * S.down_blocks
            )
            n = _expert_line(
                desc64, desc16, desc8, base, first, last, n, big, small, scales, full, empty, S
            )


# ------------------------------------------------------------------------- slices of the vector
@gluon.jit
def _scaled(v):
    """v times a power of two that E4M3 holds, and the inverse of that."""
    scale, unscale = power_of_two_for(gl.max(gl.max(gl.abs(v), 1), 0))
    return v * scale, unscale


@gluon.jit
def _slice_stored():
    """The tensor cores can read what all warps have stored."""
    fence_async_shared()
    wait_for_warps()


@gluon.jit
def _places(column, GROUP: gl.constexpr):
    """Group numbers of a slice of 320 columns, element numbers, and which are there: [16, 32] or
    [32, 16], of which 10 or 20 rows are used."""
    GROUPS: gl.constexpr = 512 // GROUP
    L: gl.constexpr = gl.BlockedLayout([1, 1], [32 // GROUP, GROUP], [8, 1], [1, 0])
    g = gl.arange(0, GROUPS, layout=gl.SliceLayout(1, L))
    i = gl.arange(0, GROUP, layout=gl.SliceLayout(0, L))
    inside = (g < 320 // GROUP)[:, None] & (i >= 0)[None, :]
    return g, inside, column * 320 + gl.minimum(g, 320 // GROUP - 1)[:, None] * GROUP + i[None, :]


@gluon.jit
def _store_dense(v, store, at, S: gl.constexpr):
    """A slice for dense tiles, [16, 32] or [32, 16]; returns what multiplies its sums."""
    if S.fp8:
        v, unscale = _scaled(v)
        store_fp8_terms(v, store.index(at), 16)
    else:
        store_bf16_terms(v, store.index(at), 32)
        unscale = 1.0
    return unscale


@gluon.jit
def _residual_slice(x_ptr, norm_ptr, count, column, S: gl.constexpr):
    """320 numbers of the residual: weighted by the norm, and the sums of plain ones' squares."""
    GROUP: gl.constexpr = S.group
    g, inside, k = _places(column, GROUP)
    inside = inside & (k < S.width)
    k = gl.minimum(k, S.width - 1)
    weight = gl.load(norm_ptr + k).to(gl.float32)
    zero = gl.zeros_like(k.to(gl.int64))
    x = sum_of(wait_for_sums(x_ptr + k, zero, zero + count, 2), zero)
    x = gl.where(inside, x, 0.0)
    return g, x * weight, gl.sum(x * x, 1)


@gluon.jit
def _attention_slice(attention, tag, column, S: gl.constexpr):
    """320 outputs of attention."""
    GROUP: gl.constexpr = S.group
    _, inside, k = _places(column, GROUP)
    inside = inside & (k < S.attention_width)
    a = wait_for_tagged(attention + gl.minimum(k, S.attention_width - 1), tag, 2)
    return gl.where(inside, a, 0.0)


@gluon.jit
def _gate_up_slice(x_ptr, norm_ptr, count, column, S: gl.constexpr):
    """320 numbers of the residual, weighted by the norm, [16, 32]."""
    _, inside, k = _places(column, 32)
    inside = inside & (k < S.width)
    k = gl.minimum(k, S.width - 1)
    weight = gl.load(norm_ptr + k).to(gl.float32)
    zero = gl.zeros_like(k.to(gl.int64))
    x = sum_of(wait_for_sums(x_ptr + k, zero, zero + count, 2), zero)
    return gl.where(inside, x * weight, 0.0)


@gluon.jit
def _down_slice(sums_ptr, old_gate, old_up, factor, column, S: gl.constexpr):
    """320 activations of an expert, [16, 32], and what the sums were."""
    _, inside, k = _places(column, 32)
    inside = inside & (k < S.hidden)
    k = gl.minimum(k, S.hidden - 1)
    complete = gl.zeros_like(old_gate) + S.gate_up_columns
    gates, ups = wait_for_two_sums(
        sums_ptr + 2 * k, sums_ptr + 2 * k + 1, old_gate, old_up, complete
    )
    gate = sum_of(gates, old_gate) * factor
    up = sum_of(ups, old_up) * factor
    gate = gl.minimum(gate, S.limit)
    up = gl.minimum(gl.maximum(up, -S.limit), S.limit)
    hidden = gate / (1.0 + gl.exp(-S.alpha * gate)) * (up + 1.0)
    return gl.where(inside, hidden, 0.0), gates, ups


@gluon.jit
def _stage_rows(ptr, factor, first, at, rows, S: gl.constexpr):
    """Numbers of this program's rows, [ROWS, 128], into shared memory before they are needed."""
    ROWS: gl.constexpr = S.most_blocks
    L: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [8, 1], [1, 0])
    block = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    row = block[:, None] * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, L))[None, :]
    value = gl.load(ptr + gl.minimum(row, S.width - 1)).to(gl.float32)
    rows.index(at).store(value * factor)


# ---------------------------------------------------------------------------------- attention
@gluon.jit
def _cached(
    ptr,
    begin,
    end,
    slots,
    half: gl.constexpr,
    WIDTH: gl.constexpr,
    L: gl.constexpr,
    C: gl.constexpr,
):
    """Rows [128, WIDTH] of the cache from position begin on; zeros from end on."""
    s = begin + gl.arange(0, 128, layout=gl.SliceLayout(1, L))
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L))
    mask = (s < end)[:, None] & (c >= 0)[None, :]
    return gl.load(
        ptr + (s % slots)[:, None] * C + (half * WIDTH + c)[None, :], mask=mask, other=0.0
    )


@gluon.jit
def _cached_block(k_ptr, v_ptr, begin, end, slots, C: gl.constexpr):
    """Keys (in two halves) and values of 128 positions."""
    KL: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [8, 1], [1, 0])
    VL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    k_lo = _cached(k_ptr, begin, end, slots, 0, C // 2, KL, C)
    k_hi = _cached(k_ptr, begin, end, slots, 1, C // 2, KL, C)
    return k_lo, k_hi, _cached(v_ptr, begin, end, slots, 0, C, VL, C)


@gluon.jit
def _as_operands(k_lo, k_hi, v):
    """A block as the tensor cores take it."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 8], [16, 8])
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    k_lo = gl.convert_layout(k_lo.permute([1, 0]), B)
    k_hi = gl.convert_layout(k_hi.permute([1, 0]), B)
    return k_lo, k_hi, gl.convert_layout(v, B)


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
    new = gl.maximum(biggest, gl.max(scores, 1))
    p = gl.where(there, gl.exp(scores - new[:, None]), 0.0)
    shrink = gl.exp(biggest - new)
    total = total * shrink + gl.sum(p, 1)
    p = gl.convert_layout(p.to(gl.bfloat16), A)
    acc = mma_v2(p, v, acc * shrink[:, None])
    return new, total, acc


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
def qkv_words(sums, kv_head, S: gl.constexpr):
    """What the sums of a kv head's rows are now; all loads are under way together.

    Called between two phases that add to them: the next use begins from here.
    """
    _, place = _qkv_places(kv_head, S)
    lo = words_now(sums + place)
    return lo, words_now(sums + place + S.head_width // 2)


@gluon.jit
def _turn(
    old_lo,
    old_hi,
    layer,
    kv_head,
    position,
    tag,
    squares,
    qkv,
    qkv_scale,
    qkv_bias,
    cos,
    sin,
    qs,
    trace,
    S: gl.constexpr,
):
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
    complete = gl.zeros_like(old_lo) + S.width_columns
    at = qkv + place
    lo, hi = wait_for_two_sums(at, at + C // 2, old_lo, old_hi, complete)
    lo, hi = sum_of(lo, old_lo), sum_of(hi, old_hi)
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
    old_lo, old_hi, layer, kv_head, split, used, position, first, tag, squares, qkv, parts,
    attention, qkv_scale, qkv_bias, sinks, cos, sin, k_cache, v_cache, slots, qs, trace,
    S: gl.constexpr,
):  # fmt: skip
    """One kv head's share of the cache: rotate, write the new row, attend, publish."""
    C: gl.constexpr = S.head_width
    R: gl.constexpr = S.heads_per_kv
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 8], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    L: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [8, 1], [1, 0])
    per = gl.cdiv(position - first, used)
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
    k_lo, k_hi, v = _cached_block(k_at, v_at, begin, end, slots, C)
    k_lo, k_hi, v = _as_operands(k_lo, k_hi, v)
    _turn(
        old_lo,
        old_hi,
        layer,
        kv_head,
        position,
        tag,
        squares,
        qkv,
        qkv_scale,
        qkv_bias,
        cos,
        sin,
        qs,
        trace,
        S,
    )
    rows = seen_as(qs, gl.bfloat16, [32, C // 2], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    whole = seen_as(qs, gl.bfloat16, [16, C], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    q_lo = qs.slice(0, C // 2, dim=1).load(A)
    q_hi = qs.slice(C // 2, C // 2, dim=1).load(A)
    if split == 0:
        new_lo = rows.index(2 * R).load(gl.SliceLayout(0, L))
        new_hi = rows.index(2 * R + 1).load(gl.SliceLayout(0, L))
        own = qs.slice(0, C // 2, dim=1).load(L).to(gl.float32) * new_lo.to(gl.float32)[None, :]
        own += (
            qs.slice(C // 2, C // 2, dim=1).load(L).to(gl.float32) * new_hi.to(gl.float32)[None, :]
        )
        biggest = gl.convert_layout(gl.sum(own, 1) * scale, gl.SliceLayout(1, MMA))
        total = total + 1.0
        value = whole.index(R + 1).load(gl.SliceLayout(0, MMA))
        acc = acc + value.to(gl.float32)[None, :]
        slot = (position % slots) * C
        gl.store(k_at + slot + half, new_lo)
        gl.store(k_at + slot + C // 2 + half, new_hi)
        gl.store(v_at + slot + column, value)
    s = begin
    more = True
    while more:
        more = s + 128 < end
        next_lo, next_hi, next_v = _cached_block(k_at, v_at, s + 128, end, slots, C)
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
        _merge(layer, kv_head, split, tag, parts, attention, sinks, S)


@gluon.jit
def _merge(layer, kv_head, split, tag, parts, attention, sinks, S: gl.constexpr):
    """A split's share of its kv head's outputs, from what all splits published."""
    C: gl.constexpr = S.head_width
    R: gl.constexpr = S.heads_per_kv
    MINE: gl.constexpr = R * C // S.splits
    L: gl.constexpr = gl.BlockedLayout([2, 1], [8, 4], [1, 8], [0, 1])
    accs, peaks, totals = parts
    e = split * MINE + gl.arange(0, MINE, layout=gl.SliceLayout(0, L))
    s = gl.arange(0, S.splits, layout=gl.SliceLayout(1, L))
    part = (kv_head * S.splits + s)[:, None] * R + (e // C)[None, :]
    acc = wait_for_tagged(accs + part * C + (e % C)[None, :], tag, 2)
    peak = wait_for_tagged(peaks + part, tag, 2)
    total = wait_for_tagged(totals + part, tag, 2)
    head = kv_head * R + e // C
    sink = gl.load(sinks + layer * S.heads + head).to(gl.float32)
    biggest = gl.maximum(gl.max(peak, 0), sink)
    grow = gl.exp(peak - biggest[None, :])
    out = gl.sum(acc * grow, 0) / (gl.sum(total * grow, 0) + gl.exp(sink - biggest))
    publish(attention + kv_head * R * C + e, out, tag, e >= 0)


# -------------------------------------------------------------------------------------- router
@gluon.jit
def route_part(
    program,
    layer,
    x_ptr,
    norm_ptr,
    router,
    count,
    tag,
    sums,
    squares,
    trace,
    S: gl.constexpr,
    E2: gl.constexpr,
):
    """128 columns of the router: their part of all experts' logits, and their squares."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    e = gl.arange(0, E2, layout=gl.SliceLayout(1, L))
    i = gl.arange(0, 128, layout=gl.SliceLayout(0, L))
    k = program * 128 + i
    inside = k < S.width
    row = gl.minimum(e, S.experts - 1)
    w = gl.load(
        router
        + ((layer * S.router_programs + program) * S.experts + row)[:, None] * 128
        + i[None, :]
    )
    k = gl.minimum(k, S.width - 1)
    weight = gl.load(norm_ptr + k).to(gl.float32)
    zero = gl.zeros_like(k.to(gl.int64))
    x = gl.where(inside, sum_of(wait_for_sums(x_ptr + k, zero, zero + count, 4), zero), 0.0)
    stamp(trace, layer, ROUTER, READY, True, S)
    z = gl.sum(w.to(gl.float32) * (x * weight)[None, :], 1)
    add_to_sums(sums + row, z, 1, e < S.experts)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    one = gl.arange(0, 1, layout=ONE)
    publish(
        squares + program + one,
        gl.zeros([1], gl.float32, layout=ONE) + gl.sum(x * x, 0),
        tag,
        one == 0,
    )


@gluon.jit
def choose(
    layer, bias, old, tag, sums, squares, shared, trace, S: gl.constexpr, E2: gl.constexpr
):  # fmt: skip
    """The experts of this token by falling logit, their weights, the norm's factor, new olds.

    One thread waits for each number; then every warp chooses alone: 128 logits are four a lane.
    old: [256], of which the first E2 are used
    """
    ALL: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    EACH: gl.constexpr = gl.BlockedLayout([E2 // 32], [32], [8], [0])
    PARTS: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    e = gl.arange(0, E2, layout=EACH)
    row = gl.minimum(e, S.experts - 1)
    add = gl.load(bias + layer * S.experts + row).to(gl.float32)
    i = gl.arange(0, 256, layout=ALL)
    words = wait_for_sums_if(
        sums + gl.minimum(i, S.experts - 1), old, S.router_programs, i < S.experts
    )
    part = gl.minimum(gl.maximum(i - 128, 0), S.router_programs - 1)
    found = wait_for_tagged_if(squares + part, tag, (i >= 128) & (i < 128 + S.router_programs))
    shared.store(gl.where(i < 128, sum_of(words, old), found))
    wait_for_warps()
    stamp(trace, layer, ROUTER, READY, duty(gl.program_id(0), S) >= S.router_programs, S)
    p = gl.arange(0, 32, layout=PARTS)
    squared = gl.where(p < S.router_programs, shared.slice(128, 32).load(PARTS), 0.0)
    factor = gl.rsqrt(gl.sum(squared, 0) / S.width + S.eps)
    logits = shared.slice(0, E2).load(EACH) * factor + add
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
    return ids, (1.0 / all, w1 / all, w2 / all, w3 / all), factor, gl.where(i < S.experts, words, 0)


@gluon.jit
def pick(place, four):
    """One of four scalars."""
    return gl.where(
        place == 0, four[0], gl.where(place == 1, four[1], gl.where(place == 2, four[2], four[3]))
    )


# ------------------------------------------------------------------------------- tiles of phases
@gluon.jit
def _wait_full(full, n, slots: gl.constexpr):
    """Until the ring's tile n is there; its slot."""
    mbarrier.wait(full.index(n % slots), (n // slots) & 1)
    return n % slots


@gluon.jit
def _dense_tile(n, big, small, xs, x, full, empty, zero, S: gl.constexpr):
    """Sums [128, 8] of the tile that begins in the ring's n-th slot, and where the next begins."""
    acc = zero
    PIECES: gl.constexpr = S.pieces
    for piece in gl.static_range(PIECES):
        slot = _wait_full(full, n, S.dense_slots)
        acc = dense_piece(acc, big, small, xs, x + piece * 10, slot, piece == 0)
        mbarrier.arrive(empty.index(slot), count=1)
        n += 1
    return acc, n


@gluon.jit
def _dense_tiles(
    first, last, n, unscale, plain, big, small, xs, x, full, empty, rows, sums, S: gl.constexpr
):  # fmt: skip
    """Add tiles of one column to sums; rows' scales and biases as staged, or neither if plain."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 8, 32 if S.fp8 else 16])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    zero = gl.zeros([128, 8], gl.float32, layout=MMA)
    limit = gl.where(plain, S.qkv_blocks * 128, S.width)
    for block in range(first, last):
        acc, n = _dense_tile(n, big, small, xs, x, full, empty, zero, S)
        value = row_sums(acc, MMA, S.fp8) * unscale
        if S.fp8:
            scale = rows.index(S.most_blocks + (block - first) % S.most_blocks).load(ROW)
            value *= gl.where(plain, 1.0, scale)
        bias = rows.index((block - first) % S.most_blocks).load(ROW)
        value += gl.where(plain, 0.0, bias)
        row = block * 128 + gl.arange(0, 128, layout=ROW)
        add_to_sums(sums + row, value, 1, row < limit)
    return n


@gluon.jit
def _expert_tiles(
    first,
    last,
    n,
    unscale,
    bias_factor,
    mixing,
    limit,
    big,
    small,
    scales,
    last_scales,
    xs,
    full,
    empty,
    sums,
    S: gl.constexpr,
):
    """Add tiles of one column and their biases times bias_factor to sums, all times mixing."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 8, 32])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    zero = gl.zeros([128, 8], gl.float32, layout=MMA)
    for block in range(first, last):
        slot = _wait_full(full, n, S.expert_slots)
        tile = load_expert_tile(big, small, scales, last_scales, slot)
        mbarrier.arrive(empty.index(slot), count=1)
        acc, bias = multiply_expert_tile(tile, xs, zero)
        value = (row_sums(acc, MMA, True) * unscale + bias * bias_factor) * mixing
        row = block * 128 + gl.arange(0, 128, layout=ROW)
        add_to_sums(sums + row, value, 1, row < limit)
        n += 1
    wait_for_warps()  # the slice may be written again
    return n


@gluon.jit
def _head(
    n,
    x_ptr,
    norm_ptr,
    count,
    store,
    hscale,
    big,
    small,
    xs,
    full,
    empty,
    scale_ptr,
    logits,
    draws,
    settings,
    seed,
    step,
    seen,
    words,
    tag,
    trace,
    S: gl.constexpr,
):
    """Logits: the whole residual times this program's blocks of rows; if it draws, the best of its
    tokens is published in words."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 8, 32 if S.fp8 else 16])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    squares = 0.0
    stamp(trace, S.layers, 0, BEGINS, True, S)
    for column in range(S.width_columns):
        _, x, ss = _residual_slice(x_ptr, norm_ptr, count, column, S)
        squares += gl.sum(ss, 0)
        unscale = _store_dense(x, store, column, S)
        hscale.index(column).store(gl.zeros([1], gl.float32, layout=ONE) + unscale)
    factor = gl.rsqrt(squares / S.width + S.eps)
    _slice_stored()
    stamp(trace, S.layers, 0, READY, True, S)
    lane = gl.arange(0, 128, layout=gl.SliceLayout(1, MMA))
    zero = gl.zeros([128, 8], gl.float32, layout=MMA)
    program = gl.program_id(0)
    first = S.head_blocks * program // S.programs
    found = nothing_found(gl.minimum(first * 128 + lane, S.vocabulary - 1))
    seed_now = gl.load(seed)
    step_now = gl.load(step)
    for block in range(first, S.head_blocks * (program + 1) // S.programs):
        row = block * 128 + lane
        safe = gl.minimum(row, S.vocabulary - 1)
        if S.fp8:
            scale = gl.load(scale_ptr + safe)
        acc = zero
        for column in range(S.width_columns):
            part, n = _dense_tile(
                n, big, small, xs, column * S.slice_groups, full, empty, zero, S
            )  # fmt: skip
            if S.fp8:
                acc += part * gl.sum(hscale.index(column).load(ONE), 0)
            else:
                acc += part
        value = row_sums(acc, MMA, S.fp8) * factor
        if S.fp8:
            value *= scale
        inside = row < S.vocabulary
        gl.store(logits + row, value, mask=inside)
        if draws != 0:
            found = consider(found, value, row, inside, settings, seed_now, step_now, seen)
    stamp(trace, S.layers, 0, ENDS, True, S)
    if draws != 0:
        hand_in(found, words, tag)


# ------------------------------------------------------------------------------------ consumers
@gluon.jit
def _begin(program, token, embedding, residual, S: gl.constexpr):
    """The token's embedding is the first contribution to the residual."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    d = program * 256 + gl.arange(0, 256, layout=L)
    row = embedding + gl.load(token).to(gl.int64) * S.width
    x = gl.load(row + d, mask=d < S.width, other=0.0).to(gl.float32)
    add_to_sums(residual + d, x, 1, d < S.width)


@gluon.jit
def _clear(program, words, COUNT: gl.constexpr, S: gl.constexpr):
    """Zeros in the set of sums that the next launch uses."""
    L: gl.constexpr = gl.BlockedLayout([2], [32], [8], [0])
    at = program * 512 + gl.arange(0, 512, layout=L)
    for _ in range(0, gl.cdiv(COUNT, S.programs * 512)):
        gl.store(words + at, gl.zeros([512], gl.int64, layout=L), mask=at < COUNT)
        at += S.programs * 512


@gluon.jit
def consumer(
    token, position_ptr, settings, seed, step, seen, history, logprobs, counter, embedding, norms,
    moe_norms, final_norm, qkv_scale, qkv_bias,
    sinks, out_scale, out_bias, router, router_bias, head_scale, cos, sin,
    cache, cache_table, sums, tagged, logits, dbig, dsmall, dfull, dempty, ebig, esmall, escales,
    efull, eempty, chosen, routed, xs, hscale, rows, qs, trace, draws, S: gl.constexpr,
    E2: gl.constexpr,
):  # fmt: skip
    """Eight warps: all arithmetic of this program."""
    SWIZZLED8: gl.constexpr = gl.NVMMASharedLayout(32, 8, rank=2)
    SWIZZLED8_3: gl.constexpr = gl.NVMMASharedLayout(32, 8, rank=3)
    SWIZZLED16: gl.constexpr = gl.NVMMASharedLayout(32, 16, rank=2)
    SWIZZLED16_3: gl.constexpr = gl.NVMMASharedLayout(32, 16, rank=3)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    FLAT2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    FLAT4: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[3, 2, 1, 0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    SLOTS: gl.constexpr = S.dense_slots
    COLUMNS: gl.constexpr = S.width_columns
    APART: gl.constexpr = S.slice_groups
    # The head's slices stand where the experts' tiles did. All other phases have one slice in xs,
    # at an address that the compiler knows, so that what names it to the tensor cores is constant.
    if S.fp8:
        big = seen_as(dbig, gl.float8e4nv, [SLOTS * 8, 128, 32], SWIZZLED8)
        small = seen_as(dsmall, gl.float8e4nv, [SLOTS * 2, 128, 32], SWIZZLED8)
        xd = seen_as(xs, gl.float8e4nv, [APART, 8, 32], SWIZZLED8)
        xstore = seen_as(xs, gl.float8e4nv, [1, APART, 8, 32], SWIZZLED8_3)
        xh = seen_as(ebig, gl.float8e4nv, [COLUMNS * APART, 8, 32], SWIZZLED8)
        hstore = seen_as(ebig, gl.float8e4nv, [COLUMNS, APART, 8, 32], SWIZZLED8_3)
    else:
        big = seen_as(dbig, gl.bfloat16, [SLOTS * 8, 128, 16], SWIZZLED16)
        small = seen_as(dsmall, gl.bfloat16, [SLOTS * 2, 128, 16], SWIZZLED16)
        xd = seen_as(xs, gl.bfloat16, [APART, 8, 16], SWIZZLED16)
        xstore = seen_as(xs, gl.bfloat16, [1, APART, 8, 16], SWIZZLED16_3)
        xh = seen_as(ebig, gl.bfloat16, [COLUMNS * APART, 8, 16], SWIZZLED16)
        hstore = seen_as(ebig, gl.bfloat16, [COLUMNS, APART, 8, 16], SWIZZLED16_3)
    xe = seen_as(xs, gl.float8e4nv, [APART, 8, 32], SWIZZLED8)
    estore = seen_as(xs, gl.float8e4nv, [1, 16, 8, 32], SWIZZLED8_3)
    wbig = seen_as(ebig, gl.int32, [S.expert_slots * 4, 8, 8, 4, 4], FLAT4)
    wsmall = seen_as(esmall, gl.int32, [S.expert_slots, 8, 8, 4, 4], FLAT4)
    wscales = seen_as(escales, gl.int32, [S.expert_slots * 2, 2, 128], FLAT2)
    wlast = seen_as(escales, gl.int32, [S.expert_slots * 4, 128], FLAT)

    staged = seen_as(rows, gl.float32, [2, S.most_blocks, 128], FLAT2)
    numbers = seen_as(qs, gl.float32, [256], FLAT)
    program = gl.program_id(0)
    position = gl.load(position_ptr)
    launch = gl.load(counter)
    residual, qkv, gate_up, router_sums, signed = parts_of(sums, launch, S, E2)
    squares = tagged
    router_squares = tagged + 256
    attention = tagged + 320
    accs = attention + S.attention_width
    peaks = accs + S.splits * S.attention_width
    totals = peaks + S.splits * S.heads
    words = totals + S.splits * S.heads
    _begin(program, token, embedding, residual, S)
    _clear(program, parts_of(sums, launch + 1, S, E2)[0], sum_words(S, E2), S)

    # What the sums were when this program read them last.
    QL: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [8, 1], [1, 0])
    HALF: gl.constexpr = S.head_width // 2
    old_lo = gl.zeros([16, HALF], gl.int64, layout=QL)
    old_hi = gl.zeros([16, HALF], gl.int64, layout=QL)
    old_router = gl.zeros([256], gl.int64, layout=gl.BlockedLayout([1], [32], [8], [0]))
    XL: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [8, 1], [1, 0])
    old_gate = gl.zeros([16, 32], gl.int64, layout=XL)
    old_up = gl.zeros([16, 32], gl.int64, layout=XL)
    ids = (0, 0, 0, 0)  # of the chosen experts, their weights, the factor of the norm in front
    mixing = (0.0, 0.0, 0.0, 0.0)
    factor = 0.0
    dn = 0  # tiles of the rings so far
    en = 0
    count = 1  # contributions to a row of the residual so far
    for layer in range(S.layers):
        tag = launch * S.layers + layer + 1
        # ---- qkv, then attention and output projection: one copy of the code for both
        for half in range(2):
            qkv_column, qkv0, qkv1 = share(anew(program), S.width_columns, S.qkv_blocks, S)
            out_column, out0, out1 = share(anew(program), S.out_columns, S.out_blocks, S)
            first = gl.where(half == 0, qkv0, out0)
            last = gl.where(half == 0, qkv1, out1)
            phase = gl.where(half == 0, QKV, OUT)
            stamp(trace, layer, phase, BEGINS, first < last, S)
            if half == 1:
                if first < last:
                    once = gl.where(out_column == 0, 1.0, 0.0)
                    _stage_rows(out_bias + layer * S.width, once, first, 0, staged, S)
                    if S.fp8:
                        _stage_rows(out_scale + layer * S.width, 1.0, first, 1, staged, S)
                worker = attention_duty(anew(program), S)
                split = worker // S.kv_heads
                is_sliding = gl.load(cache_table + layer * 4 + 3).to(gl.int32)
                start = gl.where(is_sliding != 0, gl.maximum(position - S.window + 1, 0), 0)
                used = gl.where(position - start > S.single, S.splits, 1)
                if split < used:
                    k_cache = cache + gl.load(cache_table + layer * 4) * 64
                    v_cache = cache + gl.load(cache_table + layer * 4 + 1) * 64
                    slots = gl.load(cache_table + layer * 4 + 2).to(gl.int32)
                    stamp(trace, layer, ATTENTION, BEGINS, True, S)
                    attend(
                        old_lo, old_hi, layer, worker % S.kv_heads, split, used, position, start,
                        tag, squares, qkv, (accs, peaks, totals), attention, qkv_scale, qkv_bias,
                        sinks, cos, sin, k_cache, v_cache, slots, qs, trace, S,
                    )  # fmt: skip
                    stamp(trace, layer, ATTENTION, ENDS, True, S)
            unscale = 1.0
            if first < last:
                if half == 0:
                    g, x, ss = _residual_slice(
                        residual, norms + layer * S.width, count, qkv_column, S
                    )
                    if first == 0:
                        PER: gl.constexpr = 320 // S.group
                        publish(squares + qkv_column * PER + g, ss, tag, g < PER)
                else:
                    # The residual may change when all programs have read it.
                    wait_for_all_to_sign(signed, (layer + 1) * S.programs)
                    x = _attention_slice(attention, tag, out_column, S)
                unscale = _store_dense(x, xstore, 0, S)
            _slice_stored()
            if half == 0:
                sign(signed)
            stamp(trace, layer, phase, READY, first < last, S)
            sums_at = residual + gl.where(half == 0, S.out_blocks * 128, 0)
            dn = _dense_tiles(
                first,
                last,
                dn,
                unscale,
                half == 0,
                big,
                small,
                xd,
                0,
                dfull,
                dempty,
                rows,
                sums_at,
                S,
            )
            stamp(trace, layer, phase, ENDS, first < last, S)
        count += S.out_columns
        # ---- router
        part = duty(anew(program), S)
        stamp(trace, layer, ROUTER, BEGINS, True, S)
        if part < S.router_programs:
            route_part(
                part, layer, residual, moe_norms + layer * S.width, router, count, tag,
                router_sums, router_squares, trace, S, E2,
            )  # fmt: skip
        # ---- gate_up, then down
        unscale = 1.0
        for half in range(2):
            place, column, first, last = expert_share(half, anew(program), S)
            phase = gl.where(half == 0, GATE_UP, DOWN)
            stamp(trace, layer, phase, BEGINS, first < last, S)
            if first < last:
                if half == 0:
                    x = _gate_up_slice(residual, moe_norms + layer * S.width, count, column, S)
                else:
                    at = gate_up + place * (S.gate_up_blocks * 128)
                    x, old_gate, old_up = _down_slice(at, old_gate, old_up, factor, column, S)
                x, unscale = _scaled(x)
                store_fp8_terms(x, estore.index(0), 16)
                unscale *= 64.0
            if half == 0:
                ids, mixing, factor, old_router = choose(
                    layer,
                    router_bias,
                    old_router,
                    tag,
                    router_sums,
                    router_squares,
                    numbers,
                    trace,
                    S,
                    E2,
                )
                stamp(trace, layer, ROUTER, ENDS, True, S)
                for j in gl.static_range(4):
                    chosen.index(j).store(gl.zeros([1], gl.int32, layout=ONE) + ids[j])
                mbarrier.arrive(routed.index(0), count=1)
                worker = attention_duty(anew(program), S)
                if worker < S.splits * S.kv_heads:
                    old_lo, old_hi = qkv_words(qkv, worker % S.kv_heads, S)
            _slice_stored()
            if half == 0:
                sign(signed + 1)
            stamp(trace, layer, phase, READY, first < last, S)
            up = (S.out_blocks + S.qkv_blocks + place * S.gate_up_blocks) * 128
            sums_at = residual + gl.where(half == 0, up, 0)
            en = _expert_tiles(
                first, last, en, unscale, gl.where(half == 0, 1.0 / factor, 1.0),
                gl.where(half == 0, 1.0, pick(place, mixing)),
                gl.where(half == 0, S.gate_up_blocks * 128, S.width), wbig, wsmall, wscales, wlast,
                xe, efull, eempty, sums_at, S,
            )  # fmt: skip
            stamp(trace, layer, phase, ENDS, first < last, S)
        count += S.top_k * S.down_columns
    _head(
        dn,
        residual,
        final_norm,
        count,
        hstore,
        hscale,
        big,
        small,
        xh,
        dfull,
        dempty,
        head_scale,
        logits,
        draws,
        settings,
        seed,
        step,
        seen,
        words,
        launch + 1,
        trace,
        S,
    )
    if program == 0:
        gl.store(counter, launch + 1)
        if draws != 0:
            pick_token(words, launch + 1, token, position_ptr, step, seen, history, logprobs, S)


# Grid: one program a processor, all resident.
@gluon.jit(do_not_specialize=["draws"])
def step_kernel(
    token, position, settings, seed, step, seen, history, logprobs, counter, embedding, norms,
    moe_norms, final_norm, qkv_scale, qkv_bias, sinks, out_scale, out_bias, router, router_bias,
    head_scale, cos, sin, cache, cache_table, sums, tagged, logits, dense128, dense32, expert64,
    expert16, expert8, trace_ptr, draws, S: gl.constexpr, E2: gl.constexpr,
):  # fmt: skip
    PLAIN: gl.constexpr = gl.NVMMASharedLayout(0, 8, rank=2)
    THREE: gl.constexpr = gl.NVMMASharedLayout(32, 8, rank=3)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    DENSE: gl.constexpr = S.dense_slots
    EXPERT: gl.constexpr = S.expert_slots
    dbig = gl.allocate_shared_memory(gl.uint8, [DENSE, 128, 256], PLAIN)
    dsmall = gl.allocate_shared_memory(gl.uint8, [DENSE, 32, 256], PLAIN)
    ebig = gl.allocate_shared_memory(gl.uint8, [EXPERT, 64, 256], PLAIN)
    esmall = gl.allocate_shared_memory(gl.uint8, [EXPERT, 16, 256], PLAIN)
    escales = gl.allocate_shared_memory(gl.uint8, [EXPERT, 8, 256], PLAIN)
    APART: gl.constexpr = S.slice_groups
    xs = gl.allocate_shared_memory(gl.float8e4nv, [1, APART, 8, 32], THREE)
    hscale = gl.allocate_shared_memory(gl.float32, [S.width_columns, 1], LINE)
    chosen = gl.allocate_shared_memory(gl.int32, [4, 1], LINE)
    ROWS: gl.constexpr = 2 * S.most_blocks
    WIDE: gl.constexpr = S.head_width
    FLAT2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    rows = gl.allocate_shared_memory(gl.float32, [ROWS, 128], LINE)
    qs = gl.allocate_shared_memory(gl.bfloat16, [16, WIDE], FLAT2)
    dfull = gl.allocate_shared_memory(gl.int64, [DENSE, 1], mbarrier.MBarrierLayout())
    dempty = gl.allocate_shared_memory(gl.int64, [DENSE, 1], mbarrier.MBarrierLayout())
    efull = gl.allocate_shared_memory(gl.int64, [EXPERT, 1], mbarrier.MBarrierLayout())
    eempty = gl.allocate_shared_memory(gl.int64, [EXPERT, 1], mbarrier.MBarrierLayout())
    routed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(DENSE):
        mbarrier.init(dfull.index(s), count=1)
        mbarrier.init(dempty.index(s), count=1)
    for s in gl.static_range(EXPERT):
        mbarrier.init(efull.index(s), count=1)
        mbarrier.init(eempty.index(s), count=1)
    mbarrier.init(routed.index(0), count=1)
    _, _, _, _, signed = parts_of(sums, gl.load(counter), S, E2)
    gl.warp_specialize(
        [
            (consumer, (token, position, settings, seed, step, seen, history, logprobs, counter,
                        embedding, norms, moe_norms, final_norm,
                        qkv_scale, qkv_bias, sinks, out_scale, out_bias, router, router_bias,
                        head_scale, cos, sin, cache, cache_table, sums,
                        tagged, logits, dbig, dsmall, dfull, dempty, ebig, esmall, escales, efull,
                        eempty, chosen, routed, xs, hscale, rows, qs, trace_ptr, draws, S, E2)),
            (dense_producer, (dense128, dense32, dbig, dsmall, dfull, dempty, S)),
            (expert_producer, (expert64, expert16, expert8, signed + 1, ebig, esmall, escales,
                               efull, eempty, chosen, routed, S)),
        ],
        [1, 1],
        [40, 40],
    )  # fmt: skip
