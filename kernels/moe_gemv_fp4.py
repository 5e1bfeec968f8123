"""The chosen experts of one token with 4-bit weights; kernels/fp4_products.py has the arithmetic.

D model width, F expert width, K experts per token, G groups of 32 columns in a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front
from kernels.fp4_products import HALF, add_step, digit_places, load_digits, row_pairs
from kernels.packed_vector import PackedVectors, digits_of
from kernels.swiglu import Swiglu, swiglu
from kernels.weight_formats import as_words, scale_bytes, scales_of
from quant.tensor import QuantTensor


@dataclass(frozen=True)
class Tile:
    """How many warps share a row's columns, and how many steps a warp asks for ahead."""

    parts: int
    ahead: int


GATE_UP = Tile(1, 4)
DOWN = Tile(2, 3)
_GATE_UP_ROWS = 64  # of a program: their activations are one group of digits
_DOWN_ROWS = 16


@triton.jit
def _load_rows(
    words_ptr, scales_ptr, first, second, group, good, G: tl.constexpr, SCALES: tl.constexpr
):
    """Words [T, 4] and scales of one group of two rows."""
    i = tl.arange(0, 4)[None, :]
    a = tl.load(words_ptr + (first * G + group)[:, None] * 4 + i, mask=good[:, None], other=0)
    b = tl.load(words_ptr + (second * G + group)[:, None] * 4 + i, mask=good[:, None], other=0)
    # Two E4M3 scales of 16 columns stand in 16 bits.
    s = tl.load(scales_ptr + first * G + group, mask=good, other=0)
    u = tl.load(scales_ptr + second * G + group, mask=good, other=0)
    return a, b, s, u


@triton.jit
def _row_sums(
    words_ptr,
    scales_ptr,
    first,  # [T] row of the lane's first 16 bytes, from words_ptr
    second,  # [T] and of its second
    good,  # [T] whether these rows are there
    x_ptr,
    vector,
    unscale_ptr,
    begin,  # [T] first step of the lane's part
    zero,
    X_ZERO: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    STEPS: tl.constexpr,  # of a part
    SCALES: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
    WAIT: tl.constexpr,
    trace_ptr,
):
    """[T, 4]: each lane's sums over its groups, of the first row in column 0, the second in 1.

    Rows may be asked for before the vector is there: then it waits in between.
    """
    LAST: tl.constexpr = (G + 3) // 4 - 1
    t = tl.arange(0, T)
    c = t % 4
    x_place, x_stride = digit_places(t, vector, X_ZERO, G)
    rows = ()
    for i in tl.static_range(AHEAD):
        group = (begin + i) * 4 + c
        here = good & (group < G) & (i < STEPS)
        rows = rows + (  # type: ignore[assignment]
            _load_rows(words_ptr, scales_ptr, first, second, group, here, G, SCALES),
        )
    if WAIT:
        wait_for_front(EARLY)
        stamp(trace_ptr, 1)
    vectors = ()
    for i in tl.static_range(AHEAD):
        step = begin + i
        group = step * 4 + c
        here = good & (group < G) & (i < STEPS)
        place = x_place + tl.minimum(step, LAST) * x_stride
        vectors = vectors + (  # type: ignore[assignment]
            load_digits(x_ptr, unscale_ptr, place, group, here, T, SCALES),
        )
    sums = tl.zeros((T, 4), tl.float32)
    for step0 in range(0, STEPS, AHEAD):
        next_rows = ()
        next_vectors = ()
        for i in tl.static_range(AHEAD):
            step = begin + (step0 + i)
            group = step * 4 + c
            a, b, s, u = rows[i]  # type: ignore[var-annotated]
            x0, x1, size = vectors[i]  # type: ignore[var-annotated]
            sums = add_step(
                sums, a, b, s, u, x0, x1, size, x_ptr, vector, group, zero, T, G, SCALES
            )
            step += AHEAD
            group = step * 4 + c
            here = good & (group < G) & (step0 + i + AHEAD < STEPS)
            place = x_place + tl.minimum(step, LAST) * x_stride
            next_rows = next_rows + (  # type: ignore[assignment]
                _load_rows(words_ptr, scales_ptr, first, second, group, here, G, SCALES),
            )
            next_vectors = next_vectors + (  # type: ignore[assignment]
                load_digits(x_ptr, unscale_ptr, place, group, here, T, SCALES),
            )
        rows = next_rows
        vectors = next_vectors
    return sums


# A program computes 32 gate rows and their up rows of one chosen expert, and stores a group of 32
# activations. Grid: F / 32, K.
@triton.jit
def _gate_up_kernel(
    words_ptr,  # [E, 2F, G * 4]
    scales_ptr,  # [E, 2F, G]
    tensor_scale_ptr,
    bias_ptr,  # [E, 2F] or None
    ids_ptr,
    x_ptr,  # [2, D] int8
    unscale_ptr,  # [G]
    out_ptr,  # [K, 2, F] int8
    out_unscale_ptr,  # [K, F / 32]
    trace_ptr,
    X_ZERO: tl.constexpr,
    F: tl.constexpr,
    G: tl.constexpr,
    SCALES: tl.constexpr,
    GATE_STEP: tl.constexpr,
    TO_UP: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    T: tl.constexpr = 128 * PARTS
    STEPS: tl.constexpr = (G + 4 * PARTS - 1) // (4 * PARTS)
    t = tl.arange(0, T)
    slot = tl.program_id(1)
    own_f = t // 32 % 4 * 8 + t % 32 // 4
    gate_row = (tl.program_id(0) * 32 + own_f) * GATE_STEP
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    # After the wait: then the kernel behind may read the chosen experts before its own.
    let_next_start(EARLY)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    f = tl.program_id(0) * 32 + tl.arange(0, 32)
    if bias_ptr is not None:
        bias = bias_ptr + expert * (2 * F) + f * GATE_STEP
        gate_bias = tl.load(bias).to(tl.float32)
        up_bias = tl.load(bias + TO_UP).to(tl.float32)
    sums = _row_sums(
        words_ptr + expert * (2 * F * G * 4), scales_ptr + expert * (2 * F * G),
        gate_row, gate_row + TO_UP, gate_row < 2 * F, x_ptr, t * 0, unscale_ptr,
        t // 128 * STEPS, t * 0 + (expert >> 63).to(tl.int32),
        X_ZERO, T, G, STEPS, SCALES, AHEAD, EARLY, False, trace_ptr,
    )  # fmt: skip
    gates, ups = row_pairs(sums, T)
    factor = HALF
    if tensor_scale_ptr is not None:
        factor *= tl.load(tensor_scale_ptr)
    gate = tl.sum(tl.sum(tl.reshape(gates, (PARTS, 32, 4)), axis=2), axis=0) * factor
    up = tl.sum(tl.sum(tl.reshape(ups, (PARTS, 32, 4)), axis=2), axis=0) * factor
    if bias_ptr is not None:
        gate += gate_bias
        up += up_bias
    hidden = swiglu(gate, up, LIMIT, ALPHA, OFFSET)
    high, low, unscale = digits_of(hidden[None, :])
    out = out_ptr + slot * (2 * F) + f[None, :]
    tl.store(out, high.to(tl.int8))
    tl.store(out + F, low.to(tl.int8))
    group = tl.program_id(0) + tl.arange(0, 1)
    tl.store(out_unscale_ptr + slot * (F // 32) + group, unscale)
    stamp(trace_ptr, 2)


# A program computes 16 rows of the weighted sum over the K experts; a warp has one expert and a
# part of its columns. Grid: D / 16.
@triton.jit
def _down_kernel(
    words_ptr,  # [E, D, G * 4]
    scales_ptr,  # [E, D, G]
    tensor_scale_ptr,
    bias_ptr,  # [E, D] or None
    ids_ptr,
    weights_ptr,
    x_ptr,  # [K, 2, F] int8
    unscale_ptr,  # [K, G]
    out_ptr,  # [D] fp32, added to
    trace_ptr,
    X_ZERO: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    SCALES: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    T: tl.constexpr = 32 * WARPS
    STEPS: tl.constexpr = (G + 4 * PARTS - 1) // (4 * PARTS)
    t = tl.arange(0, T)
    slot = t // 32 // PARTS
    part = t // 32 % PARTS
    used = slot < K
    # The kernel in front started this one after its own wait: the router's choice is there.
    expert = tl.load(ids_ptr + slot, mask=used, other=0).to(tl.int64)
    weight = tl.load(weights_ptr + slot, mask=used, other=0.0)
    row = tl.program_id(0) * 16 + t % 32 // 4
    own = tl.where(used, slot, 0)
    first = expert * D + row
    if bias_ptr is not None:
        once = used & (part == 0) & (t % 4 == 0)
        first_bias = tl.load(bias_ptr + first, mask=once, other=0.0).to(tl.float32)
        second_bias = tl.load(bias_ptr + first + 8, mask=once, other=0.0).to(tl.float32)
    sums = _row_sums(
        words_ptr, scales_ptr, first, first + 8, used, x_ptr, own,
        unscale_ptr + own * G, part * STEPS,
        (expert >> 63).to(tl.int32), X_ZERO, T, G, STEPS, SCALES, AHEAD, EARLY, True, trace_ptr,
    )  # fmt: skip
    one, two = row_pairs(sums, T)
    factor = HALF
    if tensor_scale_ptr is not None:
        factor *= tl.load(tensor_scale_ptr)
    one *= factor
    two *= factor
    if bias_ptr is not None:
        one += first_bias
        two += second_bias
    one = tl.sum(tl.sum(tl.reshape(one * weight, (WARPS, 8, 4)), axis=2), axis=0)
    two = tl.sum(tl.sum(tl.reshape(two * weight, (WARPS, 8, 4)), axis=2), axis=0)
    out = out_ptr + tl.program_id(0) * 16 + tl.arange(0, 8)
    tl.store(out, tl.load(out) + one)
    tl.store(out + 8, tl.load(out + 8) + two)
    stamp(trace_ptr, 2)


def gate_up_fp4(
    x: PackedVectors,
    gate_up: QuantTensor,
    bias: Tensor | None,
    expert_ids: Tensor,
    out: PackedVectors,
    activation: Swiglu,
    trace: Tensor | None,
) -> None:
    """See moe_gemv.moe_gate_up; x and out are digits."""
    width = gate_up.shape[1] // 2
    assert x.digits and out.digits and 2 * width % _GATE_UP_ROWS == 0
    step, to_up = activation.rows(width)
    _gate_up_kernel[(2 * width // _GATE_UP_ROWS, len(expert_ids))](
        *_weight_parts(gate_up),
        bias,
        expert_ids,
        x.values,
        x.unscale,
        out.values,
        out.unscale,
        trace,
        X_ZERO=x.values.numel() // 4,
        F=width,
        GATE_STEP=step,
        TO_UP=to_up,
        LIMIT=activation.limit,
        ALPHA=activation.alpha,
        OFFSET=activation.offset,
        **_constants(gate_up, GATE_UP),
        num_warps=4 * GATE_UP.parts,
        **early_start(x.values),
    )


def down_fp4(
    hidden: PackedVectors,
    down: QuantTensor,
    bias: Tensor | None,
    expert_ids: Tensor,
    expert_weights: Tensor,
    out: Tensor,
    trace: Tensor | None,
) -> None:
    """See moe_gemv.moe_down; hidden is digits."""
    rows = down.shape[1]
    assert hidden.digits and rows % _DOWN_ROWS == 0
    warps = triton.next_power_of_2(len(expert_ids) * DOWN.parts)
    _down_kernel[(rows // _DOWN_ROWS,)](
        *_weight_parts(down),
        bias,
        expert_ids,
        expert_weights,
        hidden.values,
        hidden.unscale,
        out,
        trace,
        X_ZERO=hidden.values.numel() // 4,
        D=rows,
        K=len(expert_ids),
        WARPS=warps,
        **_constants(down, DOWN),
        num_warps=warps,
        **early_start(out),
    )


def _weight_parts(weight: QuantTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words, scales (one number for 32 columns) and tensor scale."""
    scales = scale_bytes(weight)
    assert scales is not None
    if scales_of(weight.format) == "e4m3":
        scales = scales.view(torch.int16)
    return as_words(weight), scales, weight.tensor_scale


def _constants(weight: QuantTensor, tile: Tile) -> dict[str, Any]:
    return {
        "G": weight.shape[-1] // 32,
        "SCALES": scales_of(weight.format),
        "PARTS": tile.parts,
        "AHEAD": tile.ahead,
    }
