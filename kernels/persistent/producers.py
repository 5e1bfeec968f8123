"""The two warps of a program that let the copy engine fill the rings."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.persistent.exchange import claim, claimed, wait_for_signatures
from kernels.persistent.gluon_names import copy_rows, seen_as
from kernels.persistent.shares import dense_slot, expert_share, share


@gluon.jit
def _dense_line(
    desc128, desc32, base, first, last, n, m, layer, big, small, full, empty, lent, S: gl.constexpr
):  # fmt: skip
    """Load the tiles from base + first to base + last, slot by slot.

    n, m: pieces so far in the ring's own slots, and of this layer; returned
    """
    for i in range((base + first) * S.pieces, (base + last) * S.pieces):
        slot, is_lent = dense_slot(n, m, S)
        bar = full.index(slot)
        if is_lent:
            mbarrier.wait(lent.index(0), (layer & 1) ^ 1)
        else:
            mbarrier.wait(empty.index(slot), ((n // S.dense_slots) & 1) ^ 1)
        mbarrier.expect(bar, 160 * 256)
        copy_rows(desc128, [i * 160, 0], bar, big.index(slot))
        copy_rows(desc32, [i * 160 + 128, 0], bar, small.index(slot))
        n += gl.where(is_lent, 0, 1)
        m += 1
    return n, m


@gluon.jit
def dense_producer(desc128, desc32, big, small, full, empty, lent, S: gl.constexpr):
    """One warp: every dense tile of this program, in the order in which they are multiplied.

    lent: passed once a layer, when the experts' ring has been read
    """
    PLAIN: gl.constexpr = gl.NVMMASharedLayout(0, 8, rank=2)
    big = seen_as(big, gl.uint8, [S.dense_slots + S.lent_slots, 128, 256], PLAIN)
    small = seen_as(small, gl.uint8, [S.dense_slots + S.lent_slots, 32, 256], PLAIN)
    program = gl.program_id(0)
    qkv_column, qkv0, qkv1 = share(program, S.width_columns, S.qkv_blocks, S)
    out_column, out0, out1 = share(program, S.out_columns, S.mixed_blocks, S)
    n = 0
    for layer in range(S.layers):
        base = layer * S.layer_tiles + qkv_column * S.qkv_blocks
        n, m = _dense_line(
            desc128, desc32, base, qkv0, qkv1, n, layer * 0, layer, big, small, full, empty, lent, S
        )
        base = layer * S.layer_tiles + S.qkv_tiles + out_column * S.mixed_blocks
        n, m = _dense_line(
            desc128, desc32, base, out0, out1, n, m, layer, big, small, full, empty, lent, S
        )
    first = S.head_blocks * program // S.programs * S.width_columns
    last = S.head_blocks * (program + 1) // S.programs * S.width_columns
    base = S.layers * S.layer_tiles
    m = n * 0 + S.dense_slots + S.lent_slots  # nothing is lent
    _dense_line(desc128, desc32, base, first, last, n, m, n, big, small, full, empty, lent, S)


@gluon.jit
def _expert_tile(
    codes, more_codes, words, tile, n, big, small, scales, full, S: gl.constexpr
):  # fmt: skip
    """Load a tile into the slot of the n-th, which is empty."""
    BOXES: gl.constexpr = S.tiles.boxes
    slot = n % S.expert_slots
    at = tile * S.tiles.rows
    bar = full.index(slot)
    mbarrier.expect(bar, (BOXES[0] + BOXES[1] + BOXES[2]) * 256)
    copy_rows(codes, [at, 0], bar, big.index(S.dense_pool + slot))
    copy_rows(more_codes, [at + BOXES[0], 0], bar, small.index(S.dense_pool + slot))
    copy_rows(words, [at + BOXES[0] + BOXES[1], 0], bar, scales.index(slot))


@gluon.jit
def expert_producer(
    codes, more_codes, words, signed, big, small, scales, full, empty, chosen, routed, told,
    tellings, S: gl.constexpr,
):  # fmt: skip
    """One warp: the tiles of the experts of each layer, once the routing is known.

    told, tellings: a ring in which the claimed blocks stand, and last -1
    """
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    ALL: gl.constexpr = S.top_k * S.gate_up_blocks
    GIVEN: gl.constexpr = S.gate_up_given * (S.programs // S.gate_up_columns)
    program = gl.program_id(0)
    n = 0
    m = 0
    for layer in range(S.layers):
        mbarrier.wait(routed.index(0), layer & 1)
        base = layer * S.experts
        _, column, i, given = expert_share(0, program, S)
        counter = signed + 2 + layer * S.gate_up_columns + column
        claims = claim(counter)
        more = True
        while more:
            mbarrier.wait(empty.index(n % S.expert_slots), ((n // S.expert_slots) & 1) ^ 1)
            if i >= given:
                i = GIVEN + claimed(claims)
                more = i < ALL
                seen_as(told.index(m % S.told_slots), gl.int32, [1], FLAT).store(
                    gl.zeros([1], gl.int32, layout=ONE) + gl.where(more, i, -1)
                )
                mbarrier.arrive(tellings.index(m % S.told_slots), count=1)
                m += 1
                claims = claim(counter)
            if more:
                place = i // S.gate_up_blocks
                expert = gl.sum(chosen.index(place).load(ONE), 0)
                tile = (base + expert) * S.expert_tiles + column * S.gate_up_blocks
                tile += i - place * S.gate_up_blocks
                _expert_tile(codes, more_codes, words, tile, n, big, small, scales, full, S)
                n += 1
                i += 1
        wait_for_signatures(signed + 1, (layer + 1) * S.programs)
        place, column, first, last = expert_share(1, program, S)
        expert = gl.sum(chosen.index(place).load(ONE), 0)
        tile0 = (base + expert) * S.expert_tiles + S.gate_up_tiles + column * S.down_blocks
        for block in range(first, last):
            mbarrier.wait(empty.index(n % S.expert_slots), ((n // S.expert_slots) & 1) ^ 1)
            _expert_tile(codes, more_codes, words, tile0 + block, n, big, small, scales, full, S)
            n += 1
