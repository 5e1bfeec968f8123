"""The chosen experts of one token, MXFP4 decoded in registers.

Weights stay in the published order. A 32-bit word holds eight codes of one row, low nibble first:

    bit    31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
    code     7      6      5      4      3      2      1      0        code = s e e m

Codes i and i + 4 stand in the two halves of the word at the same place, so shifting and masking
makes a pair of fp16 numbers at once: sign to bit 15, e e m to bits 11..9, which is the code's
value times 2^-14 (fp16 subnormals make 0.5 exact). The vector is packed to match: word w of plane
i holds x[8 w + i] in its low half and x[8 w + 4 + i] in its high half, as fp16 scaled by a power
of two that keeps products out of the subnormals. Four packed FMAs make one partial sum of eight
weights; the group's scale and the sums across groups are fp32.

D model width, F expert width, K experts per token, G groups of 32 in a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed_vector import activation_scale
from quant.formats import MXFP4
from quant.tensor import QuantTensor

# One warp a program: a lane holds whole groups, so no sum leaves a warp and no vector is exchanged.
GATE_UP_ROWS = 2
DOWN_ROWS = 1

_CODE_SCALE = tl.constexpr(16384.0)  # codes are decoded as value * 2^-14
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# $0 sum over eight codes (fp32); $1 the codes; $2 to $5 the planes of x.
_DOT8_PTX = tl.constexpr("""{
.reg .b32 a, b, c, d, t, u; .reg .b16 l, h; .reg .f32 fl, fh;
shl.b32 t, $1, 9;  shl.b32 u, $1, 12; and.b32 t, t, 0x0E000E00; lop3.b32 a, u, 0x80008000, t, 0xEA;
shl.b32 t, $1, 5;  shl.b32 u, $1, 8;  and.b32 t, t, 0x0E000E00; lop3.b32 b, u, 0x80008000, t, 0xEA;
shl.b32 t, $1, 1;  shl.b32 u, $1, 4;  and.b32 t, t, 0x0E000E00; lop3.b32 c, u, 0x80008000, t, 0xEA;
shr.b32 t, $1, 3;  and.b32 t, t, 0x0E000E00; lop3.b32 d, $1, 0x80008000, t, 0xEA;
mul.rn.f16x2 a, a, $2;
fma.rn.f16x2 a, b, $3, a;
fma.rn.f16x2 a, c, $4, a;
fma.rn.f16x2 a, d, $5, a;
mov.b32 {l, h}, a; cvt.f32.f16 fl, l; cvt.f32.f16 fh, h; add.f32 $0, fl, fh;
}""")


@triton.jit
def _code_times(word, shift, x, HIGH: tl.constexpr):
    """One code of each word times its half of x, in fp32: what the PTX does for eight at once."""
    code = (word >> shift) & 15
    half = (((code & 8) << 12) | ((code & 7) << 9)).to(tl.int16).to(tl.float16, bitcast=True)
    x_half = ((x >> 16) if HIGH else x).to(tl.int16).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * x_half.to(tl.float32)


@triton.jit
def _dot8(word, x0, x1, x2, x3):
    """Sum over the eight codes of each word times the packed vector, both as scaled in memory."""
    if _INTERPRETED:  # PTX does not run there; the same numbers but for fp16 rounding of sums
        low = _code_times(word, 0, x0, False) + _code_times(word, 4, x1, False)
        low += _code_times(word, 8, x2, False) + _code_times(word, 12, x3, False)
        high = _code_times(word, 16, x0, True) + _code_times(word, 20, x1, True)
        high += _code_times(word, 24, x2, True) + _code_times(word, 28, x3, True)
        return low + high
    else:
        return tl.inline_asm_elementwise(
            _DOT8_PTX,
            "=f,r,r,r,r,r",
            [word, x0, x1, x2, x3],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _row_dots(
    words_ptr,  # [rows, G, 4] int32 of one expert
    scales_ptr,  # [rows, G] uint8
    x_ptr,  # [4, G * 4] int32
    n,  # [BLOCK_N] row numbers
    ROWS: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Per-thread partial dot products [BLOCK_N, BLOCK_G] of rows n with the packed vector."""
    acc = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    w4 = tl.arange(0, 4)
    rows = n < ROWS
    for g0 in tl.static_range(0, G, BLOCK_G):
        g = g0 + tl.arange(0, BLOCK_G)
        good = rows[:, None] & (g < G)[None, :]
        place = n[:, None] * G + g[None, :]
        words = tl.load(
            words_ptr + place[:, :, None] * 4 + w4[None, None, :],
            mask=good[:, :, None] & (w4 < 4)[None, None, :],
            other=0,
        )
        scale = tl.load(scales_ptr + place, mask=good, other=0).to(tl.int32)
        column = (g[:, None] * 4 + w4[None, :])[None, :, :]
        inside = ((g < G)[:, None] & (w4 < 4)[None, :])[None, :, :]
        x0 = tl.load(x_ptr + column, mask=inside, other=0)
        x1 = tl.load(x_ptr + G * 4 + column, mask=inside, other=0)
        x2 = tl.load(x_ptr + G * 8 + column, mask=inside, other=0)
        x3 = tl.load(x_ptr + G * 12 + column, mask=inside, other=0)
        part = tl.sum(_dot8(words, x0, x1, x2, x3), axis=2)
        # E8M0: the byte is the exponent; byte 0 stands for 2^-127, a subnormal.
        factor = tl.where(scale == 0, 1 << 22, scale << 23).to(tl.float32, bitcast=True)
        acc += part * factor
    return acc


# A program computes BLOCK_N rows (gate and up alternate) of one chosen expert and stores
# BLOCK_N / 2 activations. Grid: 2F / BLOCK_N, K.
@triton.jit
def _gate_up_kernel(
    words_ptr,
    scales_ptr,
    bias_ptr,  # [E, 2F]
    ids_ptr,
    x_ptr,
    unscale_ptr,
    out_ptr,  # [K, 4, F / 8, 2] fp16
    F2: tl.constexpr,
    G: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    slot = tl.program_id(1)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words_ptr += expert * (F2 * G * 4)
    scales_ptr += expert * (F2 * G)
    acc = _row_dots(words_ptr, scales_ptr, x_ptr, n, F2, G, BLOCK_N, BLOCK_G)
    y = tl.sum(acc, axis=1) * (tl.load(unscale_ptr) * _CODE_SCALE)
    y += tl.load(bias_ptr + expert * F2 + n, mask=n < F2, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(y, (BLOCK_N // 2, 2)))
    gate = tl.minimum(gate, LIMIT)
    up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    hidden = gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)
    f = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    place = ((f & 3) * (F2 // 16) + (f >> 3)) * 2 + ((f >> 2) & 1)
    out = out_ptr + slot * (F2 // 2) + place
    tl.store(out, (hidden * OUT_SCALE).to(tl.float16), mask=f < F2 // 2)


# A program computes BLOCK_N rows of the weighted sum over the K experts. Grid: D / BLOCK_N.
@triton.jit
def _down_kernel(
    words_ptr,
    scales_ptr,
    bias_ptr,  # [E, D]
    ids_ptr,
    weights_ptr,
    x_ptr,  # [K, 4, G * 4] int32
    out_ptr,  # [D] fp32, added to
    D: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    X_UNSCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    for slot in tl.static_range(K):
        expert = tl.load(ids_ptr + slot).to(tl.int64)
        weight = tl.load(weights_ptr + slot)
        words = words_ptr + expert * (D * G * 4)
        scales = scales_ptr + expert * (D * G)
        x = x_ptr + slot * (G * 16)
        total += weight * _row_dots(words, scales, x, n, D, G, BLOCK_N, BLOCK_G)
        row_bias = tl.load(bias_ptr + expert * D + n, mask=n < D, other=0.0)
        bias += weight * row_bias.to(tl.float32)
    y = tl.sum(total, axis=1) * (X_UNSCALE * _CODE_SCALE) + bias
    y += tl.load(out_ptr + n, mask=n < D, other=0.0)
    tl.store(out_ptr + n, y, mask=n < D)


def moe_gate_up(
    packed: Tensor,
    unscale: Tensor,
    gate_up: QuantTensor,
    bias: Tensor,
    expert_ids: Tensor,
    out: Tensor,
    *,
    limit: float,
    alpha: float,
) -> Tensor:
    """First half of the chosen experts for one token: gate_up and the clamped SwiGLU.

    packed:      [4, D / 8, 2] fp16, the normed token as router_topk packs it
    unscale:     [1] fp32
    gate_up:     [E, 2F, D] MXFP4; rows alternate gate, up
    bias:        [E, 2F]
    expert_ids:  [K] int32
    out:         [K, 4, F / 8, 2] fp16, written, times activation_scale(limit), in packed order

    Reads K * 2F * D * 17 / 32 bytes, which sets its time.
    """
    words, scales = _as_words(gate_up)
    rows, groups = scales.shape[1:]
    _gate_up_kernel[(triton.cdiv(rows, GATE_UP_ROWS), len(expert_ids))](
        words,
        scales,
        bias,
        expert_ids,
        packed.view(torch.int32),
        unscale,
        out,
        F2=rows,
        G=groups,
        LIMIT=limit,
        ALPHA=alpha,
        OUT_SCALE=activation_scale(limit),
        BLOCK_N=GATE_UP_ROWS,
        BLOCK_G=min(32, triton.next_power_of_2(groups)),
        num_warps=1,
    )
    return out


def moe_down(
    hidden: Tensor,
    down: QuantTensor,
    bias: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    out: Tensor,
    *,
    limit: float,
) -> Tensor:
    """Second half for one token: out += sum over the chosen of weight * (down @ hidden + bias).

    hidden:          [K, 4, F / 8, 2] fp16 as moe_gate_up leaves it
    down:            [E, D, F] MXFP4
    bias:            [E, D]
    expert_ids:      [K] int32
    expert_weights:  [K] fp32
    out:             [D] fp32, added to

    Reads K * D * F * 17 / 32 bytes, which sets its time.
    """
    words, scales = _as_words(down)
    rows, groups = scales.shape[1:]
    _down_kernel[(triton.cdiv(rows, DOWN_ROWS),)](
        words,
        scales,
        bias,
        expert_ids,
        expert_weights,
        hidden.view(torch.int32),
        out,
        D=rows,
        G=groups,
        K=len(expert_ids),
        X_UNSCALE=1.0 / activation_scale(limit),
        BLOCK_N=DOWN_ROWS,
        BLOCK_G=min(32, triton.next_power_of_2(groups)),
        num_warps=1,
    )
    return out


def _as_words(weight: QuantTensor) -> tuple[Tensor, Tensor]:
    """Values as int32 words and scales, checked to be what the kernels read."""
    assert weight.format is MXFP4, weight.format.name
    assert weight.scales is not None
    assert weight.values.is_contiguous() and weight.scales.is_contiguous()
    return weight.values.view(torch.int32), weight.scales
