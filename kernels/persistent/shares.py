"""Which program does what in a phase, and where the words lie that programs add to."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
def dense_slot(n, m, S: gl.constexpr):
    """The slot of a layer's m-th piece of dense weights, of which n have gone to the ring's own
    slots so far; and whether the experts' ring has lent it.

    A layer's pieces behind the first `dense_slots` go to lent slots: these are free from the end of
    the layer before, when the memory has least to do, and are read before experts are known.
    """
    is_lent = (m >= S.dense_slots) & (m < S.dense_slots + S.lent_slots)
    return gl.where(is_lent, m, n % S.dense_slots), is_lent


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
def router_duty(program, S: gl.constexpr):
    """A program's place in the order in which programs take parts of the router: that of attention,
    but for the programs that have a kv head while the cache is short, which come last."""
    place = attention_duty(program, S) - S.kv_heads
    return gl.where(place < 0, place + S.programs, place)


@gluon.jit
def expert_share(half, program, S: gl.constexpr):
    """A program's part of gate_up (half 0) or down (1) of the chosen experts.

    All experts' gate_up multiply the same vector: their blocks of rows count on from one chosen
    expert to the next. The first of them are given out here, the others are claimed. Down's have a
    vector each: a program has tiles of one expert, and all are given out.

    Returns the expert's place among the chosen (down), the column of tiles, first and last + 1
    block.
    """
    EACH: gl.constexpr = S.programs // S.gate_up_columns
    column, first, last = share(program, S.gate_up_columns, S.gate_up_given * EACH, S)
    place = 0
    if half == 1:
        column, first, last = share(program, S.top_k * S.down_columns, S.down_blocks, S)
        place = gl.minimum(column // S.down_columns, S.top_k - 1)
        column -= place * S.down_columns
    return place, column, first, last


@gluon.jit
def turn_words(S: gl.constexpr):
    """Words of the sums of qkv, gate_up and the router, of which layers use two sets in turn."""
    return (S.qkv_blocks + S.top_k * S.gate_up_blocks) * 128 + S.padded_experts


@gluon.jit
def turn_of(layer, S: gl.constexpr):
    """Words from the first set to the one that a layer uses."""
    return (layer & 1) * turn_words(S)


@gluon.jit
def sum_words(S: gl.constexpr):
    """Words of one set of sums."""
    return S.out_blocks * 128 + 2 * turn_words(S) + 2 + S.layers * S.gate_up_columns


@gluon.jit
def parts_of(sums, launch, S: gl.constexpr):
    """Sums of a launch: residual, those of qkv, gate_up and the router for layers with an even
    number (turn_words further for the others), two of signatures of the residual's readers. Behind
    these stands for each layer and column of gate_up how many of its tiles have been claimed.

    There are two sets: a launch uses one and clears the other.
    """
    residual = sums + (launch & 1) * sum_words(S)
    qkv = residual + S.out_blocks * 128
    gate_up = qkv + S.qkv_blocks * 128
    router = gate_up + S.top_k * S.gate_up_blocks * 128
    return residual, qkv, gate_up, router, qkv + 2 * turn_words(S)
