"""A program's tiles of a phase, one after the other as the rings bring them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.persistent.draw import consider, hand_in, nothing_found
from kernels.persistent.exchange import add_to_sums
from kernels.persistent.gluon_names import seen_as, wait_for_warps
from kernels.persistent.multiply import (
    dense_piece,
    expert_product,
    row_sums,
)
from kernels.persistent.shares import dense_slot
from kernels.persistent.slices import residual_slice, slice_stored, store_dense
from kernels.persistent.stamps import BEGINS, ENDS, READY, stamp


@gluon.jit
def _wait_full(full, n, slots: gl.constexpr):
    """Until the ring's tile n is there; its slot."""
    mbarrier.wait(full.index(n % slots), (n // slots) & 1)
    return n % slots


@gluon.jit
def dense_tile(n, m, layer, big, small, xs, x, full, empty, zero, S: gl.constexpr):
    """Sums [128, 8] of a tile.

    n, m: pieces so far in the ring's own slots, and of this layer; returned
    """
    acc = zero
    PIECES: gl.constexpr = S.pieces
    for piece in gl.static_range(PIECES):
        slot, is_lent = dense_slot(n, m, S)
        mbarrier.wait(full.index(slot), gl.where(is_lent, layer, n // S.dense_slots) & 1)
        acc = dense_piece(acc, big, small, xs, x + piece * 10, slot, piece == 0)
        mbarrier.arrive(empty.index(slot), count=1)  # of a lent one nobody waits for it
        n += gl.where(is_lent, 0, 1)
        m += 1
    return acc, n, m


@gluon.jit
def dense_tiles(
    first, last, n, m, layer, unscale, plain, big, small, xs, x, full, empty, rows, residual,
    to_qkv, to_logits, S: gl.constexpr,
):  # fmt: skip
    """Add tiles of one column: to the sums of qkv if plain, `to_qkv` words behind the residual's;
    else with scales and biases as staged to the residual, and the router's rows to the logits."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 8, 32 if S.fp8 else 16])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    zero = gl.zeros([128, 8], gl.float32, layout=MMA)
    lane = gl.arange(0, 128, layout=ROW)
    for block in range(first, last):
        acc, n, m = dense_tile(n, m, layer, big, small, xs, x, full, empty, zero, S)
        value = row_sums(acc, MMA, S.fp8) * unscale
        if S.fp8:
            scale = rows.index(S.most_blocks + (block - first) % S.most_blocks).load(ROW)
            value *= gl.where(plain, 1.0, scale)
        bias = rows.index((block - first) % S.most_blocks).load(ROW)
        value += gl.where(plain, 0.0, bias)
        # Behind the residual's rows stand the first terms of all experts, then the next ones.
        is_router = gl.where(plain, 0, block >= S.out_blocks) != 0
        row = (block * 128 + lane) & gl.where(is_router, S.padded_experts - 1, -1)
        further = gl.where(plain, to_qkv, gl.where(is_router, to_logits, 0))
        add_to_sums(residual + further + row, value, 1, row >= 0)
    return n, m


@gluon.jit
def expert_tiles(
    first, last, claims, n, m, unscale, bias_factor, mixing, limit, big, small, pairs, rows, xs,
    full, empty, told, tellings, sums, S: gl.constexpr,
):  # fmt: skip
    """Add tiles of one column and their biases times bias_factor to sums, all times mixing: blocks
    first to last - 1, then those that the producer has claimed if it does.

    n, m: tiles and tellings of the rings so far; returned
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 8, 32])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    zero = gl.zeros([128, 8], gl.float32, layout=MMA)
    more = True
    while more:
        for block in range(first, last):
            slot = _wait_full(full, n, S.expert_slots)
            value, bias = expert_product(big, small, pairs, rows, slot, empty, xs, zero, S)
            value = (value * unscale + bias * bias_factor) * mixing
            row = block * 128 + gl.arange(0, 128, layout=ROW)
            add_to_sums(sums + row, value, 1, row < limit)
            n += 1
        more = claims
        if claims:
            slot = m % S.told_slots
            mbarrier.wait(tellings.index(slot), (m // S.told_slots) & 1)
            first = gl.sum(seen_as(told.index(slot), gl.int32, [1], FLAT).load(ONE), 0)
            last = first + 1
            more = first >= 0
            m += 1
    wait_for_warps()  # the slice may be written again
    return n, m


@gluon.jit
def head(
    n, x_ptr, norm_ptr, count, store, hscale, big, small, xs, full, empty, scale_ptr, logits, draws,
    settings, seed, step, seen, words, tag, trace, S: gl.constexpr,
):  # fmt: skip
    """Logits: the whole residual times this program's blocks of rows; if it draws, the best of its
    tokens is published in words."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 8, 32 if S.fp8 else 16])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    FIRST: gl.constexpr = S.dense_slots * 128 // S.slice_groups
    squares = 0.0
    stamp(trace, S.layers, 0, BEGINS, True, S)
    for column in range(S.width_columns):
        _, x, ss = residual_slice(x_ptr, norm_ptr, count, column, S)
        squares += gl.sum(ss, 0)
        unscale = store_dense(x, store, FIRST + column, S)
        hscale.index(column).store(gl.zeros([1], gl.float32, layout=ONE) + unscale)
    factor = gl.rsqrt(squares / S.width + S.eps)
    slice_stored()
    stamp(trace, S.layers, 0, READY, True, S)
    lane = gl.arange(0, 128, layout=gl.SliceLayout(1, MMA))
    zero = gl.zeros([128, 8], gl.float32, layout=MMA)
    m = n * 0 + S.dense_slots + S.lent_slots  # nothing is lent
    # The slices stand where the experts' tiles did.
    SLICES: gl.constexpr = S.dense_slots * 128
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
            part, n, _ = dense_tile(
                n, m, n, big, small, xs, SLICES + column * S.slice_groups, full, empty, zero, S
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
