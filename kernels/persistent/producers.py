"""The two warps of a program that let the copy engine fill the rings."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.persistent import sizes
from kernels.persistent.exchange import wait_for_signatures
from kernels.persistent.gluon_names import copy_rows
from kernels.persistent.shares import expert_share, share

EXPERT_ROWS = gl.constexpr(sizes.EXPERT_ROWS)


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
