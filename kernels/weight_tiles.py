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
