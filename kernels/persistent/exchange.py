"""How programs of one launch hand numbers to each other: data that is its own flag.

No barrier, no fence and no reset stand between a phase and the next one. A reader polls the very
words that it needs, and each word says whether it is complete:

    sums    int64   [ value in fixed point, 56 bits | contributions so far, 8 bits ]
            Any number of programs add to a word. Integers add in any order to the same bits, and
            the low byte says when all have come since the word was zero.
    tagged  int64   [ tag of this use | fp32 ]
            One program writes, in one store of 8 bytes.

A word is used again in every layer, so nothing may be added for the next use while a program has
yet to read it. Most often that follows from what depends on what. Where it does not, readers sign
(a word of sums, one contribution each), and who adds next waits for all signatures first (the
residual, which adds up over the layers); or layers use two sets of words in turn, of which programs
clear the one that all have read (all other sums).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

FRACTION_BITS = 28  # of a sum; 27 bits are left in front of the point, and a sign
_ONE = gl.constexpr(float(2**FRACTION_BITS))
_TINY = gl.constexpr(2.0**-FRACTION_BITS)
# Polls after which a program gives up: some seconds. A hang becomes an error.
PATIENCE = 1 << 23


def _poll_sums(n: int) -> gl.constexpr:
    """$0.. words; then addresses, counts: until every word has its count."""
    lines = ["{", ".reg .pred p;", ".reg .b32 d, all, turns;", "mov.b32 turns, 0;"]
    lines.append("again:")
    lines += [f"ld.relaxed.gpu.global.b64 ${i}, [${n + i}];" for i in range(n)]
    lines += ["add.u32 turns, turns, 1;", f"setp.gt.u32 p, turns, {PATIENCE};", "@p trap;"]
    lines.append("mov.b32 all, 0;")
    for i in range(n):
        lines.append(f"cvt.u32.u64 d, ${i}; xor.b32 d, d, ${2 * n + i}; or.b32 all, all, d;")
    lines += ["and.b32 all, all, 255; setp.ne.s32 p, all, 0;", "@p bra again;", "}"]
    return gl.constexpr("\n".join(lines))


def _poll_tagged(n: int) -> gl.constexpr:
    """$0.. fp32 bits; then addresses, tags: until every word has its tag."""
    lines = ["{", ".reg .b64 d;", ".reg .b32 t, all, turns;", ".reg .pred p;", "mov.b32 turns, 0;"]
    lines.append("again:")
    lines += ["add.u32 turns, turns, 1;", f"setp.gt.u32 p, turns, {PATIENCE};", "@p trap;"]
    lines.append("mov.b32 all, 0;")
    lines += [f".reg .b64 w{i};" for i in range(n)]
    lines += [f"ld.relaxed.gpu.global.b64 w{i}, [${n + i}];" for i in range(n)]
    for i in range(n):
        lines.append(f"mov.b64 {{${i}, t}}, w{i}; xor.b32 t, t, ${2 * n + i}; or.b32 all, all, t;")
    lines += ["setp.ne.s32 p, all, 0;", "@p bra again;", "}"]
    return gl.constexpr("\n".join(lines))


def _constraints(out: str, *inputs: str, n: int) -> gl.constexpr:
    return gl.constexpr(",".join([f"=&{out}"] * n + [one for kind in inputs for one in [kind] * n]))


def _poll_two() -> gl.constexpr:
    """$0 $1 and $2 $3 words of two tensors; then addresses likewise, counts."""
    lines = ["{", ".reg .pred p;", ".reg .b32 d, all, turns;", "mov.b32 turns, 0;"]
    lines.append("again:")
    lines += [f"ld.relaxed.gpu.global.b64 ${i}, [${4 + i}];" for i in range(4)]
    lines += ["add.u32 turns, turns, 1;", f"setp.gt.u32 p, turns, {PATIENCE};", "@p trap;"]
    lines.append("mov.b32 all, 0;")
    for i in range(4):
        lines.append(f"cvt.u32.u64 d, ${i}; xor.b32 d, d, ${8 + i % 2}; or.b32 all, all, d;")
    lines += ["and.b32 all, all, 255; setp.ne.s32 p, all, 0;", "@p bra again;", "}"]
    return gl.constexpr("\n".join(lines))


_TWO = _poll_two()
_TWO_CONSTRAINTS = gl.constexpr(",".join(["=&l"] * 4 + ["l"] * 4 + ["r"] * 2))

# $0 a word, or anything where $3 is zero; $1 its address, $2 what it is compared with.
_ONE_WORD = """{{
.reg .b64 d; .reg .b32 t, turns; .reg .pred p, on;
setp.ne.s32 on, $3, 0; mov.b64 $0, 0; mov.b32 turns, 0;
@!on bra done;
again:
ld.relaxed.gpu.global.b64 $0, [$1];
add.u32 turns, turns, 1; setp.gt.u32 p, turns, {patience}; @p trap;
{test}
@p bra again;
done:
}}"""
SUM_IF = gl.constexpr(
    _ONE_WORD.format(
        patience=PATIENCE, test="sub.s64 d, $0, $2; and.b64 d, d, 255; setp.ne.s64 p, d, 0;"
    )
)
TAGGED_IF = gl.constexpr(
    _ONE_WORD.format(patience=PATIENCE, test="shr.u64 d, $0, 32; setp.ne.s64 p, d, $2;")
)
# $0 a word, $1 its address, $2 what its count is compared with.
SIGNED = gl.constexpr(
    "{ .reg .b64 d; .reg .b32 turns; .reg .pred p; mov.b32 turns, 0;\nagain:\n"
    "ld.relaxed.gpu.global.b64 $0, [$1]; sub.s64 d, $0, $2; and.b64 d, d, 255;"
    f"add.u32 turns, turns, 1; setp.gt.u32 p, turns, {PATIENCE}; @p trap;"
    "setp.ne.s64 p, d, 0; @p nanosleep.u32 64; @p bra again; }"
)


def _poll_residual(n: int) -> str:
    """$0 sum of squares of n words as integers; $1 one more word, or zero.

    $2 address of the first word, whose next are 256 words apart; $3 of the last, $4 whether that
    counts; $5 count of these. $6 address of the one more, $7 its count, $8 whether it is asked for.
    """
    words = [f"w{i}" for i in range(n)]
    lines = ["{", f".reg .b64 {', '.join(words)};", ".reg .pred p, on, in; .reg .f32 f;"]
    lines += [".reg .b32 d, all, turns; mov.b32 turns, 0; mov.b64 $1, 0; mov.f32 $0, 0f00000000;"]
    lines += ["setp.ne.s32 in, $4, 0; setp.ne.s32 on, $8, 0;", "again:"]
    at = [f"$2 + {2048 * i}" for i in range(n - 1)] + ["$3"]
    lines += [f"ld.relaxed.gpu.global.b64 {w}, [{a}];" for w, a in zip(words, at, strict=True)]
    lines += ["@on ld.relaxed.gpu.global.b64 $1, [$6];", "mov.b32 all, 0;"]
    lines += ["add.u32 turns, turns, 1;", f"setp.gt.u32 p, turns, {PATIENCE};", "@p trap;"]
    for w in words:
        lines.append(f"cvt.u32.u64 d, {w}; xor.b32 d, d, $5; or.b32 all, all, d;")
    lines += ["cvt.u32.u64 d, $1; xor.b32 d, d, $7;", "@on or.b32 all, all, d;"]
    lines += ["and.b32 all, all, 255; setp.ne.s32 p, all, 0;", "@p bra again;"]
    for i, w in enumerate(words):
        lines.append(f"shr.s64 {w}, {w}, 8; cvt.rn.f32.s64 f, {w};")
        lines.append(("@in " if i == n - 1 else "") + "fma.rn.f32 $0, f, f, $0;")
    return "\n".join([*lines, "}"])


RESIDUAL = gl.constexpr(tuple(_poll_residual(n) for n in range(1, 17)))  # of n words
_SUMS_2, _SUMS_4 = _poll_sums(2), _poll_sums(4)
_TAGGED_2, _TAGGED_4 = _poll_tagged(2), _poll_tagged(4)
_S2, _S4 = (_constraints("l", "l", "r", n=n) for n in (2, 4))
_T2, _T4 = (_constraints("r", "l", "r", n=n) for n in (2, 4))


@gluon.jit
def add_to_sums(ptrs, value, count: gl.constexpr, mask):
    """Add fp32 numbers to words of sums, as `count` contributions each."""
    fixed = (value * _ONE).to(gl.int64)
    gl.atomic_add(ptrs, fixed * 256 + count, mask=mask, sem="relaxed", scope="gpu")


@gluon.jit
def sign(ptr):
    """One thread of the program adds its contribution to a word."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    i = gl.arange(0, 256, layout=L)
    one = gl.full([256], 1, gl.int64, layout=L)
    gl.atomic_add(ptr + i * 0, one, mask=i == 0, sem="relaxed", scope="gpu")


@gluon.jit
def claim(ptr):
    """Count one more at ptr: what was there, in one lane of a single warp; see claimed."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    i = gl.arange(0, 32, layout=L)
    one = gl.full([32], 1, gl.int64, layout=L)
    return gl.atomic_add(ptr + i * 0, one, mask=i == 0, sem="relaxed", scope="gpu")


@gluon.jit
def claimed(words):
    """The number that claim has brought; waits for it."""
    i = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    return gl.sum(gl.where(i == 0, words.to(gl.int32), 0), 0)


@gluon.jit
def wait_for_signatures(ptr, count):
    """Until a word has as many contributions since it was cleared. For a single warp."""
    return gl.inline_asm_elementwise(
        SIGNED, "=&l,l,l", [ptr, count.to(gl.int64)], dtype=gl.int64, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_all_to_sign(ptr, count):
    """One thread of the program waits until a word has `count` contributions since it was zero."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    i = gl.arange(0, 256, layout=L)
    wait_for_sums_if(ptr + i * 0, count, i == 0)


@gluon.jit
def wait_for_sums(ptrs, count, PACK: gl.constexpr):
    """What was added to the words at ptrs since they were zero, in fp32, once each has `count`
    contributions.

    PACK: words that a thread asks for at a time, 2 or 4; divides the words it has
    """
    counts = gl.zeros_like(ptrs.to(gl.int64)).to(gl.int32) + count
    if PACK == 2:
        words = gl.inline_asm_elementwise(
            _SUMS_2, _S2, [ptrs, counts], dtype=gl.int64, is_pure=False, pack=2
        )
    else:
        words = gl.inline_asm_elementwise(
            _SUMS_4, _S4, [ptrs, counts], dtype=gl.int64, is_pure=False, pack=4
        )
    return sum_of(words)


@gluon.jit
def wait_for_residual(x_ptr, count, WIDTH: gl.constexpr, sums, sum_count, mask):
    """Parts [256] of the sum of squares of WIDTH words, each with `count` contributions; and with
    it the words `sums` [256] where the mask is set, each with `sum_count`. All in one round."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    N: gl.constexpr = (WIDTH + 255) // 256
    i = gl.arange(0, 256, layout=L)
    last = i + (N - 1) * 256
    squares, words = gl.inline_asm_elementwise(
        RESIDUAL[N - 1], "=&f,=&l,l,l,r,r,l,r,r",
        [x_ptr + i, x_ptr + gl.minimum(last, WIDTH - 1), (last < WIDTH).to(gl.int32),
         gl.zeros_like(i) + count, sums, gl.zeros_like(i) + sum_count, mask.to(gl.int32)],
        dtype=(gl.float32, gl.int64), is_pure=False, pack=1,
    )  # fmt: skip
    return squares * (_TINY * _TINY), words


@gluon.jit
def wait_for_two_sums(ptrs, ptrs2, count):
    """wait_for_sums of two tensors at once."""
    counts = gl.zeros_like(ptrs.to(gl.int64)).to(gl.int32) + count
    one, two = gl.inline_asm_elementwise(
        _TWO, _TWO_CONSTRAINTS, [ptrs, ptrs2, counts], dtype=(gl.int64, gl.int64), is_pure=False,
        pack=2,
    )  # fmt: skip
    return sum_of(one), sum_of(two)


@gluon.jit
def wait_for_sums_if(ptrs, count, mask):
    """wait_for_sums of words that were zero, by the threads of which mask is set; a word that all
    programs wait for should be asked for by one thread of each."""
    counts = gl.zeros_like(ptrs.to(gl.int64)) + count
    return gl.inline_asm_elementwise(
        SUM_IF,
        "=&l,l,l,r",
        [ptrs, counts, mask.to(gl.int32)],
        dtype=gl.int64,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def wait_for_tagged_if(ptrs, tag, mask):
    """wait_for_tagged by the threads of which mask is set."""
    tags = gl.zeros_like(ptrs.to(gl.int64)) + tag
    words = gl.inline_asm_elementwise(
        TAGGED_IF,
        "=&l,l,l,r",
        [ptrs, tags, mask.to(gl.int32)],
        dtype=gl.int64,
        is_pure=False,
        pack=1,
    )
    return words.to(gl.int32).to(gl.float32, bitcast=True)


@gluon.jit
def sum_of(words):
    """fp32 value of what was added since a word was zero."""
    return (words >> 8).to(gl.float32) * _TINY


@gluon.jit
def publish(ptrs, value, tag, mask):
    """Write fp32 numbers with their tag."""
    bits = value.to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF
    gl.store(ptrs, bits | (tag.to(gl.int64) << 32), mask=mask)


@gluon.jit
def wait_for_tagged(ptrs, tag, PACK: gl.constexpr):
    """fp32 numbers at ptrs once each has the tag (int32 scalar)."""
    tags = gl.zeros_like(ptrs.to(gl.int64)).to(gl.int32) + tag
    if PACK == 2:
        bits = gl.inline_asm_elementwise(
            _TAGGED_2, _T2, [ptrs, tags], dtype=gl.int32, is_pure=False, pack=2
        )
    else:
        bits = gl.inline_asm_elementwise(
            _TAGGED_4, _T4, [ptrs, tags], dtype=gl.int32, is_pure=False, pack=4
        )
    return bits.to(gl.float32, bitcast=True)
