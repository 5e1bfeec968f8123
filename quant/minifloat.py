"""Rounding fp32 to the grid of a small float by one addition, with the same bits on every device.

Adding q = 2^(e + 23 - m) to a magnitude y, where e is the exponent of y and m the number of
mantissa bits, leaves in the last bits of the sum y in units of 2^(e - m), rounded to the nearest
even by the addition itself:

    bits of y + q    [exponent e + 23 - m] 0 ... 0 k    k from 2^m to 2^(m + 1) units

Below the smallest normal number e stays where it is, and k goes from 0 to 2^m. The code is then
k + 2^m * (e - smallest e). A cast of a library may saturate, flush or tie in another way.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_EXPONENT = 0x7F800000  # of fp32
_MANTISSA_BITS = 23  # of fp32
_BIAS = 127  # of fp32


@dataclass(frozen=True)
class Grid:
    """The magnitudes of a small float: code 0 is zero, and values grow with the code."""

    mantissa_bits: int
    smallest_exponent: int  # of a normal number
    largest: float  # finite value
    code_bits: int  # without the sign


E2M1 = Grid(1, 0, 6.0, 3)
E4M3 = Grid(3, -6, 448.0, 7)


def magnitude_codes_(y: Tensor, grid: Grid) -> Tensor:
    """Codes (int32) of magnitudes (fp32, >= 0, no NaN): nearest, ties to even, saturating.

    The result lies in y's memory.
    """
    m = grid.mantissa_bits
    bits = y.add_(_steps(y, grid)).view(torch.int32)
    # The exponent's share of the code; its last m bits are zero, as k is below 2^(23 - m).
    bits.add_(bits >> (_MANTISSA_BITS - m))
    bits.sub_((grid.smallest_exponent + _MANTISSA_BITS - m + _BIAS) << m)
    return bits.bitwise_and_((1 << grid.code_bits) - 1)


def nearest_(y: Tensor, grid: Grid) -> Tensor:
    """The grid's values nearest to magnitudes (fp32, >= 0, no NaN), in place."""
    steps = _steps(y, grid)
    return y.add_(steps).sub_(steps)


def _steps(y: Tensor, grid: Grid) -> Tensor:
    """q of each magnitude, which is clamped to the grid's end first, in place."""
    y.clamp_(max=grid.largest)
    q = y.clamp(min=2.0**grid.smallest_exponent)
    q.view(torch.int32).bitwise_and_(_EXPONENT).add_((_MANTISSA_BITS - grid.mantissa_bits) << 23)
    return q
