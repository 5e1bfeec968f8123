"""The decode step of GPT-OSS as one kernel: from the token's embedding to the next token.

One program a processor. In each, a warp for the ring of dense weights and one for the ring of
experts' weights let the copy engine fill slots; they run ahead of the arithmetic over all phases,
the dense one without end, the other from the moment the routing is known. Eight warps take tile by
tile, multiply, and add rows to sums in memory (exchange.py).

    phase    reads                         multiplies          adds to
    qkv      residual, its norm weight     dense tiles         qkv sums
    attend   qkv sums, cache               (few programs)      attention [tagged]
    router   residual, its norm weight     (few programs)      router sums
    out      attention                     dense tiles         residual, router sums
    gate_up  residual, router sums         experts' tiles      gate_up sums
    down     gate_up sums                  experts' tiles      residual
    head     residual                      dense tiles         logits (stored)
    draw     logits                        (in the head)       next token (draw.py)

The norm's factor is one number for all rows: it multiplies what was summed, when that is read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.persistent.attend import attend
from kernels.persistent.draw import pick_token
from kernels.persistent.exchange import add_to_sums, publish, sign, wait_for_all_to_sign
from kernels.persistent.gluon_names import seen_as
from kernels.persistent.multiply import expert_views, store_fp8_terms
from kernels.persistent.producers import dense_producer, expert_producer
from kernels.persistent.route import choose, pick, route_part
from kernels.persistent.shares import (
    attention_duty,
    expert_share,
    parts_of,
    router_duty,
    share,
    sum_words,
    turn_of,
    turn_words,
)
from kernels.persistent.slices import (
    attention_slice,
    down_slice,
    gate_up_slice,
    residual_slice,
    scaled,
    slice_stored,
    stage_rows,
    store_dense,
)
from kernels.persistent.stamps import (
    ATTENTION,
    BEGINS,
    DOWN,
    ENDS,
    GATE_UP,
    OUT,
    QKV,
    READY,
    ROUTER,
    stamp,
)
from kernels.persistent.tile_loops import dense_tiles, expert_tiles, head

SAME = gl.constexpr("mov.b32 $0, $1;")


@gluon.jit
def anew(x):
    """x, in a way that keeps what is made of it inside a loop: registers are scarcer than time."""
    return gl.inline_asm_elementwise(SAME, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


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
    """This program's part of zeros in sums that are used next."""
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
    cache, cache_table, sums, tagged, logits, pool, small_pool, dfull, dempty, lent, escales, efull,
    eempty, chosen, routed, told, tellings, xs, hscale, rows, qs, trace, draws,
    S: gl.constexpr,
):  # fmt: skip
    """Eight warps: all arithmetic of this program."""
    SWIZZLED8: gl.constexpr = gl.NVMMASharedLayout(32, 8, rank=2)
    SWIZZLED8_3: gl.constexpr = gl.NVMMASharedLayout(32, 8, rank=3)
    SWIZZLED16: gl.constexpr = gl.NVMMASharedLayout(32, 16, rank=2)
    SWIZZLED16_3: gl.constexpr = gl.NVMMASharedLayout(32, 16, rank=3)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    FLAT2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    SLOTS: gl.constexpr = S.dense_slots + S.lent_slots
    APART: gl.constexpr = S.slice_groups
    # The head's slices stand where the experts' tiles did. All other phases have one slice in xs,
    # at an address that the compiler knows, so that what names it to the tensor cores is constant.
    SLICES: gl.constexpr = S.dense_slots * 128 // APART + S.width_columns
    if S.fp8:
        big = seen_as(pool, gl.float8e4nv, [SLOTS * 8, 128, 32], SWIZZLED8)
        small = seen_as(small_pool, gl.float8e4nv, [SLOTS * 2, 128, 32], SWIZZLED8)
        xd = seen_as(xs, gl.float8e4nv, [APART, 8, 32], SWIZZLED8)
        xstore = seen_as(xs, gl.float8e4nv, [1, APART, 8, 32], SWIZZLED8_3)
        xh = seen_as(pool, gl.float8e4nv, [SLICES * APART, 8, 32], SWIZZLED8)
        hstore = seen_as(pool, gl.float8e4nv, [SLICES, APART, 8, 32], SWIZZLED8_3)
    else:
        big = seen_as(pool, gl.bfloat16, [SLOTS * 8, 128, 16], SWIZZLED16)
        small = seen_as(small_pool, gl.bfloat16, [SLOTS * 2, 128, 16], SWIZZLED16)
        xd = seen_as(xs, gl.bfloat16, [APART, 8, 16], SWIZZLED16)
        xstore = seen_as(xs, gl.bfloat16, [1, APART, 8, 16], SWIZZLED16_3)
        xh = seen_as(pool, gl.bfloat16, [SLICES * APART, 8, 16], SWIZZLED16)
        hstore = seen_as(pool, gl.bfloat16, [SLICES, APART, 8, 16], SWIZZLED16_3)
    xe = seen_as(xs, gl.float8e4nv, [APART, 8, 32], SWIZZLED8)
    estore = seen_as(xs, gl.float8e4nv, [1, 16, 8, 32], SWIZZLED8_3)
    wbig, wsmall, wpairs, wrows = expert_views(pool, small_pool, escales, S)
    staged = seen_as(rows, gl.float32, [2, S.most_blocks, 128], FLAT2)
    numbers = seen_as(qs, gl.float32, [512], FLAT)
    program = gl.program_id(0)
    launch = gl.load(counter)
    # Words from the residual's sums to others of layers with an even number.
    TO_QKV: gl.constexpr = S.out_blocks * 128
    TO_GATE_UP: gl.constexpr = TO_QKV + S.qkv_blocks * 128
    TO_LOGITS: gl.constexpr = TO_GATE_UP + S.top_k * S.gate_up_blocks * 128
    residual, qkv, gate_up, router_sums, signed = parts_of(sums, launch, S)
    squares = tagged
    attention = tagged + 256
    accs = attention + S.attention_width
    peaks = accs + S.splits * S.attention_width
    totals = peaks + S.splits * S.heads
    words = totals + S.splits * S.heads
    _begin(program, token, embedding, residual, S)
    _clear(program, parts_of(sums, launch + 1, S)[0], sum_words(S), S)

    weight = 1.0  # of the chosen expert whose down tiles this program has
    factor = 0.0  # of the norm in front of the experts
    dn = 0  # pieces and tiles of the rings so far
    pieces = 0  # of dense weights in a layer so far
    en = 0
    claims = 0  # of tiles of gate_up so far
    count = 1  # contributions to a row of the residual so far
    for layer in range(S.layers):
        tag = launch * S.layers + layer + 1
        # ---- qkv, then attention and output projection: one copy of the code for both
        for half in range(2):
            qkv_column, qkv0, qkv1 = share(anew(program), S.width_columns, S.qkv_blocks, S)
            out_column, out0, out1 = share(anew(program), S.out_columns, S.mixed_blocks, S)
            first = gl.where(half == 0, qkv0, out0)
            last = gl.where(half == 0, qkv1, out1)
            phase = gl.where(half == 0, QKV, OUT)
            stamp(trace, layer, phase, BEGINS, first < last, S)
            if half == 1:
                if first < last:
                    once = gl.where(out_column == 0, 1.0, 0.0)
                    at = layer * (S.mixed_blocks * 128)
                    stage_rows(out_bias + at, once, first, 0, staged, S)
                    if S.fp8:
                        stage_rows(out_scale + at, 1.0, first, 1, staged, S)
                position = gl.load(position_ptr)  # again: registers are scarcer than time
                worker = attention_duty(anew(program), S)
                split = worker // S.kv_heads
                is_sliding = gl.load(cache_table + layer * 4 + 3).to(gl.int32)
                start = gl.where(is_sliding != 0, gl.maximum(position - S.window + 1, 0), 0)
                behind = position - start
                # Whole blocks of 128 positions, as few as `splits` programs can have each.
                per = gl.maximum(gl.cdiv(behind, S.splits * 128) * 128, 128)
                used = gl.where(behind > S.single, gl.cdiv(behind, per), 1)
                per = gl.where(used > 1, per, behind)
                if split < gl.where(used > 1, S.splits, 1):
                    k_cache = cache + gl.load(cache_table + layer * 4) * 64
                    v_cache = cache + gl.load(cache_table + layer * 4 + 1) * 64
                    slots = gl.load(cache_table + layer * 4 + 2).to(gl.int32)
                    stamp(trace, layer, ATTENTION, BEGINS, True, S)
                    attend(
                        layer, worker % S.kv_heads, split, used, per, position, start, tag,
                        squares, qkv + turn_of(anew(layer), S), (accs, peaks, totals), attention,
                        qkv_scale, qkv_bias, sinks, cos, sin, k_cache, v_cache, slots, qs,
                        (pool, small_pool, escales), trace, S,
                    )  # fmt: skip
                    stamp(trace, layer, ATTENTION, ENDS, True, S)
                part = router_duty(anew(program), S)
                if part < S.router_programs:
                    route_part(
                        part, layer, residual, moe_norms + layer * S.width, router, count, signed,
                        router_sums + turn_of(anew(layer), S), S,
                    )  # fmt: skip
                # Again, as what was kept over attention would not fit the registers.
                _, first, last = share(anew(program), S.out_columns, S.mixed_blocks, S)
            unscale = 1.0
            if first < last:
                if half == 0:
                    g, x, ss = residual_slice(
                        residual, norms + layer * S.width, count, qkv_column, S
                    )
                    if first == 0:
                        PER: gl.constexpr = 320 // S.group
                        publish(squares + qkv_column * PER + g, ss, tag, g < PER)
                else:
                    # The residual may change when all programs have read it.
                    wait_for_all_to_sign(signed, (layer + 1) * S.programs)
                    out_column, _, _ = share(anew(program), S.out_columns, S.mixed_blocks, S)
                    x = attention_slice(attention, tag, out_column, S)
                unscale = store_dense(x, xstore, 0, S)
            slice_stored()
            if (half == 0) & (router_duty(anew(program), S) >= S.router_programs):
                sign(signed)
            stamp(trace, layer, phase, READY, first < last, S)
            turn = turn_of(anew(layer), S)
            dn, pieces = dense_tiles(
                first, last, dn, gl.where(half == 0, 0, pieces), layer, unscale, half == 0, big,
                small, xd, 0, dfull, dempty, rows, residual, TO_QKV + turn, TO_LOGITS + turn, S,
            )  # fmt: skip
            stamp(trace, layer, phase, ENDS, first < last, S)
        count += S.out_columns
        turn = turn_of(anew(layer), S)
        # ---- gate_up, and the choice of experts, then down
        stamp(trace, layer, ROUTER, BEGINS, True, S)
        unscale = 1.0
        for half in range(2):
            place, column, first, last = expert_share(half, anew(program), S)
            phase = gl.where(half == 0, GATE_UP, DOWN)
            works = (half == 0) | (first < last)
            stamp(trace, layer, phase, BEGINS, works, S)
            if works:
                if half == 0:
                    x = gate_up_slice(residual, moe_norms + layer * S.width, count, column, S)
                    x, unscale = scaled(x)
                else:
                    at = gate_up + turn + place * (S.gate_up_blocks * 128)
                    x = down_slice(at, factor, column, S)
                    x *= S.hidden_scale
                    unscale = 1.0 / S.hidden_scale
                store_fp8_terms(x, estore.index(0), 16, S.tiles.scales == "e4m3")
                unscale *= S.tiles.unscale
            if half == 0:
                ids, mixing, factor = choose(
                    layer, router_bias, residual, count, router_sums + turn, numbers, trace, S,
                )  # fmt: skip
                stamp(trace, layer, ROUTER, ENDS, True, S)
                seen_as(chosen, gl.int32, [4], FLAT).store(
                    pick(gl.arange(0, 4, layout=ONE), ids)
                )  # in one store: the compiler puts a barrier between two
                mbarrier.arrive(routed.index(0), count=1)
                weight = pick(expert_share(1, anew(program), S)[0], mixing)
            if half == 0:
                # All have read the other set, in the layer before; nobody adds to it before the
                # next layer, which begins when all have signed here.
                _clear(program, qkv + (turn_words(S) - turn), turn_words(S), S)
            slice_stored()
            if half == 0:
                sign(signed + 1)
            stamp(trace, layer, phase, READY, works, S)
            sums_at = residual + gl.where(half == 0, TO_GATE_UP + turn, 0)
            en, claims = expert_tiles(
                first, last, half == 0, en, claims, unscale,
                gl.where(half == 0, 1.0 / factor, 1.0), gl.where(half == 0, 1.0, weight),
                gl.where(half == 0, S.top_k * S.gate_up_blocks * 128, S.width), wbig, wsmall,
                wpairs, wrows, xe, efull, eempty, told, tellings, sums_at, S,
            )  # fmt: skip
            stamp(trace, layer, phase, ENDS, works, S)
        mbarrier.arrive(lent.index(0), count=1)
        count += S.top_k * S.down_columns
    head(
        dn, residual, final_norm, count, hstore, hscale, big, small, xh, dfull, dempty, head_scale,
        logits, draws, settings, seed, step, seen, words, launch + 1, trace, S,
    )  # fmt: skip
    if program == 0:
        gl.store(counter, launch + 1)
        if draws != 0:
            pick_token(words, launch + 1, token, position_ptr, step, seen, history, logprobs, S)


# Grid: one program a processor, all resident.
@gluon.jit(do_not_specialize=["draws"])
def step_kernel(
    token, position, settings, seed, step, seen, history, logprobs, counter, embedding, norms,
    moe_norms, final_norm, qkv_scale, qkv_bias, sinks, out_scale, out_bias, router, router_bias,
    head_scale, cos, sin, cache, cache_table, sums, tagged, logits, dense128, dense32, codes,
    more_codes, words, trace_ptr, draws, S: gl.constexpr,
):  # fmt: skip
    PLAIN: gl.constexpr = gl.NVMMASharedLayout(0, 8, rank=2)
    THREE: gl.constexpr = gl.NVMMASharedLayout(32, 8, rank=3)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    DENSE: gl.constexpr = S.dense_slots + S.lent_slots
    EXPERT: gl.constexpr = S.expert_slots
    # Both rings, each in two parts: the dense one first, so that what is lent stands behind it.
    BOXES: gl.constexpr = S.tiles.boxes
    pool = gl.allocate_shared_memory(gl.uint8, [S.all_slots, BOXES[0], 256], PLAIN)
    small_pool = gl.allocate_shared_memory(gl.uint8, [S.all_slots, BOXES[1], 256], PLAIN)
    escales = gl.allocate_shared_memory(gl.uint8, [EXPERT, BOXES[2], 256], PLAIN)
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
    lent = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    TOLD: gl.constexpr = S.told_slots
    told = gl.allocate_shared_memory(gl.int32, [TOLD, 1], LINE)
    tellings = gl.allocate_shared_memory(gl.int64, [TOLD, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(DENSE):
        mbarrier.init(dfull.index(s), count=1)
        mbarrier.init(dempty.index(s), count=1)
    for s in gl.static_range(EXPERT):
        mbarrier.init(efull.index(s), count=1)
        mbarrier.init(eempty.index(s), count=1)
    mbarrier.init(routed.index(0), count=1)
    mbarrier.init(lent.index(0), count=1)
    for s in gl.static_range(TOLD):
        mbarrier.init(tellings.index(s), count=1)
    _, _, _, _, signed = parts_of(sums, gl.load(counter), S)
    gl.warp_specialize(
        [
            (consumer, (token, position, settings, seed, step, seen, history, logprobs, counter,
                        embedding, norms, moe_norms, final_norm,
                        qkv_scale, qkv_bias, sinks, out_scale, out_bias, router, router_bias,
                        head_scale, cos, sin, cache, cache_table, sums,
                        tagged, logits, pool, small_pool, dfull, dempty, lent, escales, efull,
                        eempty, chosen, routed, told, tellings, xs, hscale, rows, qs, trace_ptr,
                        draws, S)),
            (dense_producer, (dense128, dense32, pool, small_pool, dfull, dempty, lent, S)),
            (expert_producer, (codes, more_codes, words, signed, pool, small_pool, escales,
                               efull, eempty, chosen, routed, told, tellings, S)),
        ],
        [1, 1],
        [40, 40],
    )  # fmt: skip
