"""The persistent program of the grouped GEMM: a warp that copies, groups of four that multiply.

Weights are the left operand, decoded from a tile into registers; x is the right one, read where the
copy engine has put it. So nothing is written to shared memory but by the copy engine, and no fence
waits for what is under way. While one group decodes another multiplies.

A program takes one item after the other, as it comes to it: a block of pairs and three units of
weights, tiles or halves of tiles one below the other, one for each group. The block's tokens come
64 columns at a time, which is a step; a block of which at most half is there as half of one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.persistent.gluon_names import copy_rows, seen_as
from kernels.persistent.slices import swiglu
from kernels.tile_gemm.operands import operand, operand_views
from kernels.tile_gemm.sizes import CONSUMERS, STEP_COLUMNS, STEPS

_EACH = gl.constexpr(CONSUMERS)
_STEP = gl.constexpr(STEP_COLUMNS)
_STEPS = gl.constexpr(STEPS)
UNSCALE = gl.constexpr(2.0**64)  # of what operand() gives, but for scales in fp32
_DONE = gl.constexpr(-1)


@gluon.jit
def _copy_units(
    codes_desc, words_desc, expert, column, first, m, codes, words, full, empty, S: gl.constexpr
):  # fmt: skip
    """Load the units from `first` on, as far as they are there, of a column into the m-th slot."""
    CHUNKS: gl.constexpr = S.tiles.chunks
    HEIGHT: gl.constexpr = S.chunk_rows
    PARTS: gl.constexpr = 128 // S.unit_rows
    slot = m % S.unit_slots
    bar = full.index(slot)
    mbarrier.wait(empty.index(slot), ((m // S.unit_slots) & 1) ^ 1)
    tiles = expert * S.tiles_per_expert + S.first_tile + column * S.down
    for which in gl.static_range(_EACH):
        if first + which >= S.units:
            mbarrier.arrive(bar, count=1)
        else:
            mbarrier.expect(bar, S.unit_bytes)
            at = (tiles + (first + which) // PARTS) * S.tiles.rows
            codes_at = at + (first + which) % PARTS * HEIGHT
            unit = slot * _EACH + which
            for c in gl.static_range(CHUNKS):
                copy_rows(codes_desc, [codes_at + c * 16, 0], bar, codes.index(unit * CHUNKS + c))
            copy_rows(words_desc, [at + CHUNKS * 16, 0], bar, words.index(unit))


@gluon.jit
def producer(work, sources, rings, S: gl.constexpr):
    """One warp: claims items, tells the others, and loads what they multiply."""
    block_expert, block_rows, pairs, groups = work
    x_desc, codes_desc, words_desc, claims, blocks = sources
    xs, codes, words, xfull, xempty, full, empty, told, tellings, heard = rings
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    M: gl.constexpr = S.block_rows
    HALF: gl.constexpr = S.block_rows // 2
    item = gl.program_id(0)
    n = 0  # steps of x so far
    m = 0  # slots of units
    i = 0  # items
    more = True
    while more:
        block = gl.minimum(item // groups, blocks - 1)
        expert = gl.load(block_expert + block)
        more = (item < blocks * groups) & (expert < S.experts)
        mbarrier.wait(heard.index(i & 1), ((i >> 1) & 1) ^ 1)
        seen_as(told.index(i & 1), gl.int32, [1], FLAT).store(
            gl.zeros([1], gl.int32, layout=ONE) + gl.where(more, item, _DONE)
        )
        mbarrier.arrive(tellings.index(i & 1), count=1)
        i += 1
        if more:
            following = S.programs + gl.atomic_add(claims, 1, sem="relaxed")
            is_half = gl.load(block_rows + block * M + HALF) == pairs
            first = item % groups * _EACH
            for column in range(S.across):
                _copy_units(
                    codes_desc, words_desc, expert, column, first, m, codes, words, full, empty, S
                )
                m += 1
                for step in range(_STEPS):
                    slot = n % S.x_slots
                    bar = xfull.index(slot)
                    mbarrier.wait(xempty.index(slot), ((n // S.x_slots) & 1) ^ 1)
                    mbarrier.expect(bar, HALF * _STEP * 2, pred=is_half)
                    mbarrier.expect(bar, M * _STEP * 2, pred=is_half == 0)
                    at = (column * _STEPS + step) * _STEP
                    copy_rows(x_desc, [block * M, at], bar, xs.index(slot * 2))
                    if is_half == 0:
                        copy_rows(x_desc, [block * M + HALF, at], bar, xs.index(slot * 2 + 1))
                    n += 1
            item = following


@gluon.jit
def _store(
    acc, unit, block, expert, work, results, MMA: gl.constexpr, PAIRS: gl.constexpr,
    S: gl.constexpr,
):  # fmt: skip
    """Sums [rows, PAIRS] of a unit with scale and bias: their activation, or times the expert's
    weight."""
    _, block_rows, pairs, _ = work
    tiles_ptr, bias_ptr, expert_weights, out_ptr = results
    ROWS: gl.constexpr = S.unit_rows
    # Where the threads hand sums to each other: one has four rows that are neighbours.
    MANY: gl.constexpr = [[0, 16], [0, 32], [0, 64]] if PAIRS == 128 else [[0, 16], [0, 32]]
    PAIR_BITS: gl.constexpr = [[0, 16]] if PAIRS == 32 else MANY
    LAST_ROW: gl.constexpr = [[64, 0]] if ROWS == 128 else []
    LAST_PLACE: gl.constexpr = [[32, 0]] if ROWS == 128 else []
    BY_ROWS: gl.constexpr = gl.DistributedLinearLayout(
        [[1, 0], [2, 0], [8, 0]] + LAST_ROW + PAIR_BITS,
        [[0, 2], [0, 4], [0, 1], [0, 8], [4, 0]], [[16, 0], [32, 0]], [], [ROWS, PAIRS],
    )  # fmt: skip
    PLACES: gl.constexpr = gl.DistributedLinearLayout(
        [[1, 0], [2, 0]] + LAST_PLACE + PAIR_BITS,
        [[0, 2], [0, 4], [0, 1], [0, 8], [8, 0]], [[4, 0], [16, 0]], [], [ROWS // 2, PAIRS],
    )  # fmt: skip
    in_unit = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    row = unit * ROWS + in_unit
    factor: gl.constexpr = 1.0 if S.tiles.scales == "fp32" else UNSCALE
    if S.tiles.scales != "e8m0":
        # The rows' own word: the first of 8 bits, the last of 4.
        OWN: gl.constexpr = 0 if S.tiles.bits == 8 else S.tiles.words - 1
        tile = expert * S.tiles_per_expert + S.first_tile + unit * ROWS // 128
        at = tile.to(gl.int64) * S.tiles.bytes + S.tiles.code_bytes + OWN * 512
        words = (tiles_ptr + at).to(gl.pointer_type(gl.float32), bitcast=True)
        acc *= gl.load(words + unit * ROWS % 128 + in_unit)[:, None]
    bias = gl.load(bias_ptr + expert * S.rows + row, mask=row < S.rows, other=0.0)
    acc = gl.convert_layout(acc * factor + bias.to(gl.float32)[:, None], BY_ROWS)
    if S.gated:
        gate, up = gl.split(acc.reshape([ROWS // 2, 2, PAIRS]).permute([0, 2, 1]))
        LIMIT: gl.constexpr = S.limit
        ALPHA: gl.constexpr = S.alpha
        OFFSET: gl.constexpr = S.offset
        hidden = swiglu(gate, up, LIMIT, ALPHA, OFFSET)
        # In the order in which the next product reads columns, see operands.py.
        if S.tiles.bits == 4:
            hidden = hidden.reshape([ROWS // 32, 4, 2, 2, PAIRS]).permute([0, 2, 1, 3, 4])
        else:
            hidden = hidden.reshape([ROWS // 64, 4, 2, 2, 2, PAIRS]).permute([0, 2, 3, 1, 4, 5])
        hidden = hidden.reshape([ROWS // 2, PAIRS]).to(gl.bfloat16)
        hidden = gl.convert_layout(hidden, PLACES, assert_trivial=S.tiles.bits == 4)
        place = unit * (ROWS // 2) + gl.arange(0, ROWS // 2, layout=gl.SliceLayout(1, PLACES))
        at = block * S.block_rows + gl.arange(0, PAIRS, layout=gl.SliceLayout(0, PLACES))
        out = out_ptr + at.to(gl.int64)[None, :] * S.out_columns + place[:, None]
        gl.store(out, hidden, mask=(place < S.rows // 2)[:, None])
    else:
        row = unit * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, BY_ROWS))
        at = block * S.block_rows + gl.arange(0, PAIRS, layout=gl.SliceLayout(0, BY_ROWS))
        pair = gl.load(block_rows + at)
        weight = gl.load(expert_weights + pair, mask=pair < pairs, other=0.0)
        out = out_ptr + pair.to(gl.int64)[None, :] * S.out_columns + row[:, None]
        gl.store(out, acc * weight[None, :], mask=(row < S.rows)[:, None] & (pair < pairs)[None, :])


@gluon.jit
def _item(
    unit, block, expert, which: gl.constexpr, n, m, work, results, xs, codes, words, numbers, xfull,
    xempty, full, empty, PAIRS: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """A unit's rows times a block of pairs; n, m: steps and slots so far, returned."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAIRS, 16])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    APART: gl.constexpr = S.block_rows // PAIRS  # views of xs that are a slot
    ROWS: gl.constexpr = S.unit_rows
    half = unit % (128 // S.unit_rows)
    acc = gl.zeros([ROWS, PAIRS], gl.float32, layout=MMA)
    for _ in range(S.across):
        slot = m % S.unit_slots
        at = slot * _EACH + which
        mbarrier.wait(full.index(slot), (m // S.unit_slots) & 1)
        for step in range(_STEPS):
            x_slot = n % S.x_slots
            if unit < S.units:
                a = operand(codes, words, at, half, step, MMA, S)
                mbarrier.wait(xfull.index(x_slot), (n // S.x_slots) & 1)
                x = xs.index(x_slot * APART).permute([1, 0])
                if S.tiles.scales == "fp32":
                    part = warpgroup_mma(a, x, acc, use_acc=False, is_async=True)
                    scale = numbers.index((at * (S.words_rows // 2) + 1) * 128 + step).load(ONE)
                    acc += warpgroup_mma_wait(0, deps=[part]) * gl.sum(scale, 0)
                else:
                    acc = warpgroup_mma(a, x, acc, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=[acc])
            else:
                mbarrier.wait(xfull.index(x_slot), (n // S.x_slots) & 1)
            mbarrier.arrive(xempty.index(x_slot), count=1)
            n += 1
        mbarrier.arrive(empty.index(slot), count=1)
        m += 1
    if unit < S.units:
        _store(acc, unit, block, expert, work, results, MMA, PAIRS, S)
    return n, m


@gluon.jit
def consumer(which: gl.constexpr, work, results, rings, S: gl.constexpr):
    """Four warps: of each item the unit with number `which`."""
    block_expert, block_rows, pairs, groups = work
    xs, codes, words, xfull, xempty, full, empty, told, tellings, heard = rings
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    M: gl.constexpr = S.block_rows
    WORDS: gl.constexpr = S.unit_slots * _EACH * S.words_rows * 64
    x_blocks = seen_as(xs, gl.bfloat16, [S.x_slots, M, 64], SWIZZLED)
    numbers = seen_as(words, gl.float32, [WORDS, 1], FLAT)
    codes, words = operand_views(codes, words, S)
    n = 0
    m = 0
    i = 0
    more = True
    while more:
        mbarrier.wait(tellings.index(i & 1), (i >> 1) & 1)
        item = gl.sum(seen_as(told.index(i & 1), gl.int32, [1], FLAT).load(ONE), 0)
        mbarrier.arrive(heard.index(i & 1), count=1)
        i += 1
        more = item >= 0
        if more:
            block = item // groups
            unit = item % groups * _EACH + which
            expert = gl.load(block_expert + block)
            if gl.load(block_rows + block * M + M // 2) == pairs:  # the rest is empty
                n, m = _item(
                    unit, block, expert, which, n, m, work, results, xs, codes, words, numbers,
                    xfull, xempty, full, empty, M // 2, S,
                )  # fmt: skip
            else:
                n, m = _item(
                    unit, block, expert, which, n, m, work, results, x_blocks, codes, words,
                    numbers, xfull, xempty, full, empty, M, S,
                )  # fmt: skip


# Grid: one program a processor.
@gluon.jit(do_not_specialize=["pairs", "blocks", "groups"])
def gemm_kernel(
    x_desc,  # [blocks * M, K] bf16, columns in the order of operands.py
    codes_desc,  # rows of 256 bytes of the tiles, as many at once as a unit's codes of a chunk
    words_desc,  # as many as a tile's words
    tiles_ptr,  # [E, tiles, bytes]
    bias_ptr,  # [E, N]
    block_expert,  # [blocks] int32; E and more: no work, as all behind it
    block_rows,  # [blocks, M] int32: pairs
    expert_weights,  # [pairs] fp32, read unless gated
    claims,  # [1] int32, zero
    out_ptr,  # [blocks * M, F] bf16 in the order of x if gated, else [pairs, N] fp32
    pairs,
    blocks,
    groups,  # S.groups, not as a constant: the compiler fails where it is one
    S: gl.constexpr,
):
    PLAIN: gl.constexpr = gl.NVMMASharedLayout(0, 8, rank=2)
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    X: gl.constexpr = S.x_slots
    UNITS: gl.constexpr = S.unit_slots
    xs = gl.allocate_shared_memory(gl.bfloat16, [X * 2, S.block_rows // 2, 64], SWIZZLED)
    CODES: gl.constexpr = [S.unit_slots * _EACH * S.tiles.chunks, S.chunk_rows, 256]
    WORDS: gl.constexpr = [S.unit_slots * _EACH, S.words_rows, 256]
    codes = gl.allocate_shared_memory(gl.uint8, CODES, PLAIN)
    words = gl.allocate_shared_memory(gl.uint8, WORDS, PLAIN)
    told = gl.allocate_shared_memory(gl.int32, [2, 1], LINE)
    xfull = gl.allocate_shared_memory(gl.int64, [X, 1], mbarrier.MBarrierLayout())
    xempty = gl.allocate_shared_memory(gl.int64, [X, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [UNITS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [UNITS, 1], mbarrier.MBarrierLayout())
    tellings = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(X):
        mbarrier.init(xfull.index(s), count=1)
        mbarrier.init(xempty.index(s), count=_EACH)
    for s in gl.static_range(UNITS):
        mbarrier.init(full.index(s), count=_EACH)
        mbarrier.init(empty.index(s), count=_EACH)
    for s in gl.static_range(2):
        mbarrier.init(tellings.index(s), count=1)
        mbarrier.init(heard.index(s), count=_EACH)
    rings = (xs, codes, words, xfull, xempty, full, empty, told, tellings, heard)
    work = (block_expert, block_rows, pairs, groups)
    sources = (x_desc, codes_desc, words_desc, claims, blocks)
    results = (tiles_ptr, bias_ptr, expert_weights, out_ptr)
    gl.warp_specialize(
        [
            (consumer, (0, work, results, rings, S)),
            (consumer, (1, work, results, rings, S)),
            (consumer, (2, work, results, rings, S)),
            (producer, (work, sources, rings, S)),
        ],
        [4, 4, 1],
        [152, 152, 40],
    )
