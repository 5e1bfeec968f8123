"""Tiles of stored weights decoded for the tensor cores, exactly: words in, bf16 out.

E2M1, eight codes s e e m in a 32-bit word, low nibble first: sign to bit 15 and e e m to bits
8..6 of each half make the code's value times 2^-126. E4M3: sign to bit 15 and e e e e m m m to
bits 10..4 make its value times 2^-120. One multiplication by that power of two and one by the
scale of the group, where there is one, finish it: at most six significant bits, so bf16 holds
every product.
"""

import triton
import triton.language as tl

from kernels.weight_formats import decode_scale

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# $0 to $3 eight bf16 weights in order; $4 the codes; $5 the scale as bf16 in both halves.
_E2M1_PTX = tl.constexpr("""{
.reg .b32 a, b, c, d, t, u;
shl.b32 t, $4, 6;  shl.b32 u, $4, 12; and.b32 t, t, 0x01C001C0; lop3.b32 a, u, 0x80008000, t, 0xEA;
shl.b32 t, $4, 2;  shl.b32 u, $4, 8;  and.b32 t, t, 0x01C001C0; lop3.b32 b, u, 0x80008000, t, 0xEA;
shr.b32 t, $4, 2;  shl.b32 u, $4, 4;  and.b32 t, t, 0x01C001C0; lop3.b32 c, u, 0x80008000, t, 0xEA;
shr.b32 t, $4, 6;  and.b32 t, t, 0x01C001C0; lop3.b32 d, $4, 0x80008000, t, 0xEA;
mov.b32 t, 0x7E807E80; mov.b32 u, 0x80008000;
fma.rn.bf16x2 a, a, t, u; fma.rn.bf16x2 a, a, $5, u;
fma.rn.bf16x2 b, b, t, u; fma.rn.bf16x2 b, b, $5, u;
fma.rn.bf16x2 c, c, t, u; fma.rn.bf16x2 c, c, $5, u;
fma.rn.bf16x2 d, d, t, u; fma.rn.bf16x2 d, d, $5, u;
prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, c, d, 0x5410;
prmt.b32 $2, a, b, 0x7632; prmt.b32 $3, c, d, 0x7632;
}""")


def _e4m3_ptx(scale: str) -> tl.constexpr:
    """The same for the eight E4M3 codes of 64 bits in $4; `scale` finishes pair {0}."""
    lines = ["{", ".reg .b32 lo, hi, t, u, c, z;", "mov.b64 {lo, hi}, $4;"]
    lines.append("mov.b32 c, 0x7B807B80; mov.b32 z, 0x80008000;")
    for pair, (word, selector) in enumerate(
        [("lo", "0x1100"), ("lo", "0x3322"), ("hi", "0x1100"), ("hi", "0x3322")]
    ):
        lines.append(f"prmt.b32 t, {word}, {word}, {selector}; shr.b32 u, t, 4;")
        lines.append("and.b32 u, u, 0x07F007F0; lop3.b32 t, t, 0x80008000, u, 0xEA;")
        lines.append(f"fma.rn.bf16x2 ${pair}, t, c, z; " + scale.format(pair))
    return tl.constexpr("\n".join([*lines, "}"]))


_E4M3_PTX = _e4m3_ptx("")
_E4M3_SCALED_PTX = _e4m3_ptx("fma.rn.bf16x2 ${0}, ${0}, $5, z;")


# Words of the persistent step's tiles (kernels/persistent/pack.py) in $4, scales of rows r and
# r + 8 as bf16 in both halves in $5 and $6; $0, $1 four bf16 weights of row r, $2, $3 of row r + 8.
_CHUNK_PTX = tl.constexpr("""{
.reg .b32 a, b, t, u, z;
mov.b32 z, 0;
and.b32 a, $4, 0x9C9C9C9C;
shl.b32 t, $4, 2; shr.u32 u, $4, 2; and.b32 t, t, 0x8C8C8C8C; lop3.b32 b, u, 0x10101010, t, 0xEA;
prmt.b32 $0, a, z, 0x1404; prmt.b32 $1, a, z, 0x3424;
prmt.b32 $2, b, z, 0x1404; prmt.b32 $3, b, z, 0x3424;
shr.u32 t, $0, 4; and.b32 t, t, 0x01C001C0; lop3.b32 $0, $0, 0x80008000, t, 0xEA;
shr.u32 t, $1, 4; and.b32 t, t, 0x01C001C0; lop3.b32 $1, $1, 0x80008000, t, 0xEA;
shr.u32 t, $2, 4; and.b32 t, t, 0x01C001C0; lop3.b32 $2, $2, 0x80008000, t, 0xEA;
shr.u32 t, $3, 4; and.b32 t, t, 0x01C001C0; lop3.b32 $3, $3, 0x80008000, t, 0xEA;
mov.b32 t, 0x7E807E80; mov.b32 u, 0x80008000;
fma.rn.bf16x2 $0, $0, t, u; fma.rn.bf16x2 $0, $0, $5, u;
fma.rn.bf16x2 $1, $1, t, u; fma.rn.bf16x2 $1, $1, $5, u;
fma.rn.bf16x2 $2, $2, t, u; fma.rn.bf16x2 $2, $2, $6, u;
fma.rn.bf16x2 $3, $3, t, u; fma.rn.bf16x2 $3, $3, $6, u;
}""")


@triton.jit
def load_chunk(tile_ptr, chunk, SCALES: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """Words of codes of one chunk of a tile of 4 bits, [ROWS / 2, 16], and words in which the
    scales of its two groups or of their halves are, [ROWS / 2, 2] of rows r and of rows r + 8."""
    pair = tl.arange(0, ROWS // 2)
    words_ptr = tile_ptr.to(tl.pointer_type(tl.int32))
    words = tl.load(words_ptr + chunk * (ROWS * 8) + pair[:, None] * 16 + tl.arange(0, 16)[None, :])
    # Scales are bytes of words [words, rows]. A chunk's two groups are in two words, those of the
    # last chunk in one; of halves of groups first and second ones are always in two.
    group = tl.arange(0, 2)
    in_halves: tl.constexpr = SCALES == "e4m3"
    word = chunk // 2 * 2 + group if in_halves else tl.where(chunk == CHUNKS - 1, 2, group)
    row = pair // 8 * 16 + pair % 8
    scales = words_ptr + CHUNKS * ROWS * 8 + word[None, :] * ROWS
    return words, tl.load(scales + row[:, None]), tl.load(scales + (row + 8)[:, None])


@triton.jit
def decode_chunk(
    words, first, second, chunk, dtype, SCALES: tl.constexpr, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Weights [ROWS, 64] of what load_chunk has found, in the order of its words.

    Row 2 i + j is row 16 (i // 8) + i % 8 + 8 j, column 16 c + 4 q + e is column 16 q + 4 c + e.
    """
    group = tl.arange(0, 2)
    if SCALES == "e4m3":  # [ROWS / 2, groups, halves]
        shift = ((chunk % 2) * 16 + group * 8)[None, :, None]
        first = (first[:, None, :] >> shift) & 0xFF
        second = (second[:, None, :] >> shift) & 0xFF
    else:  # [ROWS / 2, groups]
        shift = tl.where(chunk == CHUNKS - 1, group * 8, group * 0 + chunk * 8)[None, :]
        first = (first >> shift) & 0xFF
        second = (second >> shift) & 0xFF
    HALVES: tl.constexpr = 2 if SCALES == "e4m3" else 1
    if _INTERPRETED:  # PTX does not run there; the same numbers by plain arithmetic
        bits = words.to(tl.uint32, bitcast=True)[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]
        code = bits.to(tl.int32)
        a = ((code & 0x80) << 24) | ((code & 0x1C) << 20)
        b = ((code & 0x20) << 26) | ((code & 0x40) << 18) | ((code & 3) << 22)
        both = tl.join(a, b).to(tl.float32, bitcast=True) * 2.0**126  # [pairs, words, e, 2]
        scale = tl.join(_tile_scale(first, SCALES), _tile_scale(second, SCALES))
        scale = tl.reshape(scale, (ROWS // 2, 1, 2, HALVES, 1, 2))
        both = tl.reshape(both, (ROWS // 2, 4, 2, 2, 4, 2)) * scale
        both = tl.permute(tl.reshape(both, (ROWS // 2, 64, 2)), (0, 2, 1))
        return tl.reshape(both, (ROWS, 64)).to(dtype)
    else:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _CHUNK_PTX,
            "=&r,=&r,=&r,=&r,r,r,r",
            [words, _for_words(first, SCALES, ROWS // 2), _for_words(second, SCALES, ROWS // 2)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        rows = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [pairs, words, two of e, row + 8]
        rows = tl.reshape(tl.permute(rows, (0, 3, 1, 2)), (ROWS, 32))
        low = rows.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (rows >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return tl.reshape(tl.join(low, high), (ROWS, 64)).to(dtype)


@triton.jit
def _for_words(stored, SCALES: tl.constexpr, PAIRS: tl.constexpr):
    """Scales of a chunk's groups or of their halves as bf16 pairs [PAIRS, 16] of its words."""
    if SCALES == "e4m3":
        half = (stored << 4) + (104 << 7)
        pair = tl.reshape(half | (half << 16), (PAIRS, 1, 2, 2))
    else:
        pair = tl.reshape(_scale_pairs(stored, SCALES), (PAIRS, 1, 2, 1))
    return tl.reshape(tl.broadcast_to(pair, (PAIRS, 4, 2, 2)), (PAIRS, 16))


@triton.jit
def _tile_scale(stored, SCALES: tl.constexpr):
    """fp32 scales of bytes in a tile's words: E8M0, or E4M3 with five bits of exponent."""
    if SCALES == "e4m3":
        return ((stored << 20) + (104 << 23)).to(tl.float32, bitcast=True)
    else:
        return decode_scale(stored, SCALES)


@triton.jit
def load_step(tile_ptr, step, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """Words of codes of 64 columns of a tile of 8 bits, [ROWS, 8] in order, and the scales of their
    two groups as E8M0 bytes, [ROWS, 2], if the tile has such."""
    row = tl.arange(0, ROWS)[:, None]
    word = tl.arange(0, 8)[None, :]
    place = (step * 2 + word // 4) * (ROWS * 4) + row * 4 + word % 4
    words = tl.load(tile_ptr.to(tl.pointer_type(tl.int64)) + place)
    # A row of a chunk is two times two words; exchanged where bit 2 of the row is set.
    halves = tl.permute(tl.reshape(words, (ROWS, 2, 2, 2)), (0, 1, 3, 2))
    one, other = tl.split(halves)
    swapped = (row // 4 % 2 == 1)[:, :, None]
    halves = tl.join(tl.where(swapped, other, one), tl.where(swapped, one, other))
    words = tl.reshape(tl.permute(halves, (0, 1, 3, 2)), (ROWS, 8))
    group = tl.arange(0, 2)
    is_last = step == STEPS - 1
    byte = tl.where(is_last, 2 * ROWS * 4 + group, group * (ROWS * 4) + step)
    scales_ptr = tile_ptr + STEPS * 64 * ROWS
    return words, tl.load(scales_ptr + row * 4 + byte[None, :])


@triton.jit
def step_factor(tile_ptr, step, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """The fp32 scale of 64 columns of a tile of 8 bits."""
    return tl.load((tile_ptr + (STEPS * 64 + 4) * ROWS).to(tl.pointer_type(tl.float32)) + step)


@triton.jit
def row_factor(tile_ptr, row, SCALES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """The fp32 scales of a tile's rows: its first word of 8 bits, its last of 4."""
    at = STEPS * 64 * ROWS
    if SCALES == "e4m3":
        at = STEPS * 32 * ROWS + 6 * 4 * ROWS
    return tl.load((tile_ptr + at).to(tl.pointer_type(tl.float32)) + row)


@triton.jit
def _values(words, CODES: tl.constexpr):
    """fp32 values [BLOCK_N, words, 8] of codes, by plain arithmetic: for the interpreter."""
    place = tl.arange(0, 8)[None, None, :]
    if CODES == "e2m1":
        code = (words[:, :, None] >> (place * 4)) & 15
        bits = ((code & 8) << 28) | ((code & 7) << 22)
        return bits.to(tl.float32, bitcast=True) * 2.0**126
    else:
        code = (words[:, :, None] >> (place * 8).to(tl.int64)) & 0xFF
        return decode_scale(code, "e4m3")


@triton.jit
def _scale_pairs(stored, SCALES: tl.constexpr):
    """Group scales as bf16 in both halves of 32 bits."""
    if SCALES == "e8m0":
        byte = stored.to(tl.int32)
        half = tl.where(byte == 0, 0x40, byte << 7)
    else:
        tl.static_assert(SCALES == "e4m3")  # others have more bits than bf16
        half = decode_scale(stored, SCALES).to(tl.int32, bitcast=True) >> 16
        half = half & 0xFFFF
    return half | (half << 16)


@triton.jit
def decode_tile(
    words,
    stored,
    dtype,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights [BLOCK_N, BLOCK_K] of words [BLOCK_N, BLOCK_K / 8].

    stored:  scales [BLOCK_N, BLOCK_K / GROUP]; not read when GROUP is 0
    """
    if _INTERPRETED:  # PTX does not run there; the same numbers by plain arithmetic
        values = _values(words, CODES)
        if GROUP == 0:
            return tl.reshape(values, (BLOCK_N, BLOCK_K)).to(dtype)
        groups = tl.reshape(values, (BLOCK_N, BLOCK_K // GROUP, GROUP))
        scaled = groups * decode_scale(stored, SCALES)[:, :, None]
        return tl.reshape(scaled, (BLOCK_N, BLOCK_K)).to(dtype)
    else:
        if GROUP == 0:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                _E4M3_PTX,
                "=&r,=&r,=&r,=&r,l",
                [words],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            pair = _scale_pairs(stored, SCALES)
            pair = tl.broadcast_to(pair[:, :, None], (BLOCK_N, BLOCK_K // GROUP, GROUP // 8))
            pair = tl.reshape(pair, (BLOCK_N, BLOCK_K // 8))
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                _E2M1_PTX if CODES == "e2m1" else _E4M3_SCALED_PTX,
                "=&r,=&r,=&r,=&r,r,r" if CODES == "e2m1" else "=&r,=&r,=&r,=&r,l,r",
                [words, pair],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        pairs = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_N, BLOCK_K // 2))
        low = pairs.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K)).to(dtype)
