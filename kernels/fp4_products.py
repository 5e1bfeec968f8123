"""Products of 4-bit weights with a vector in digits, on integer tensor cores.

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
"""

import triton
import triton.language as tl

from kernels.weight_formats import decode_scale

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
HALF = tl.constexpr(0.5)  # codes are looked up as twice their value
_BASE = tl.constexpr(256)  # of digits


def step_ptx(scales_a_row: int) -> str:
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


_STEP_PTX = tl.constexpr(step_ptx(1))
_STEP_CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 16 + ["f"] * 12 + ["r"] * 8))
_STEP_PTX_HALVES = tl.constexpr(step_ptx(2))
_STEP_CONSTRAINTS_HALVES = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 16 + ["f"] * 20 + ["r"] * 8))


@triton.jit
def load_digits(x_ptr, unscale_ptr, place, group, good, T: tl.constexpr, SCALES: tl.constexpr):
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
def add_step(
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
def digit_places(t, vector, x_zero, G: tl.constexpr):
    """Where each lane's digits stand, in words from the first vector, and their stride by steps."""
    c = t % 4
    column = (t % 32) // 4
    own = c == column // 2
    place = vector * (16 * G) + (column % 2) * (8 * G) + c * 8
    return tl.where(own, place, x_zero), tl.where(own, 32, 0)


@triton.jit
def row_pairs(sums, T: tl.constexpr):
    """[T, 4] to the sums of the first rows and of the second, [T] both."""
    even, odd = tl.split(tl.reshape(sums, (T, 2, 2)))
    return tl.split(even)[0], tl.split(odd)[0]
