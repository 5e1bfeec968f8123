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
# A word of each row: [8, 2, 8] of which the middle is r or r + 8.
_OF_ROWS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1, 0], [4, 0, 0]], [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
        [[1, 0, 0], [2, 0, 0]], [], [8, 2, 8],
    )
)  # fmt: skip
# Codes of 8 bits: eight neighbours of a row.
_CODES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [64, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]], [], [128, 32],
    )
)  # fmt: skip


@gluon.jit
def operand_views(codes, words, S: gl.constexpr):
    """The rings of tiles as they are read: codes of a step or, with 8 bits, of half of one; words
    one row after the other, with 4 bits as [8, 2, 8]."""
    SLOTS: gl.constexpr = S.tile_slots * 2
    WORDS: gl.constexpr = SLOTS * (S.words_rows // 2)
    if S.tiles.bits == 4:
        FLAT4: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[3, 2, 1, 0])
        FLAT3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
        codes = seen_as(codes, gl.int32, [SLOTS * 5, 8, 8, 4, 4], FLAT4)
        words = seen_as(words, gl.int32, [WORDS, 8, 2, 8], FLAT3)
    else:
        SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(32, 8, rank=2)
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
        codes = seen_as(codes, gl.int8, [SLOTS * 10, 128, 32], SWIZZLED)
        words = seen_as(words, gl.int32, [WORDS, 128], FLAT)
    return codes, words


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
def _two_rows(words, at):
    """A word of rows r and of rows r + 8, [8, 8] each."""
    r, r8 = gl.split(words.index(at).load(_OF_ROWS).permute([0, 2, 1]))
    ROW: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, _WORDS))
    r = gl.convert_layout(r, ROW, assert_trivial=True)
    return r, gl.convert_layout(r8, ROW, assert_trivial=True)


@gluon.jit
def _e8m0_place(step):
    """The words in which the scales of a step's groups of 32 columns stand, and their bytes."""
    is_last = step == 4
    return (
        gl.where(is_last, 2, 0), gl.where(is_last, 2, 1),
        gl.where(is_last, 0, step), gl.where(is_last, 1, step),
    )  # fmt: skip


@gluon.jit
def _word_scales(words, first, step, S: gl.constexpr):
    """Scales of a step's words, [8, 8, 4, 4], of rows r and of rows r + 8."""
    Q: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, _WORDS)))
    q = gl.arange(0, 4, layout=Q)[None, None, None, :]
    if S.tiles.scales == "e8m0":
        word0, word1, byte0, byte1 = _e8m0_place(step)
        a, a8 = _two_rows(words, first + word0)
        b, b8 = _two_rows(words, first + word1)
        PTX: gl.constexpr = _E8M0_FOR_E2M1
        a, a8 = _scale(a, byte0, PTX), _scale(a8, byte0, PTX)
        b, b8 = _scale(b, byte1, PTX), _scale(b8, byte1, PTX)
        r = gl.where(q < 2, a[:, :, None, None], b[:, :, None, None])
        r8 = gl.where(q < 2, a8[:, :, None, None], b8[:, :, None, None])
    else:  # of 16 columns: two words have the even and the odd ones
        SMALL: gl.constexpr = _SMALL_FOR_E2M1
        even, even8 = _two_rows(words, first + step // 2 * 2)
        odd, odd8 = _two_rows(words, first + step // 2 * 2 + 1)
        byte = step % 2 * 2
        a, a8 = _scale(even, byte, SMALL), _scale(even8, byte, SMALL)
        b, b8 = _scale(odd, byte, SMALL), _scale(odd8, byte, SMALL)
        c, c8 = _scale(even, byte + 1, SMALL), _scale(even8, byte + 1, SMALL)
        d, d8 = _scale(odd, byte + 1, SMALL), _scale(odd8, byte + 1, SMALL)
        first_two = gl.where(q == 0, a[:, :, None, None], b[:, :, None, None])
        last_two = gl.where(q == 2, c[:, :, None, None], d[:, :, None, None])
        r = gl.where(q < 2, first_two, last_two)
        first_two = gl.where(q == 0, a8[:, :, None, None], b8[:, :, None, None])
        last_two = gl.where(q == 2, c8[:, :, None, None], d8[:, :, None, None])
        r8 = gl.where(q < 2, first_two, last_two)
    return r, r8


@gluon.jit
def _halves(pairs):
    """The two bf16 numbers of words, side by side."""
    low = pairs.to(gl.int16).to(gl.bfloat16, bitcast=True)
    return gl.join(low, (pairs >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True))


@gluon.jit
def _of_words(words, r, r8):
    """Weights [128, 64] of words [8, 8, 4, 4] and their scales."""
    w0, w1, w2, w3 = gl.inline_asm_elementwise(
        _E2M1, "=&r,=&r,=&r,=&r,r,r,r", [words, r, r8],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    rows = gl.join(gl.join(_halves(w0), _halves(w1)), gl.join(_halves(w2), _halves(w3)))
    # [warp, row, 4 columns, 16 columns, column, pair, row + 8]
    return rows.permute([0, 6, 1, 3, 5, 2, 4]).reshape([128, 64])


@gluon.jit
def _of_codes(codes, scale):
    """Weights [128, 32] of E4M3 codes and scales as bf16 twice."""
    w = gl.inline_asm_elementwise(
        _E4M3, "=&r,=&r,r,r,r,r,r", [codes, scale], dtype=gl.bfloat16, is_pure=True, pack=4
    )
    return w.reshape([128, 4, 2, 2, 2]).permute([0, 2, 3, 1, 4]).reshape([128, 32])


@gluon.jit
def operand(codes, words, unit, step, MMA: gl.constexpr, S: gl.constexpr):
    """Weights [128, 64] of a step of the tile in slot `unit`, as the left operand; times UNSCALE
    they are what the tile says, but for scales in fp32."""
    first = unit * (S.words_rows // 2)
    if S.tiles.bits == 4:
        r, r8 = _word_scales(words, first, step, S)
        a = _of_words(codes.index(unit * 5 + step).load(_WORDS), r, r8)
    else:
        at = unit * 10 + step * 2
        low, high = codes.index(at).load(_CODES), codes.index(at + 1).load(_CODES)
        if S.tiles.scales == "e8m0":
            ROW: gl.constexpr = gl.SliceLayout(1, _CODES)
            PTX: gl.constexpr = _E8M0_FOR_E4M3
            word0, word1, byte0, byte1 = _e8m0_place(step)
            s0 = _scale(words.index(first + word0).load(ROW), byte0, PTX)[:, None]
            s1 = _scale(words.index(first + word1).load(ROW), byte1, PTX)[:, None]
        else:
            s0 = gl.full([128, 1], _NO_SCALE, gl.int32, layout=_CODES)
            s1 = s0
        a0 = _of_codes(low, s0 + gl.zeros([128, 32], gl.int32, layout=_CODES))
        a1 = _of_codes(high, s1 + gl.zeros([128, 32], gl.int32, layout=_CODES))
        a = gl.join(a0, a1).permute([0, 2, 1]).reshape([128, 64])
    return gl.convert_layout(a, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
