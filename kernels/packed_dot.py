"""Words of FP8 and bf16 weights times a token's packed vector; MXFP4's are in kernels/moe_gemv.py.

A 64-bit word holds eight E4M3 codes of one row. Codes i and i + 4 are brought into the two halves
of a 32-bit pair, as the packed vector has them (kernels/packed_vector.py):

    bit   15 14..8       7..0      a code in the upper byte of its half: s eeeemmm
          s  0  eeeemmm  0000000   moved right by one: the fp16 number value * 2^-8

A further 2^-4 keeps four products of the largest codes and activations finite in fp16.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# $0 sum over eight codes (fp32); $1 the codes; $2 to $5 the planes of x.
_DOT8_E4M3_PTX = tl.constexpr("""{
.reg .b32 lo, hi, a, b, c, d, t, u; .reg .b16 l, h; .reg .f32 fl, fh;
mov.b64 {lo, hi}, $1;
prmt.b32 t, lo, hi, 0x4400; shr.b32 u, t, 1; and.b32 u, u, 0x3F803F80;
lop3.b32 a, t, 0x80008000, u, 0xEA;
prmt.b32 t, lo, hi, 0x5511; shr.b32 u, t, 1; and.b32 u, u, 0x3F803F80;
lop3.b32 b, t, 0x80008000, u, 0xEA;
prmt.b32 t, lo, hi, 0x6622; shr.b32 u, t, 1; and.b32 u, u, 0x3F803F80;
lop3.b32 c, t, 0x80008000, u, 0xEA;
prmt.b32 t, lo, hi, 0x7733; shr.b32 u, t, 1; and.b32 u, u, 0x3F803F80;
lop3.b32 d, t, 0x80008000, u, 0xEA;
mov.b32 t, 0x2C002C00;
mul.rn.f16x2 a, a, t; mul.rn.f16x2 b, b, t; mul.rn.f16x2 c, c, t; mul.rn.f16x2 d, d, t;
mul.rn.f16x2 a, a, $2;
fma.rn.f16x2 a, b, $3, a;
fma.rn.f16x2 a, c, $4, a;
fma.rn.f16x2 a, d, $5, a;
mov.b32 {l, h}, a; cvt.f32.f16 fl, l; cvt.f32.f16 fh, h; add.f32 $0, fl, fh;
}""")


@triton.jit
def _e4m3_times(word, i: tl.constexpr, x):
    """Codes i and i + 4 of each word times both halves of x, in fp32: what the PTX does."""
    low = ((word >> (8 * i)) & 0xFF).to(tl.int32)
    high = ((word >> (8 * i + 32)) & 0xFF).to(tl.int32)
    low = (((low & 0x80) << 8) | ((low & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    high = (((high & 0x80) << 8) | ((high & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    x_low = x.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    x_high = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (low.to(tl.float32) * x_low + high.to(tl.float32) * x_high) * 0.0625


@triton.jit
def dot8_e4m3(word, x0, x1, x2, x3):
    """Sum over the eight codes of each word times the packed vector; codes as value * 2^-12."""
    if _INTERPRETED:  # PTX does not run there; the same numbers but for fp16 rounding of sums
        low = _e4m3_times(word, 0, x0) + _e4m3_times(word, 1, x1)
        return low + _e4m3_times(word, 2, x2) + _e4m3_times(word, 3, x3)
    else:
        return tl.inline_asm_elementwise(
            _DOT8_E4M3_PTX,
            "=f,l,r,r,r,r",
            [word, x0, x1, x2, x3],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _bf16_of(half_word):
    """fp32 of the bf16 number in the upper half of 32 bits."""
    return (half_word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def dot4_bf16(word, x0, x1, x2, x3):
    """Sum over the four weights of each word times fp16 x, in fp32."""
    low = word.to(tl.int32)
    high = (word >> 32).to(tl.int32)
    total = _bf16_of(low << 16) * x0.to(tl.float32) + _bf16_of(low) * x1.to(tl.float32)
    return total + _bf16_of(high << 16) * x2.to(tl.float32) + _bf16_of(high) * x3.to(tl.float32)
