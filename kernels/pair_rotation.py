"""Rotary embedding of rows whose last columns turn in pairs (2i, 2i + 1), in registers.

C row width, P rotary width: the last P columns turn, the others stay.
"""

import triton
import triton.language as tl


@triton.jit
def turn_pairs(
    x,  # [M, BLOCK], columns `first` to `first` + BLOCK - 1 of rows of C
    first,  # even
    cos_ptr,  # [P / 2] fp32 of the rows' position
    sin_ptr,
    C: tl.constexpr,
    P: tl.constexpr,
    BACK: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows turned, or turned back."""
    pair = (first - (C - P)) // 2 + tl.arange(0, BLOCK // 2)
    turns = (pair >= 0) & (pair < P // 2)
    cos = tl.load(cos_ptr + pair, mask=turns, other=1.0)[None, :]
    sin = tl.load(sin_ptr + pair, mask=turns, other=0.0)[None, :]
    if BACK:
        sin = -sin
    a, b = tl.split(tl.reshape(x, (M, BLOCK // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (M, BLOCK))
