"""A tile of weights times a slice of the vector, on tensor cores.

The weights are the operand of 128 rows; the vector stands in columns of the other, as three terms
that add up to it: of bf16, or of E4M3, each 2^-4 of the last (12 bits in all, as fp16 has). A slice
has one power of two in front, so that E4M3 holds its largest number. In E4M3 groups of 32 with an
even number stand in columns 0 to 2, the others in columns 4 to 6: two of an expert's groups share
an instruction's sums and keep apart what their scales multiply. For scales of 16 columns (NVFP4)
that is so with the halves of each group.

E2M1 codes become E4M3 in registers: value times 2^-6, exact. A 32-bit word holds eight codes, four
of row r in bits 7 and 4..2 of its bytes, four of row r + 8 in bit 5 and bits 6, 1, 0.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.persistent.gluon_names import seen_as

_DECODE = gl.constexpr(
    "{ .reg .b32 t, u;\n"
    + "\n".join(
        f"and.b32 ${2 * i}, ${8 + i}, 0x9C9C9C9C; shl.b32 t, ${8 + i}, 2; shr.u32 u, ${8 + i}, 2;"
        f"and.b32 t, t, 0x8C8C8C8C; lop3.b32 ${2 * i + 1}, u, 0x10101010, t, 0xEA;"
        for i in range(4)
    )
    + "}"
)


@gluon.jit
def decode_words(words):
    """[8, 8, 4, 4] int32 words of a chunk -> two operands [128, 32] of E4M3 (value * 2^-6)."""
    t0, t1, t2, t3, t4, t5, t6, t7 = gl.inline_asm_elementwise(
        _DECODE, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r", [words],
        dtype=(gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8),
        is_pure=True, pack=4,
    )  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 8, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    a0 = gl.join(
        gl.join(t0, t1), gl.join(t2, t3)
    )  # [warp, row, 4 columns, byte, row + 8, 16 columns]
    a1 = gl.join(gl.join(t4, t5), gl.join(t6, t7))
    a0 = a0.permute([0, 4, 1, 5, 2, 3]).reshape([128, 32]).to(gl.float8e4nv, bitcast=True)
    a1 = a1.permute([0, 4, 1, 5, 2, 3]).reshape([128, 32]).to(gl.float8e4nv, bitcast=True)
    a0 = gl.convert_layout(a0, OPERAND, assert_trivial=True)
    return a0, gl.convert_layout(a1, OPERAND, assert_trivial=True)


@gluon.jit
def _times_group(a, xs, x, p, FIRST: gl.constexpr):
    """Operand a [128, 32] times group x of the slice, added to the sums p but for the first."""
    return warpgroup_mma(a, xs.index(x).permute([1, 0]), p, use_acc=not FIRST, is_async=True)


@gluon.jit
def _chunk(words, xs, x, zero):
    """Sums of two groups: columns 0 to 3 of the one, 4 to 7 of the other."""
    a0, a1 = decode_words(words)
    return _times_group(a1, xs, x + 1, _times_group(a0, xs, x, zero, True), False)


@gluon.jit
def _chunk_in_halves(words, xs, x, zero):
    """Sums of each of two groups: columns 0 to 3 of its first half, 4 to 7 of the second."""
    a0, a1 = decode_words(words)
    return _times_group(a0, xs, x, zero, True), _times_group(a1, xs, x + 1, zero, True)


@gluon.jit
def _stored_chunks(codes, c, xs, x, zero):
    """As _chunk, of E4M3 codes that the tensor cores read where the copy engine put them."""
    p = _times_group(codes.index(c), xs, x, zero, True)
    return _times_group(codes.index(c + 1), xs, x + 1, p, False)


@gluon.jit
def _stored_pairs(big, small, unit, xs, zero):
    """Sums of the five pairs of groups of a tile of 8 bits, under way."""
    p0 = _stored_chunks(big, unit * 8, xs, 0, zero)
    p1 = _stored_chunks(big, unit * 8 + 2, xs, 2, zero)
    p2 = _stored_chunks(big, unit * 8 + 4, xs, 4, zero)
    p3 = _stored_chunks(big, unit * 8 + 6, xs, 6, zero)
    return p0, p1, p2, p3, _stored_chunks(small, unit * 2, xs, 8, zero)


@gluon.jit
def _scale(words, BYTE: gl.constexpr):
    """Byte of each word [128, 2], E8M0, as the power of two that it stands for."""
    if BYTE == 0:
        bits = (words & 0xFF) << 23
    elif BYTE == 1:
        bits = (words & 0xFF00) << 15
    elif BYTE == 2:
        bits = (words & 0xFF0000) << 7
    else:
        bits = (words >> 1) & 0x7F800000
    return bits.to(gl.float32, bitcast=True)[:, :, None]


@gluon.jit
def _small_scale(words, BYTE: gl.constexpr):
    """Byte of each word [128, 2], as pack.py has E4M3 scales, as 2^-8 of what it stands for."""
    if BYTE == 0:
        bits = words << 20
    elif BYTE == 1:
        bits = words << 12
    elif BYTE == 2:
        bits = words << 4
    else:
        bits = words >> 4
    bits = (bits & 0x0FF00000) | 0x30000000
    return bits.to(gl.float32, bitcast=True)[:, :, None]


# As the layout of sums [128, 8], of which eight columns are two groups of four: a thread has two
# columns of rows r and r + 8, and four threads have those rows.
SUMS_OF_PAIRS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0]], [[0, 0, 2], [0, 1, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0], [64, 0, 0]], [], [128, 2, 4],
    )
)  # fmt: skip


@gluon.jit
def _scaled_pair(p, scale):
    """Sums of two groups, each with its scale [128, 2, 1], as [128, 2, 4]."""
    return gl.convert_layout(p.reshape([128, 2, 4]), SUMS_OF_PAIRS, assert_trivial=True) * scale


@gluon.jit
def _load_codes(big, small, unit):
    """Words of codes of one tile of 4 bits."""
    WORDS: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [8, 1, 1, 1], [3, 2, 1, 0])
    w0, w1 = big.index(unit * 4).load(WORDS), big.index(unit * 4 + 1).load(WORDS)
    w2, w3 = big.index(unit * 4 + 2).load(WORDS), big.index(unit * 4 + 3).load(WORDS)
    return w0, w1, w2, w3, small.index(unit).load(WORDS)


@gluon.jit
def _scaled_groups(sums, s, rest):
    """Sums of five pairs of groups, under way, times their scales in E8M0: [128, 2, 4].

    s: words [128, 2] of the first four pairs; rest: [128], whose low bytes are the last pair's
    """
    PAIRS: gl.constexpr = gl.SliceLayout(2, SUMS_OF_PAIRS)
    p0, p1, p2, p3, p4 = sums
    p0, p1, p2, p3 = warpgroup_mma_wait(2, deps=[p0, p1, p2, p3])
    acc = _scaled_pair(p0, _scale(s, 0)) + _scaled_pair(p1, _scale(s, 1))
    acc += _scaled_pair(p2, _scale(s, 2))
    acc += _scaled_pair(p3, _scale(s, 3))
    shift = 23 - 8 * gl.arange(0, 2, layout=gl.SliceLayout(0, PAIRS))
    last = ((rest[:, None] << shift[None, :]) & 0x7F800000).to(gl.float32, bitcast=True)
    p4 = warpgroup_mma_wait(0, deps=[p4])
    return acc + _scaled_pair(p4, last[:, :, None])


@gluon.jit
def _mxfp4(big, small, pairs, rows, slot, unit, empty, xs, zero):
    """See expert_product."""
    PAIRS: gl.constexpr = gl.SliceLayout(2, SUMS_OF_PAIRS)
    w0, w1, w2, w3, w4 = _load_codes(big, small, unit)
    s = pairs.index(slot * 2).permute([1, 0]).load(PAIRS)
    rest = rows.index(slot * 4 + 2).load(gl.SliceLayout(1, PAIRS))
    mbarrier.arrive(empty.index(slot), count=1)
    p0, p1 = _chunk(w0, xs, 0, zero), _chunk(w1, xs, 2, zero)
    p2, p3 = _chunk(w2, xs, 4, zero), _chunk(w3, xs, 6, zero)
    return _scaled_groups((p0, p1, p2, p3, _chunk(w4, xs, 8, zero)), s, rest), rest


@gluon.jit
def _nvfp4(big, small, pairs, rows, slot, unit, empty, xs, zero):
    """See expert_product."""
    PAIRS: gl.constexpr = gl.SliceLayout(2, SUMS_OF_PAIRS)
    ROWS: gl.constexpr = gl.SliceLayout(1, PAIRS)
    w0, w1, w2, w3, w4 = _load_codes(big, small, unit)
    s0 = pairs.index(slot * 4).permute([1, 0]).load(PAIRS)
    s1 = pairs.index(slot * 4 + 1).permute([1, 0]).load(PAIRS)
    s2 = pairs.index(slot * 4 + 2).permute([1, 0]).load(PAIRS)
    rest = rows.index(slot * 8 + 4).load(ROWS)
    factor = rows.index(slot * 8 + 6).load(ROWS).to(gl.float32, bitcast=True)
    mbarrier.arrive(empty.index(slot), count=1)
    p0, p1 = _chunk_in_halves(w0, xs, 0, zero)
    p2, p3 = _chunk_in_halves(w1, xs, 2, zero)
    p4, p5 = _chunk_in_halves(w2, xs, 4, zero)
    p6, p7 = _chunk_in_halves(w3, xs, 6, zero)
    p8, p9 = _chunk_in_halves(w4, xs, 8, zero)
    p0, p1, p2, p3 = warpgroup_mma_wait(6, deps=[p0, p1, p2, p3])
    acc = _scaled_pair(p0, _small_scale(s0, 0)) + _scaled_pair(p1, _small_scale(s0, 1))
    acc += _scaled_pair(p2, _small_scale(s0, 2))
    acc += _scaled_pair(p3, _small_scale(s0, 3))
    p4, p5, p6, p7 = warpgroup_mma_wait(2, deps=[p4, p5, p6, p7])
    acc += _scaled_pair(p4, _small_scale(s1, 0))
    acc += _scaled_pair(p5, _small_scale(s1, 1))
    acc += _scaled_pair(p6, _small_scale(s1, 2))
    acc += _scaled_pair(p7, _small_scale(s1, 3))
    p8, p9 = warpgroup_mma_wait(0, deps=[p8, p9])
    acc += _scaled_pair(p8, _small_scale(s2, 0))
    acc += _scaled_pair(p9, _small_scale(s2, 1))
    return acc * factor[:, None, None], rest


@gluon.jit
def _mxfp8(big, small, pairs, rows, slot, unit, empty, xs, zero):
    """See expert_product."""
    PAIRS: gl.constexpr = gl.SliceLayout(2, SUMS_OF_PAIRS)
    s = pairs.index(slot * 2).permute([1, 0]).load(PAIRS)
    rest = rows.index(slot * 4 + 2).load(gl.SliceLayout(1, PAIRS))
    acc = _scaled_groups(_stored_pairs(big, small, unit, xs, zero), s, rest)
    mbarrier.arrive(empty.index(slot), count=1)
    return acc, rest


@gluon.jit
def _fp8(big, small, numbers, rows, slot, unit, empty, xs, zero):
    """See expert_product; numbers: the words of all slots as fp32, one by one."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, SUMS_OF_PAIRS))
    p0, p1, p2, p3, p4 = _stored_pairs(big, small, unit, xs, zero)
    factor = rows.index(slot * 4).load(ROWS).to(gl.float32, bitcast=True)
    rest = rows.index(slot * 4 + 2).load(ROWS)
    at = (slot * 4 + 1) * 128
    s0 = gl.sum(numbers.index(at).load(ONE), 0)
    s1 = gl.sum(numbers.index(at + 1).load(ONE), 0)
    s2 = gl.sum(numbers.index(at + 2).load(ONE), 0)
    s3 = gl.sum(numbers.index(at + 3).load(ONE), 0)
    s4 = gl.sum(numbers.index(at + 4).load(ONE), 0)
    p0, p1, p2, p3, p4 = warpgroup_mma_wait(0, deps=[p0, p1, p2, p3, p4])
    mbarrier.arrive(empty.index(slot), count=1)
    acc = p0 * s0 + p1 * s1 + p2 * s2 + p3 * s3 + p4 * s4
    acc = gl.convert_layout(acc.reshape([128, 2, 4]), SUMS_OF_PAIRS, assert_trivial=True)
    return acc * factor[:, None, None], rest


@gluon.jit
def expert_product(big, small, pairs, rows, slot, empty, xs, zero, S: gl.constexpr):
    """A tile of an expert, 320 columns, times a slice: its rows' sums [128], to be multiplied by
    S.tiles.unscale, and the biases [128] that it carries. Its slot is given back.

    big, small, pairs, rows: the ring's slots, see expert_views
    xs: the slice of the vector as E4M3 terms, [.., 8, 32]
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 8, 32])
    unit = S.dense_pool + slot
    if S.tiles.bits == 4:
        if S.tiles.scales == "e4m3":
            acc, rest = _nvfp4(big, small, pairs, rows, slot, unit, empty, xs, zero)
        else:
            acc, rest = _mxfp4(big, small, pairs, rows, slot, unit, empty, xs, zero)
    elif S.tiles.scales == "e8m0":
        acc, rest = _mxfp8(big, small, pairs, rows, slot, unit, empty, xs, zero)
    else:
        acc, rest = _fp8(big, small, pairs, rows, slot, unit, empty, xs, zero)
    acc = gl.convert_layout(acc.reshape([128, 8]), MMA, assert_trivial=True)
    bias = (rest & -65536).to(gl.float32, bitcast=True)
    bias = gl.convert_layout(bias, gl.SliceLayout(1, MMA), assert_trivial=True)
    return row_sums(acc, MMA, True), bias


@gluon.jit
def expert_views(big, small, ewords, S: gl.constexpr):
    """The ring of experts' tiles as it is multiplied: codes in two parts, behind those of the dense
    ring; the words of rows in pairs [.., 2, 128] (one by one where scales are fp32), and as rows
    [.., 128]."""
    SLOTS: gl.constexpr = S.expert_slots
    WORDS: gl.constexpr = S.tiles.boxes[2] // 2  # 128 of them are two rows of a box
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    FLAT2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    if S.tiles.bits == 4:
        FLAT4: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[3, 2, 1, 0])
        big = seen_as(big, gl.int32, [S.all_slots * 4, 8, 8, 4, 4], FLAT4)
        small = seen_as(small, gl.int32, [S.all_slots, 8, 8, 4, 4], FLAT4)
    else:
        SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(32, 8, rank=2)
        big = seen_as(big, gl.float8e4nv, [S.all_slots * 8, 128, 32], SWIZZLED)
        small = seen_as(small, gl.float8e4nv, [S.all_slots * 2, 128, 32], SWIZZLED)
    if S.tiles.scales == "fp32":
        pairs = seen_as(ewords, gl.float32, [SLOTS * WORDS * 128, 1], FLAT)
    else:
        pairs = seen_as(ewords, gl.int32, [SLOTS * WORDS // 2, 2, 128], FLAT2)
    return big, small, pairs, seen_as(ewords, gl.int32, [SLOTS * WORDS, 128], FLAT)


@gluon.jit
def dense_piece(p, big, small, xs, x, slot, FIRST: gl.constexpr):
    """A slot of dense weights, ten chunks, added to the sums p [128, 8].

    big, small: the ring's slots as chunks [128, 32 bytes]; chunks 0 to 7 of a slot stand in big
    xs: [.., 8, 32 bytes] terms, x: the first group of the slice that is multiplied
    FIRST: whether p is nothing yet
    """
    for c in gl.static_range(8):
        p = warpgroup_mma(
            big.index(slot * 8 + c), xs.index(x + c).permute([1, 0]), p,
            use_acc=not (FIRST and c == 0), is_async=True,
        )  # fmt: skip
    for c in gl.static_range(2):
        p = warpgroup_mma(
            small.index(slot * 2 + c), xs.index(x + 8 + c).permute([1, 0]), p, is_async=True
        )  # fmt: skip
    return warpgroup_mma_wait(0, deps=[p])


@gluon.jit
def power_of_two_for(largest):
    """A power of two that brings a positive number to [128, 256), and its inverse."""
    exponent = (largest.to(gl.int32, bitcast=True) >> 23) & 0xFF
    exponent = gl.minimum(gl.maximum(exponent, 8), 253)
    scale = ((261 - exponent) << 23).to(gl.float32, bitcast=True)
    return scale, ((exponent - 7) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _term(v):
    """v rounded to 4 significant bits, as E4M3's byte and as fp32."""
    h = ((v.to(gl.int32, bitcast=True) + 0x80000) & -0x100000).to(gl.float32, bitcast=True)
    return h.to(gl.float8e4nv).to(gl.int8, bitcast=True), h


@gluon.jit
def store_fp8_terms(v, xs, GROUPS: gl.constexpr, IN_HALVES: gl.constexpr):
    """v [GROUPS, 32] below 448 as E4M3 terms in xs [GROUPS, 8, 32], in columns by the group, or by
    the half of it."""
    b0, h0 = _term(v)
    r1 = (v - h0) * 16.0
    b1, h1 = _term(r1)
    r2 = (r1 - h1) * 16.0
    b2, _ = _term(r2)
    L: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [8, 1], [1, 0])
    if IN_HALVES:
        odd = (gl.arange(0, 32, layout=gl.SliceLayout(0, L)) >= 16)[None, :]
    else:
        odd = ((gl.arange(0, GROUPS, layout=gl.SliceLayout(1, L)) & 1) == 1)[:, None]
    none = gl.zeros_like(b0)
    even_terms = gl.join(
        gl.join(gl.where(odd, none, b0), gl.where(odd, none, b2)),
        gl.join(gl.where(odd, none, b1), none),
    )
    odd_terms = gl.join(
        gl.join(gl.where(odd, b0, none), gl.where(odd, b2, none)),
        gl.join(gl.where(odd, b1, none), none),
    )
    t = gl.join(even_terms.reshape([GROUPS, 32, 4]), odd_terms.reshape([GROUPS, 32, 4]))
    t = t.permute([0, 3, 2, 1]).reshape([GROUPS, 8, 32])
    xs.store(t.to(gl.float8e4nv, bitcast=True))


@gluon.jit
def store_bf16_terms(v, xs, GROUPS: gl.constexpr):
    """v [GROUPS, 16] as bf16 terms in xs [GROUPS, 8, 16]."""
    b0 = v.to(gl.bfloat16)
    r1 = v - b0.to(gl.float32)
    b1 = r1.to(gl.bfloat16)
    b2 = (r1 - b1.to(gl.float32)).to(gl.bfloat16)
    t = gl.join(gl.join(b0, b2), gl.join(b1, gl.zeros_like(b1))).reshape([GROUPS, 16, 4])
    t = gl.join(t, gl.zeros_like(t)).permute([0, 3, 2, 1]).reshape([GROUPS, 8, 16])
    xs.store(t)


@gluon.jit
def row_sums(acc, MMA: gl.constexpr, FP8: gl.constexpr):
    """Sums [128] of the terms in [128, 8]."""
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, MMA))
    if FP8:
        term = column & 3
        weight = gl.where(term == 0, 1.0, gl.where(term == 1, 0.0625, 0.00390625))
        weight = gl.where(term < 3, weight, 0.0)
    else:
        weight = gl.where(column < 3, 1.0, 0.0)
    return gl.sum(acc * weight[None, :], 1)
