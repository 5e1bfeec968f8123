"""The chosen experts of one token, weights decoded in registers.

One kernel for every format of kernels/weight_formats.py: a lane loads 16 bytes of a row at a step,
a word's weights are multiplied with the packed vector as its codes want, and scales are fp32.

Weights stay in the published order. In MXFP4 and NVFP4 a 32-bit word holds eight codes of one row,
low nibble first:

    bit    31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
    code     7      6      5      4      3      2      1      0        code = s e e m

Codes i and i + 4 stand in the two halves of the word at the same place, so shifting and masking
makes a pair of fp16 numbers at once: sign to bit 15, e e m to bits 11..9, which is the code's
value times 2^-14 (fp16 subnormals make 0.5 exact). The vector is packed to match: word w of plane
i holds x[8 w + i] in its low half and x[8 w + 4 + i] in its high half, as fp16 scaled by a power
of two that keeps products out of the subnormals. Four packed FMAs make one partial sum of eight
weights; the group's scale and the sums across groups are fp32.

D model width, F expert width, K experts per token, S steps of 16 bytes in a row, W words in a step.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed_dot import dot4_bf16, dot8_e4m3
from kernels.packed_vector import activation_scale
from kernels.weight_formats import (
    as_words,
    codes_of,
    decode_scale,
    scale_block,
    scale_bytes,
    scales_of,
)
from quant.tensor import QuantTensor

# One warp a program: a lane holds whole steps, so no sum leaves a warp and no vector is exchanged.
GATE_UP_ROWS = 2
DOWN_ROWS = 1

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
def _dot_words(words, x0, x1, x2, x3, CODES: tl.constexpr):
    """fp32 sums over the weights of each word times the packed vector."""
    if CODES == "e2m1":
        return _dot8(words, x0, x1, x2, x3)
    elif CODES == "e4m3":
        return dot8_e4m3(words, x0, x1, x2, x3)
    else:
        return dot4_bf16(words, x0, x1, x2, x3)


@triton.jit
def _row_dots(
    words_ptr,  # [rows, S, W] of one expert
    scales_ptr,  # [rows / SCALE_ROWS, S / SCALE_STEPS] of one expert, or None
    x_ptr,  # [4, S * W]
    n,  # [BLOCK_N] row numbers
    ROWS: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Per-thread partial dot products [BLOCK_N, BLOCK_S] of rows n with the packed vector."""
    SCALE_COLUMNS: tl.constexpr = (S + SCALE_STEPS - 1) // SCALE_STEPS
    TWO_A_STEP: tl.constexpr = SCALES == "e4m3"  # groups of 16 columns
    PER_ROW: tl.constexpr = SCALES != "none" and SCALE_STEPS >= S and not TWO_A_STEP
    acc = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    w = tl.arange(0, W)
    rows = n < ROWS
    for s0 in tl.static_range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        good = rows[:, None] & (s < S)[None, :]
        place = n[:, None] * S + s[None, :]
        words = tl.load(
            words_ptr + place[:, :, None] * W + w[None, None, :],
            mask=good[:, :, None] & (w < W)[None, None, :],
            other=0,
        )
        if TWO_A_STEP:  # one for each half, in 16 bits
            stored = tl.load(scales_ptr + place, mask=good, other=0).to(tl.int32)
        elif not (PER_ROW or SCALES == "none"):
            where = (n // SCALE_ROWS)[:, None] * SCALE_COLUMNS + (s // SCALE_STEPS)[None, :]
            stored = tl.load(scales_ptr + where, mask=good, other=0)
        column = (s[:, None] * W + w[None, :])[None, :, :]
        inside = ((s < S)[:, None] & (w < W)[None, :])[None, :, :]
        x0 = tl.load(x_ptr + column, mask=inside, other=0)
        x1 = tl.load(x_ptr + S * W + column, mask=inside, other=0)
        x2 = tl.load(x_ptr + S * W * 2 + column, mask=inside, other=0)
        x3 = tl.load(x_ptr + S * W * 3 + column, mask=inside, other=0)
        dots = _dot_words(words, x0, x1, x2, x3, CODES)
        if TWO_A_STEP:
            first = decode_scale(stored & 0xFF, SCALES)[:, :, None]
            second = decode_scale((stored >> 8) & 0xFF, SCALES)[:, :, None]
            acc += tl.sum(dots * tl.where(w[None, None, :] < W // 2, first, second), axis=2)
        elif PER_ROW or SCALES == "none":
            acc += tl.sum(dots, axis=2)
        else:
            acc += tl.sum(dots, axis=2) * decode_scale(stored, SCALES)
    if PER_ROW:
        stored = tl.load(scales_ptr + n // SCALE_ROWS, mask=rows, other=0)
        acc *= decode_scale(stored, SCALES)[:, None]
    return acc


@triton.jit
def _whole_scale(tensor_scale_ptr, UNSCALE: tl.constexpr):
    """What multiplies every sum: the tensor's own scale, and the factor that codes lack."""
    if tensor_scale_ptr is None:
        return UNSCALE
    else:
        return tl.load(tensor_scale_ptr) * UNSCALE


# A program computes BLOCK_N rows (gate and up alternate) of one chosen expert and stores
# BLOCK_N / 2 activations. Grid: 2F / BLOCK_N, K.
@triton.jit
def _gate_up_kernel(
    words_ptr,
    scales_ptr,
    tensor_scale_ptr,
    bias_ptr,  # [E, 2F]
    ids_ptr,
    x_ptr,
    unscale_ptr,
    out_ptr,  # [K, 4, F / 8, 2] fp16
    F2: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    CODES: tl.constexpr,
    UNSCALE: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_STEPS: tl.constexpr,
    SCALES_PER_EXPERT: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    slot = tl.program_id(1)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words_ptr += expert * (F2 * S * W)
    if scales_ptr is not None:
        scales_ptr += expert * SCALES_PER_EXPERT
    acc = _row_dots(
        words_ptr, scales_ptr, x_ptr, n, F2, S, W, CODES, SCALES, SCALE_ROWS, SCALE_STEPS,
        BLOCK_N, BLOCK_S,
    )  # fmt: skip
    whole = _whole_scale(tensor_scale_ptr, UNSCALE)
    y = tl.sum(acc, axis=1) * (tl.load(unscale_ptr) * whole)
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
    tensor_scale_ptr,
    bias_ptr,  # [E, D]
    ids_ptr,
    weights_ptr,
    x_ptr,  # [K, 4, S * W]
    out_ptr,  # [D] fp32, added to
    D: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    CODES: tl.constexpr,
    UNSCALE: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_STEPS: tl.constexpr,
    SCALES_PER_EXPERT: tl.constexpr,
    K: tl.constexpr,
    X_UNSCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    for slot in tl.static_range(K):
        expert = tl.load(ids_ptr + slot).to(tl.int64)
        weight = tl.load(weights_ptr + slot)
        words = words_ptr + expert * (D * S * W)
        scales = scales_ptr
        if scales_ptr is not None:
            scales = scales_ptr + expert * SCALES_PER_EXPERT
        x = x_ptr + slot * (S * W * 4)
        total += weight * _row_dots(
            words, scales, x, n, D, S, W, CODES, SCALES, SCALE_ROWS, SCALE_STEPS,
            BLOCK_N, BLOCK_S,
        )  # fmt: skip
        row_bias = tl.load(bias_ptr + expert * D + n, mask=n < D, other=0.0)
        bias += weight * row_bias.to(tl.float32)
    whole = _whole_scale(tensor_scale_ptr, UNSCALE)
    y = tl.sum(total, axis=1) * (X_UNSCALE * whole) + bias
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
    gate_up:     [E, 2F, D] in any format; rows alternate gate, up
    bias:        [E, 2F]
    expert_ids:  [K] int32
    out:         [K, 4, F / 8, 2] fp16, written, times activation_scale(limit), in packed order

    Reads K experts' weights and scales, in MXFP4 K * 2F * D * 17 / 32 bytes, which sets its time.
    """
    rows = gate_up.shape[1]
    _gate_up_kernel[(triton.cdiv(rows, GATE_UP_ROWS), len(expert_ids))](
        *_as_words(gate_up),
        bias,
        expert_ids,
        _as_read(packed, gate_up),
        unscale,
        out,
        F2=rows,
        **_steps(gate_up),
        LIMIT=limit,
        ALPHA=alpha,
        OUT_SCALE=activation_scale(limit),
        BLOCK_N=GATE_UP_ROWS,
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
    down:            [E, D, F] in any format
    bias:            [E, D]
    expert_ids:      [K] int32
    expert_weights:  [K] fp32
    out:             [D] fp32, added to

    Reads K experts' weights and scales, in MXFP4 K * D * F * 17 / 32 bytes, which sets its time.
    """
    rows = down.shape[1]
    _down_kernel[(triton.cdiv(rows, DOWN_ROWS),)](
        *_as_words(down),
        bias,
        expert_ids,
        expert_weights,
        _as_read(hidden, down),
        out,
        D=rows,
        **_steps(down),
        K=len(expert_ids),
        X_UNSCALE=1.0 / activation_scale(limit),
        BLOCK_N=DOWN_ROWS,
        num_warps=1,
    )
    return out


def _as_words(weight: QuantTensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Words, scales and tensor scale as the kernels read them."""
    scales = scale_bytes(weight)
    if scales is not None and scales_of(weight.format) == "e4m3":
        scales = scales.view(torch.int16)
    return as_words(weight), scales, weight.tensor_scale


def _as_read(packed: Tensor, weight: QuantTensor) -> Tensor:
    """The packed vector: pairs in 32 bits for codes, single fp16 numbers for bf16 weights."""
    return packed if codes_of(weight.format).name == "bf16" else packed.view(torch.int32)


def _steps(weight: QuantTensor) -> dict[str, Any]:
    """The compile-time constants of a format and a weight's size."""
    codes = codes_of(weight.format)
    scales = _as_words(weight)[1]
    words = 16 // codes.word.itemsize
    scale_rows, scale_columns = scale_block(weight)
    steps = weight.shape[-1] // (words * codes.columns)
    return {
        "S": steps,
        "W": words,
        "CODES": codes.name,
        "UNSCALE": codes.unscale,
        "SCALES": scales_of(weight.format),
        "SCALE_ROWS": scale_rows,
        "SCALE_STEPS": max(1, scale_columns // (words * codes.columns)),
        "SCALES_PER_EXPERT": 0 if scales is None else scales[0].numel(),
        "BLOCK_S": min(32, triton.next_power_of_2(steps)),
    }
