"""The chosen experts of one token with 4-bit weights, on integer tensor cores.

E2M1 values times two are integers, and so is the token's vector as digits, which are described in
kernels/packed_vector.py: mma.m16n8k32 multiplies them exactly. A tile has 16 rows; its eight
columns are four groups of 32 numbers times two digits. Lane 4 r + c of a warp loads 16 bytes, the
32 codes of group c of a step, of two rows, and gets the sums of that group for both:

    A   row r, columns of lane c: codes of its group; word i of the 16 bytes goes to product i
    B   column 2 j + d: digit d of group j where j = c, else zero, so that groups do not mix
    D   lane 4 r + c: row r (and the second row), columns 2 c and 2 c + 1: its group's two digits

A byte permutation looks up four codes at a time. Its selector's fourth bit, the code's sign, asks
for the looked-up byte's own sign, which is zero: so one look-up gives the positive codes' values
with zeros elsewhere, and one of the codes with flipped signs the negative ones'. Two products and
a difference cost less than building signed bytes.

    word            prmt(0 1 2 3 4 6 8 12, word & 0xFFFF)
    s e e m  x 8    byte i: value of code i if s = 0, else 0

D model width, F expert width, K experts per token, G groups of 32 columns in a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front
from kernels.packed_vector import PackedVectors, digits_of
from kernels.swiglu import Swiglu, swiglu
from kernels.weight_formats import as_words, decode_scale, scale_bytes, scales_of
from quant.tensor import QuantTensor

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_HALF = tl.constexpr(0.5)  # codes are looked up as twice their value
_BASE = tl.constexpr(256)  # of digits


@dataclass(frozen=True)
class Tile:
    """How many warps share a row's columns, and how many steps a warp asks for ahead."""

    parts: int
    ahead: int


GATE_UP = Tile(1, 4)
DOWN = Tile(2, 3)
_GATE_UP_ROWS = 64  # of a program: their activations are one group of digits
_DOWN_ROWS = 16


def _step_ptx(scales_a_row: int) -> str:
    """Code of one step: 16 bytes of two rows times their group, added to two sums.

    Operands: $0-$3 new sums; $4-$7 and $8-$11 words of both rows; $12-$19 digits;
    then scales of the first row and of the second, of 32 columns or of 16 and 16, four registers
    each; then the old sums and the table's two words.
    """
    sums = 20 + 8 * scales_a_row
    table = f"${sums + 4}, ${sums + 8}"
    lines = ["{", ".reg .b32 a<8>, t<4>, p<4>, n<4>, z; .reg .f32 f, g, ff, fg; mov.b32 z, 0;"]
    lines += [f"mov.f32 f, ${sums}; mov.f32 g, ${sums + 1};"]
    for word in range(4):
        first, second = f"${4 + word}", f"${8 + word}"
        begins = word % (4 // scales_a_row) == 0
        for sign, at in (("p", 0), ("n", 4)):
            if sign == "n":
                lines += [f"xor.b32 t0, {first}, 0x88888888; xor.b32 t1, {second}, 0x88888888;"]
                first, second = "t0", "t1"
            lines += [f"shr.u32 t2, {first}, 16; shr.u32 t3, {second}, 16;"]
            for i, codes in enumerate((first, second, "t2", "t3")):
                lines += [f"prmt.b32 a{at + i}, {table}, {codes};"]
            tile = ",".join(f"a{at + i}" for i in range(4))
            total = ",".join(f"{sign}{i}" for i in range(4))
            before = "z,z,z,z" if begins else total
            lines += [
                "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                f"{{{total}}}, {{{tile}}}, {{${12 + 2 * word},${13 + 2 * word}}}, {{{before}}};"
            ]
        if (word + 1) % (4 // scales_a_row) == 0:
            which = word * scales_a_row // 4
            lines += [f"sub.s32 p{i}, p{i}, n{i};" for i in range(4)]
            for row, total in enumerate("fg"):
                scale = f"${20 + 4 * (row * scales_a_row + which)}"
                lines += [
                    f"mad.lo.s32 p0, p{2 * row}, 256, p{2 * row + 1};",
                    f"cvt.rn.f32.s32 f{total}, p0; fma.rn.f32 {total}, f{total}, {scale}, {total};",
                ]
    lines += ["mov.f32 $0, f; mov.f32 $1, g; mov.f32 $2, f; mov.f32 $3, g;", "}"]
    return "\n".join(lines)


_STEP_PTX = tl.constexpr(_step_ptx(1))
_STEP_CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 16 + ["f"] * 12 + ["r"] * 8))
_STEP_PTX_HALVES = tl.constexpr(_step_ptx(2))
_STEP_CONSTRAINTS_HALVES = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 16 + ["f"] * 20 + ["r"] * 8))


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
def _load_digits(x_ptr, unscale_ptr, place, group, good, T: tl.constexpr, SCALES: tl.constexpr):
    """Digits of the lane's group for the tile's columns, [T, 4] words twice, and its unscale."""
    unscale = tl.load(unscale_ptr + group, mask=good, other=0.0)
    if _INTERPRETED:
        return unscale, unscale, unscale
    else:
        x = x_ptr.to(tl.pointer_type(tl.int32)) + place[:, None] + tl.arange(0, 4)[None, :]
        return tl.load(x), tl.load(x + 4), unscale


@triton.jit
def _plain_dots(words, high_ptr, low_ptr, at, FROM: tl.constexpr, TO: tl.constexpr):
    """What the tensor cores do, [T]: words FROM to TO of each lane times its group's digits."""
    i = tl.arange(0, 4)[None, :, None]
    place = tl.arange(0, 8)[None, None, :]
    code = (words[:, :, None] >> (4 * place)) & 15
    size = code & 7
    twice = tl.where(size < 5, size, tl.where(size == 5, 6, tl.where(size == 6, 8, 12)))
    twice = tl.where(code > 7, -twice, twice)
    where = at[:, None, None] + i * 8 + place
    x = tl.load(high_ptr + where).to(tl.float32) * _BASE + tl.load(low_ptr + where)
    products = tl.where((i >= FROM) & (i < TO), twice.to(tl.float32) * x, 0.0)
    return tl.sum(tl.sum(products, axis=2), axis=1)


@triton.jit
def _add_step(
    sums,  # [T, 4]: the two rows' in the first two columns
    a,
    b,
    s,
    u,
    x0,
    x1,
    size,
    x_ptr,  # digits [n, 2, 32 G]
    vector,  # [T] which of them the lane's rows are multiplied with
    group,
    zero,  # [T] zeros of which the compiler knows nothing
    T: tl.constexpr,
    G: tl.constexpr,
    SCALES: tl.constexpr,
):
    """The sums with one step more."""
    HALVES: tl.constexpr = SCALES == "e4m3"
    if HALVES:
        s0 = decode_scale(s & 0xFF, SCALES) * size
        s1 = decode_scale((s >> 8) & 0xFF, SCALES) * size
        u0 = decode_scale(u & 0xFF, SCALES) * size
        u1 = decode_scale((u >> 8) & 0xFF, SCALES) * size
    else:
        s0 = decode_scale(s, SCALES) * size
        u0 = decode_scale(u, SCALES) * size
    if _INTERPRETED:
        at = (vector * 2 * G + tl.where(group < G, group, 0)) * 32
        if HALVES:
            one = _plain_dots(a, x_ptr, x_ptr + 32 * G, at, 0, 2) * s0
            one += _plain_dots(a, x_ptr, x_ptr + 32 * G, at, 2, 4) * s1
            two = _plain_dots(b, x_ptr, x_ptr + 32 * G, at, 0, 2) * u0
            two += _plain_dots(b, x_ptr, x_ptr + 32 * G, at, 2, 4) * u1
        else:
            one = _plain_dots(a, x_ptr, x_ptr + 32 * G, at, 0, 4) * s0
            two = _plain_dots(b, x_ptr, x_ptr + 32 * G, at, 0, 4) * u0
        column = tl.arange(0, 4)[None, :]
        return sums + tl.where(column % 2 == 0, one[:, None], two[:, None])
    else:
        # Tables of constants would be moved into registers again for every look-up.
        low = tl.broadcast_to((zero + 0x03020100)[:, None], (T, 4))
        high = tl.broadcast_to((zero + 0x0C080604)[:, None], (T, 4))
        s0 = tl.broadcast_to(s0[:, None], (T, 4))
        u0 = tl.broadcast_to(u0[:, None], (T, 4))
        if HALVES:
            s1 = tl.broadcast_to(s1[:, None], (T, 4))
            u1 = tl.broadcast_to(u1[:, None], (T, 4))
            return tl.inline_asm_elementwise(
                _STEP_PTX_HALVES,
                _STEP_CONSTRAINTS_HALVES,
                [a, b, x0, x1, s0, s1, u0, u1, sums, low, high],
                dtype=tl.float32,
                is_pure=True,
                pack=4,
            )
        else:
            return tl.inline_asm_elementwise(
                _STEP_PTX,
                _STEP_CONSTRAINTS,
                [a, b, x0, x1, s0, u0, sums, low, high],
                dtype=tl.float32,
                is_pure=True,
                pack=4,
            )


@triton.jit
def _places(t, vector, x_zero, G: tl.constexpr):
    """Where each lane's digits stand, in words from the first vector, and their stride by steps."""
    c = t % 4
    column = (t % 32) // 4
    own = c == column // 2
    place = vector * (16 * G) + (column % 2) * (8 * G) + c * 8
    return tl.where(own, place, x_zero), tl.where(own, 32, 0)


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
    x_place, x_stride = _places(t, vector, X_ZERO, G)
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
            _load_digits(x_ptr, unscale_ptr, place, group, here, T, SCALES),
        )
    sums = tl.zeros((T, 4), tl.float32)
    for step0 in range(0, STEPS, AHEAD):
        next_rows = ()
        next_vectors = ()
        for i in tl.static_range(AHEAD):
            step = begin + (step0 + i)
            group = step * 4 + c
            a, b, s, u = rows[i]
            x0, x1, size = vectors[i]
            sums = _add_step(
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
                _load_digits(x_ptr, unscale_ptr, place, group, here, T, SCALES),
            )
        rows = next_rows
        vectors = next_vectors
    return sums


@triton.jit
def _rows_of(sums, T: tl.constexpr):
    """[T, 4] to the sums of the first rows and of the second, [T] both."""
    even, odd = tl.split(tl.reshape(sums, (T, 2, 2)))
    return tl.split(even)[0], tl.split(odd)[0]


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
    gates, ups = _rows_of(sums, T)
    factor = _HALF
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
    one, two = _rows_of(sums, T)
    factor = _HALF
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
