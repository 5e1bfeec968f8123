"""Weights of tiles as the tensor cores' left operand, decoded to bf16 in registers, exactly.

E2M1, a byte of two codes (kernels/persistent/pack.py): sign to bit 15 and e e m to bits 8..6 of 16
bits make the code's value times 2^-126, those bits of all four columns of a word at once: the upper
bytes of the results are gathered in one register, the lower ones in another. E4M3: sign to bit 15,
e e e e m m m to bits 10..4 make its value times 2^-120. One multiplication with the scale and a
power of two in front finishes it: at most six significant bits, so bf16 holds every product. What
stands in front is 2^64 too small (UNSCALE), so that scales from 2^-61 to 2^65 neither overflow nor
lose bits.

A thread holds columns that are neighbours in a word, the tensor cores' fragments want them in
pairs, eight apart. Which number is which column does not matter as long as x has the same order:
x_order says it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.persistent.gluon_names import seen_as
from kernels.tile_gemm.sizes import CONSUMERS, STEPS

_EACH = gl.constexpr(CONSUMERS)
_STEPS = gl.constexpr(STEPS)

# $0, $1 four weights of row r, $2, $3 of row r + 8; $4 a word, $5 and $6 the scales of both rows.
_E2M1 = gl.constexpr("""{
.reg .b32 h, l, t, u, z;
shr.b32 t, $4, 4; and.b32 t, t, 0x01010101; lop3.b32 h, $4, 0x80808080, t, 0xEA;
shl.b32 l, $4, 4; and.b32 l, l, 0xC0C0C0C0;
prmt.b32 $0, l, h, 0x5140; prmt.b32 $1, l, h, 0x7362;
shl.b32 t, $4, 2; shr.b32 u, $4, 6; and.b32 u, u, 0x01010101; lop3.b32 h, t, 0x80808080, u, 0xEA;
shl.b32 l, $4, 6; and.b32 l, l, 0xC0C0C0C0;
prmt.b32 $2, l, h, 0x5140; prmt.b32 $3, l, h, 0x7362;
mov.b32 z, 0x80008000;
fma.rn.bf16x2 $0, $0, $5, z; fma.rn.bf16x2 $1, $1, $5, z;
fma.rn.bf16x2 $2, $2, $6, z; fma.rn.bf16x2 $3, $3, $6, z;
}""")
# $0, $1 four weights of the codes in $2, times the scale in $3.
_E4M3 = gl.constexpr("""{
.reg .b32 t, u, z;
mov.b32 z, 0x80008000;
prmt.b32 t, $2, $2, 0x1100; shr.b32 u, t, 4; and.b32 u, u, 0x07F007F0;
lop3.b32 t, t, 0x80008000, u, 0xEA; fma.rn.bf16x2 $0, t, $3, z;
prmt.b32 t, $2, $2, 0x3322; shr.b32 u, t, 4; and.b32 u, u, 0x07F007F0;
lop3.b32 t, t, 0x80008000, u, 0xEA; fma.rn.bf16x2 $1, t, $3, z;
}""")


# The byte of a word that selector $2 names, as bf16 in both halves: of E8M0 the exponent, of E4M3
# as pack.py has it five bits of exponent and three of mantissa, and what stands in front.
def _scale_ptx(shift: int, exponent: int) -> gl.constexpr:
    front = (exponent << 7) * 0x10001
    return gl.constexpr(
        f"{{ .reg .b32 t; prmt.b32 t, $1, 0, $2; mad.lo.u32 $0, t, {1 << shift}, {front}; }}"
    )


_E8M0_FOR_E2M1 = _scale_ptx(7, 126 - 64)
_E8M0_FOR_E4M3 = _scale_ptx(7, 120 - 64)
_SMALL_FOR_E2M1 = _scale_ptx(4, 104 + 126 - 64)
_NO_SCALE = gl.constexpr(0x7B807B80)  # 2^120 twice

# Words of 64 columns: two rows of a warp's sixteen and four columns each.
_WORDS = gl.constexpr(gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [4, 1, 1, 1], [3, 2, 1, 0]))


@gluon.jit
def operand_views(codes, words, S: gl.constexpr):
    """The rings of units as they are read: codes of a step or, with 8 bits, of half of one; words
    of a unit's rows one after the other, with 4 bits as [.., 2, 8]."""
    UNITS: gl.constexpr = S.unit_slots * _EACH
    ROWS: gl.constexpr = S.unit_rows
    WORDS: gl.constexpr = UNITS * S.words_rows * 64 // ROWS
    if S.tiles.bits == 4:
        FLAT4: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[3, 2, 1, 0])
        FLAT3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
        codes = seen_as(codes, gl.int32, [UNITS * _STEPS, ROWS // 16, 8, 4, 4], FLAT4)
        words = seen_as(words, gl.int32, [WORDS, ROWS // 16, 2, 8], FLAT3)
    else:
        SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(32, 8, rank=2)
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
        codes = seen_as(codes, gl.int8, [UNITS * _STEPS * 2, ROWS, 32], SWIZZLED)
        words = seen_as(words, gl.int32, [WORDS, ROWS], FLAT)
    return codes, words


@gluon.jit
def word_at(unit, word, half, S: gl.constexpr):
    """Where a word of a unit's rows stands among the words; half: which half of a tile it is."""
    PARTS: gl.constexpr = 128 // S.unit_rows
    return (unit * (S.words_rows // 2) + word) * PARTS + half


@gluon.jit
def _selector(byte):
    """That makes of a byte both halves of a word."""
    return 0x4040 + byte * 0x101


@gluon.jit
def _scale(word, byte, PTX: gl.constexpr):
    return gl.inline_asm_elementwise(
        PTX, "=r,r,r", [word, _selector(byte)], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _two_rows(words, at, S: gl.constexpr):
    """A word of rows r and of rows r + 8, [rows / 16, 8] each."""
    MORE: gl.constexpr = [[4, 0, 0]] if S.unit_rows == 128 else []
    OF_ROWS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1, 0]] + MORE, [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
        [[1, 0, 0], [2, 0, 0]], [], [S.unit_rows // 16, 2, 8],
    )  # fmt: skip
    r, r8 = gl.split(words.index(at).load(OF_ROWS).permute([0, 2, 1]))
    ROW: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, _WORDS))
    r = gl.convert_layout(r, ROW, assert_trivial=True)
    return r, gl.convert_layout(r8, ROW, assert_trivial=True)


@gluon.jit
def _e8m0_place(step):
    """The words in which the scales of a step's groups of 32 columns stand, and their bytes."""
    is_last = step == _STEPS - 1
    return (
        gl.where(is_last, 2, 0), gl.where(is_last, 2, 1),
        gl.where(is_last, 0, step), gl.where(is_last, 1, step),
    )  # fmt: skip


@gluon.jit
def _word_scales(words, unit, half, step, S: gl.constexpr):
    """Scales of a step's words, [rows / 16, 8, 4, 4], of rows r and of rows r + 8."""
    Q: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, _WORDS)))
    q = gl.arange(0, 4, layout=Q)[None, None, None, :]
    if S.tiles.scales == "e8m0":
        PTX: gl.constexpr = _E8M0_FOR_E2M1
        word0, word1, byte0, byte1 = _e8m0_place(step)
        a, a8 = _two_rows(words, word_at(unit, word0, half, S), S)
        b, b8 = _two_rows(words, word_at(unit, word1, half, S), S)
        a, a8 = _scale(a, byte0, PTX), _scale(a8, byte0, PTX)
        b, b8 = _scale(b, byte1, PTX), _scale(b8, byte1, PTX)
        r = gl.where(q < 2, a[:, :, None, None], b[:, :, None, None])
        r8 = gl.where(q < 2, a8[:, :, None, None], b8[:, :, None, None])
    else:  # of 16 columns: two words have the even and the odd ones
        SMALL: gl.constexpr = _SMALL_FOR_E2M1
        word = step // 2 * 2
        byte = step % 2 * 2
        even, even8 = _two_rows(words, word_at(unit, word, half, S), S)
        odd, odd8 = _two_rows(words, word_at(unit, word + 1, half, S), S)
        r = _of_four(even, odd, byte, q, SMALL)
        r8 = _of_four(even8, odd8, byte, q, SMALL)
    return r, r8


@gluon.jit
def _of_four(even, odd, byte, q, PTX: gl.constexpr):
    """Of column q the scale: two bytes of two words in turn."""
    s0, s1 = _scale(even, byte, PTX), _scale(odd, byte, PTX)
    s2, s3 = _scale(even, byte + 1, PTX), _scale(odd, byte + 1, PTX)
    first = gl.where(q == 0, s0[:, :, None, None], s1[:, :, None, None])
    return gl.where(q < 2, first, gl.where(q == 2, s2[:, :, None, None], s3[:, :, None, None]))


@gluon.jit
def _halves(pairs):
    """The two bf16 numbers of words, side by side."""
    low = pairs.to(gl.int16).to(gl.bfloat16, bitcast=True)
    return gl.join(low, (pairs >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True))


@gluon.jit
def _of_words(words, r, r8, S: gl.constexpr):
    """Weights [rows, 64] of words [rows / 16, 8, 4, 4] and their scales."""
    w0, w1, w2, w3 = gl.inline_asm_elementwise(
        _E2M1, "=&r,=&r,=&r,=&r,r,r,r", [words, r, r8],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    rows = gl.join(gl.join(_halves(w0), _halves(w1)), gl.join(_halves(w2), _halves(w3)))
    # [warp, row, 4 columns, 16 columns, column, pair, row + 8]
    return rows.permute([0, 6, 1, 3, 5, 2, 4]).reshape([S.unit_rows, 64])


@gluon.jit
def _of_codes(codes, scale, S: gl.constexpr):
    """Weights [rows, 32] of E4M3 codes and scales as bf16 twice."""
    w = gl.inline_asm_elementwise(
        _E4M3, "=&r,=&r,r,r,r,r,r", [codes, scale], dtype=gl.bfloat16, is_pure=True, pack=4
    )
    w = w.reshape([S.unit_rows, 4, 2, 2, 2]).permute([0, 2, 3, 1, 4])
    return w.reshape([S.unit_rows, 32])


@gluon.jit
def operand(codes, words, unit, half, step, MMA: gl.constexpr, S: gl.constexpr):
    """Weights [rows, 64] of a step of the unit in slot `unit`, as the left operand; times UNSCALE
    they are what the tile says, but for scales in fp32.

    half: of a tile, if a unit is half of one
    """
    ROWS: gl.constexpr = S.unit_rows
    if S.tiles.bits == 4:
        r, r8 = _word_scales(words, unit, half, step, S)
        a = _of_words(codes.index(unit * _STEPS + step).load(_WORDS), r, r8, S)
    else:  # a thread has eight neighbours in a row
        CODES: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
            [[16, 0], [32, 0]], [], [S.unit_rows, 32],
        )  # fmt: skip
        at = (unit * _STEPS + step) * 2
        low, high = codes.index(at).load(CODES), codes.index(at + 1).load(CODES)
        if S.tiles.scales == "e8m0":
            ROW: gl.constexpr = gl.SliceLayout(1, CODES)
            PTX: gl.constexpr = _E8M0_FOR_E4M3
            word0, word1, byte0, byte1 = _e8m0_place(step)
            s0 = words.index(word_at(unit, word0, half, S)).load(ROW)
            s1 = words.index(word_at(unit, word1, half, S)).load(ROW)
            s0, s1 = _scale(s0, byte0, PTX)[:, None], _scale(s1, byte1, PTX)[:, None]
        else:
            s0 = gl.full([ROWS, 1], _NO_SCALE, gl.int32, layout=CODES)
            s1 = s0
        none = gl.zeros([ROWS, 32], gl.int32, layout=CODES)
        a0, a1 = _of_codes(low, s0 + none, S), _of_codes(high, s1 + none, S)
        a = gl.join(a0, a1).permute([0, 2, 1]).reshape([S.unit_rows, 64])
    return gl.convert_layout(a, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
