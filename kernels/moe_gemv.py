"""The chosen experts of one token, weights decoded in registers.

Weights of 4 bits go through kernels/moe_gemv_fp4.py. Here are those of 8 and 16 bits: a lane loads
16 bytes of a row at a step, a word's weights are multiplied with the packed vector as its codes
want (kernels/packed_dot.py), and scales are fp32. Weights stay in the published order.

D model width, F expert width, K experts per token, S steps of 16 bytes in a row, W words in a step.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front
from kernels.moe_gemv_fp4 import down_fp4, gate_up_fp4
from kernels.packed_dot import dot4_bf16, dot8_e4m3
from kernels.packed_vector import PackedVectors, activation_scale, takes_digits
from kernels.swiglu import Swiglu, swiglu
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
_REGISTERS_AHEAD = 64  # of a lane, for words that are asked for before the wait


@triton.jit
def _load_step(
    words_ptr,  # [rows, S, W] of one expert
    scales_ptr,  # [rows / SCALE_ROWS, S / SCALE_STEPS] of one expert, or None
    n,  # [BLOCK_N] row numbers
    i: tl.constexpr,
    ROWS: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_STEPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Words [BLOCK_N, BLOCK_S, W] and stored scales [BLOCK_N, BLOCK_S] of rows n, the i-th steps.

    Without scales of blocks the second is nothing to look at."""
    SCALE_COLUMNS: tl.constexpr = (S + SCALE_STEPS - 1) // SCALE_STEPS
    s = i * BLOCK_S + tl.arange(0, BLOCK_S)
    w = tl.arange(0, W)
    good = (n < ROWS)[:, None] & (s < S)[None, :]
    place = n[:, None] * S + s[None, :]
    words = tl.load(
        words_ptr + place[:, :, None] * W + w[None, None, :],
        mask=good[:, :, None] & (w < W)[None, None, :],
        other=0,
    )
    stored = n
    if SCALES != "none" and SCALE_STEPS < S:
        where = (n // SCALE_ROWS)[:, None] * SCALE_COLUMNS + (s // SCALE_STEPS)[None, :]
        stored = tl.load(scales_ptr + where, mask=good, other=0)
    return words, stored


@triton.jit
def _step_dots(
    step,  # see _load_step
    x_ptr,  # [4, S * W]
    i: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_STEPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Dot products [BLOCK_N, BLOCK_S] of each step with the packed vector, scales of blocks in."""
    words, stored = step
    s = i * BLOCK_S + tl.arange(0, BLOCK_S)
    w = tl.arange(0, W)
    column = (s[:, None] * W + w[None, :])[None, :, :]
    inside = ((s < S)[:, None] & (w < W)[None, :])[None, :, :]
    x0 = tl.load(x_ptr + column, mask=inside, other=0)
    x1 = tl.load(x_ptr + S * W + column, mask=inside, other=0)
    x2 = tl.load(x_ptr + S * W * 2 + column, mask=inside, other=0)
    x3 = tl.load(x_ptr + S * W * 3 + column, mask=inside, other=0)
    if CODES == "e4m3":
        dots = tl.sum(dot8_e4m3(words, x0, x1, x2, x3), axis=2)
    else:
        dots = tl.sum(dot4_bf16(words, x0, x1, x2, x3), axis=2)
    if SCALES != "none" and SCALE_STEPS < S:
        dots *= decode_scale(stored, SCALES)
    return dots


@triton.jit
def _times_row_scale(
    acc,  # [BLOCK_N, BLOCK_S]
    scales_ptr,
    n,
    ROWS: tl.constexpr,
    S: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_STEPS: tl.constexpr,
):
    """Sums over a row, times its scale where one is the whole row's."""
    if SCALES != "none" and SCALE_STEPS >= S:
        stored = tl.load(scales_ptr + n // SCALE_ROWS, mask=n < ROWS, other=0)
        acc *= decode_scale(stored, SCALES)[:, None]
    return acc


# A program computes BLOCK_N rows, gate and up in turn, of one chosen expert and stores BLOCK_N / 2
# activations. Grid: 2F / BLOCK_N, K + ALWAYS.
@triton.jit
def _gate_up_kernel(
    words_ptr,
    scales_ptr,
    always_words_ptr,  # of experts that every token takes, or None
    always_scales_ptr,
    bias_ptr,  # [E, 2F] or None
    ids_ptr,
    x_ptr,
    unscale_ptr,
    out_ptr,  # [K, 4, F / 8, 2] fp16
    trace_ptr,
    F2: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    CODES: tl.constexpr,
    UNSCALE: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_STEPS: tl.constexpr,
    SCALES_PER_EXPERT: tl.constexpr,
    GATE_STEP: tl.constexpr,
    TO_UP: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    ALWAYS: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    slot = tl.program_id(1)
    one = tl.arange(0, BLOCK_N)
    n = (tl.program_id(0) * (BLOCK_N // 2) + one // 2) * GATE_STEP + one % 2 * TO_UP
    steps = ()
    if AHEAD > 0:  # all that are there are taken: what to read is known before the wait
        words_ptr += slot.to(tl.int64) * (F2 * S * W)
        if scales_ptr is not None:
            scales_ptr += slot.to(tl.int64) * SCALES_PER_EXPERT
        for i in tl.static_range(AHEAD):
            step = _load_step(
                words_ptr, scales_ptr, n, i, F2, S, W, SCALES, SCALE_ROWS, SCALE_STEPS, BLOCK_S
            )
            steps = steps + (step,)  # type: ignore[assignment]
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    # After the wait: then the kernel behind may read the chosen experts before its own.
    let_next_start(EARLY)
    if AHEAD > 0:
        expert = slot.to(tl.int64)
    elif ALWAYS == 0:
        expert = tl.load(ids_ptr + slot).to(tl.int64)
    else:
        chosen = tl.num_programs(1) - ALWAYS
        if slot < chosen:
            expert = tl.load(ids_ptr + slot).to(tl.int64)
        else:
            expert = (slot - chosen).to(tl.int64)
            words_ptr = always_words_ptr
            if scales_ptr is not None:
                scales_ptr = always_scales_ptr
    if AHEAD == 0:
        words_ptr += expert * (F2 * S * W)
        if scales_ptr is not None:
            scales_ptr += expert * SCALES_PER_EXPERT
    acc = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    for i in tl.static_range((S + BLOCK_S - 1) // BLOCK_S):
        if i < AHEAD:
            acc += _step_dots(steps[i], x_ptr, i, S, W, CODES, SCALES, SCALE_STEPS, BLOCK_S)
        else:
            step = _load_step(
                words_ptr, scales_ptr, n, i, F2, S, W, SCALES, SCALE_ROWS, SCALE_STEPS, BLOCK_S
            )
            acc += _step_dots(step, x_ptr, i, S, W, CODES, SCALES, SCALE_STEPS, BLOCK_S)
    acc = _times_row_scale(acc, scales_ptr, n, F2, S, SCALES, SCALE_ROWS, SCALE_STEPS)
    y = tl.sum(acc, axis=1) * (tl.load(unscale_ptr) * UNSCALE)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + expert * F2 + n, mask=n < F2, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(y, (BLOCK_N // 2, 2)))
    hidden = swiglu(gate, up, LIMIT, ALPHA, OFFSET)
    f = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    place = ((f & 3) * (F2 // 16) + (f >> 3)) * 2 + ((f >> 2) & 1)
    out = out_ptr + slot * (F2 // 2) + place
    tl.store(out, (hidden * OUT_SCALE).to(tl.float16), mask=f < F2 // 2)
    stamp(trace_ptr, 2)


# A program computes BLOCK_N rows of the weighted sum over the K experts. Grid: D / BLOCK_N.
@triton.jit
def _down_kernel(
    words_ptr,
    scales_ptr,
    always_words_ptr,  # of experts that every token takes, or None
    always_scales_ptr,
    bias_ptr,  # [E, D] or None
    ids_ptr,
    weights_ptr,
    x_ptr,  # [K + ALWAYS, 4, S * W]
    unscale_ptr,
    out_ptr,  # [D] fp32, added to
    trace_ptr,
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
    ALWAYS: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    STEPS: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    # The kernel in front started this one after its own wait: the router's choice is there, and the
    # first words can be asked for before the vector is.
    experts = ()
    stacks = ()
    for slot in tl.static_range(K + ALWAYS):
        if slot < K:
            expert = tl.load(ids_ptr + slot).to(tl.int64)
            experts = experts + (expert,)  # type: ignore[assignment]
            words = words_ptr + expert * (D * S * W)
            scales = words  # nothing to look at
            if scales_ptr is not None:
                scales = scales_ptr + expert * SCALES_PER_EXPERT
        else:
            words = always_words_ptr + (slot - K) * (D * S * W)
            scales = words
            if scales_ptr is not None:
                scales = always_scales_ptr + (slot - K) * SCALES_PER_EXPERT
        stacks = stacks + ((words, scales),)  # type: ignore[assignment]
    steps = ()
    for i in tl.static_range(AHEAD):
        words, scales = stacks[i // STEPS]
        step = _load_step(
            words, scales, n, i % STEPS, D, S, W, SCALES, SCALE_ROWS, SCALE_STEPS, BLOCK_S
        )
        steps = steps + (step,)  # type: ignore[assignment]
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    total = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    for slot in tl.static_range(K + ALWAYS):
        words, scales = stacks[slot]
        x = x_ptr + slot * (S * W * 4)
        acc = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
        for i in tl.static_range(STEPS):
            if slot * STEPS + i < AHEAD:
                acc += _step_dots(
                    steps[slot * STEPS + i], x, i, S, W, CODES, SCALES, SCALE_STEPS, BLOCK_S
                )
            else:
                step = _load_step(
                    words, scales, n, i, D, S, W, SCALES, SCALE_ROWS, SCALE_STEPS, BLOCK_S
                )
                acc += _step_dots(step, x, i, S, W, CODES, SCALES, SCALE_STEPS, BLOCK_S)
        acc = _times_row_scale(acc, scales, n, D, S, SCALES, SCALE_ROWS, SCALE_STEPS)
        if slot < K:
            weight = tl.load(weights_ptr + slot)
            acc *= weight
            if bias_ptr is not None:
                row_bias = tl.load(bias_ptr + experts[slot] * D + n, mask=n < D, other=0.0)
                bias += weight * row_bias.to(tl.float32)
        total += acc
    y = tl.sum(total, axis=1) * (tl.load(unscale_ptr) * UNSCALE) + bias
    y += tl.load(out_ptr + n, mask=n < D, other=0.0)
    tl.store(out_ptr + n, y, mask=n < D)
    stamp(trace_ptr, 2)


def moe_gate_up(
    x: PackedVectors,
    gate_up: QuantTensor,
    bias: Tensor | None,
    expert_ids: Tensor,
    out: PackedVectors,
    activation: Swiglu,
    *,
    always: QuantTensor | None = None,
    in_order: bool = False,
    trace: Tensor | None = None,
) -> PackedVectors:
    """First half of the chosen experts for one token: gate_up and the gated activation.

    x:           one vector of D numbers, the normed token, in the form that gate_up's format takes
    gate_up:     [E, 2F, D] in any format
    bias:        [E, 2F] or None
    expert_ids:  [K] int32
    out:         K vectors of F numbers in the same form, written
    activation:  also says how gate and up rows stand
    always:      [A, 2F, D] in the same format of 8 or 16 bits: experts of every token, whose
                 vectors follow the K chosen ones' in out
    in_order:    expert_ids are 0, 1, ..., K - 1: weights of 8 or 16 bits are then asked for before
                 the kernel in front has ended

    Reads K experts' weights and scales, in MXFP4 K * 2F * D * 17 / 32 bytes, which sets its time.
    """
    _check_always(gate_up, always, bias)
    assert not (in_order and always is not None), "what is always taken is named once"
    if takes_digits(gate_up.format):
        gate_up_fp4(x, gate_up, bias, expert_ids, out, activation, trace)
        return out
    assert not (x.digits or out.digits)
    rows = gate_up.shape[1]
    step, to_up = activation.rows(rows // 2)
    count = 0 if always is None else always.shape[0]
    _gate_up_kernel[(triton.cdiv(rows, GATE_UP_ROWS), len(expert_ids) + count)](
        as_words(gate_up),
        scale_bytes(gate_up),
        None if always is None else as_words(always),
        None if always is None else scale_bytes(always),
        bias,
        expert_ids,
        _as_read(x, gate_up),
        x.unscale,
        out.values,
        trace,
        F2=rows,
        **_steps(gate_up),
        GATE_STEP=step,
        TO_UP=to_up,
        LIMIT=activation.limit,
        ALPHA=activation.alpha,
        OFFSET=activation.offset,
        OUT_SCALE=activation_scale(activation.limit),
        ALWAYS=count,
        AHEAD=_steps_ahead(gate_up, GATE_UP_ROWS, 1) if in_order else 0,
        BLOCK_N=GATE_UP_ROWS,
        num_warps=1,
        **early_start(x.values),
    )
    return out


def moe_down(
    hidden: PackedVectors,
    down: QuantTensor,
    bias: Tensor | None,
    expert_ids: Tensor,
    expert_weights: Tensor,
    out: Tensor,
    *,
    always: QuantTensor | None = None,
    trace: Tensor | None = None,
) -> Tensor:
    """Second half for one token: out += sum over the chosen of weight * (down @ hidden + bias).

    hidden:          K vectors of F numbers as moe_gate_up leaves them
    down:            [E, D, F] in any format
    bias:            [E, D] or None
    expert_ids:      [K] int32
    expert_weights:  [K] fp32
    out:             [D] fp32, added to
    always:          [A, D, F] of experts that every token takes with weight 1, as in moe_gate_up

    Reads K experts' weights and scales, in MXFP4 K * D * F * 17 / 32 bytes, which sets its time.
    """
    _check_always(down, always, bias)
    if takes_digits(down.format):
        down_fp4(hidden, down, bias, expert_ids, expert_weights, out, trace)
        return out
    assert not hidden.digits
    rows = down.shape[1]
    count = 0 if always is None else always.shape[0]
    _down_kernel[(triton.cdiv(rows, DOWN_ROWS),)](
        as_words(down),
        scale_bytes(down),
        None if always is None else as_words(always),
        None if always is None else scale_bytes(always),
        bias,
        expert_ids,
        expert_weights,
        _as_read(hidden, down),
        hidden.unscale,
        out,
        trace,
        D=rows,
        **_steps(down),
        K=len(expert_ids),
        ALWAYS=count,
        AHEAD=_steps_ahead(down, DOWN_ROWS, len(expert_ids) + count),
        BLOCK_N=DOWN_ROWS,
        num_warps=1,
        **early_start(out),
    )
    return out


def can_join(chosen: QuantTensor, always: QuantTensor) -> bool:
    """Whether experts of every token can go with the chosen ones in one launch."""
    return (
        chosen.format is always.format
        and chosen.shape[1:] == always.shape[1:]
        and not takes_digits(chosen.format)
    )


def _check_always(chosen: QuantTensor, always: QuantTensor | None, bias: Tensor | None) -> None:
    assert always is None or (bias is None and can_join(chosen, always)), always


def _as_read(x: PackedVectors, weight: QuantTensor) -> Tensor:
    """The planes: pairs in 32 bits for codes, single fp16 numbers for bf16 weights."""
    bf16 = codes_of(weight.format).name == "bf16"
    return x.values if bf16 else x.values.view(dtype=torch.int32)


def _steps_ahead(weight: QuantTensor, rows: int, experts: int) -> int:
    """How many steps of a program's rows are asked for before the wait; a lane has four registers
    of a row's."""
    constants = _steps(weight)
    steps = experts * triton.cdiv(constants["S"], constants["BLOCK_S"])
    return min(steps, _REGISTERS_AHEAD // (4 * rows))


def _steps(weight: QuantTensor) -> dict[str, Any]:
    """The compile-time constants of a format and a weight's size."""
    codes = codes_of(weight.format)
    scales = scale_bytes(weight)
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
