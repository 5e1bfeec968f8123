"""E8M0, the scale of the MX formats: one byte, a power of two.

    byte b   2^(b - 127); 255 is NaN

The three rules that choose the exponent for the largest magnitude of a block, amax, from the
element's largest value M = m * 2^e, 1 <= m < 2:
    floor  floor(log2 amax) - e: the OCP rule; a maximum between M and 2^(e + 1) clips
    even   floor after adding half a mantissa step of the element to amax
    rceil  ceil(log2(amax / M)): the smallest power of two that does not clip
"""

import math

import torch
from torch import Tensor

from quant.blocks import SCALE_SEARCHES, least_squares, require_choice
from quant.minifloat import Grid

SCALE_RULES = ("floor", "even", "rceil")
NAN_BYTE = 255
_MANTISSA_BITS = 23  # of fp32


def decode_e8m0(scale_bytes: Tensor) -> Tensor:
    """E8M0 bytes to fp32, exact for every byte: 0 is 2^-127 (an fp32 subnormal), 255 is NaN."""
    wide = scale_bytes.to(torch.int32)
    bits = torch.where(wide == 0, torch.full_like(wide, 1 << 22), wide << _MANTISSA_BITS)
    bits = torch.where(wide == NAN_BYTE, torch.full_like(wide, 0x7FC00000), bits)
    return bits.view(torch.float32)


def scale_bytes_for(amax: Tensor, rule: str, *, largest: float, mantissa_bits: int) -> Tensor:
    """E8M0 bytes (uint8) for block maxima.

    amax:           fp32, >= 0
    rule:           "floor", "even" or "rceil"
    largest:        M, the element's largest value: 6 for E2M1, 448 for E4M3
    mantissa_bits:  of the element: 1 for E2M1, 3 for E4M3
    Raises ValueError for an unknown rule.
    """
    require_choice("scale rule", rule, SCALE_RULES)
    bits = amax.float().contiguous().view(torch.int32)
    fraction, exponent = math.frexp(largest)
    if rule == "even":
        bits = bits + (1 << (_MANTISSA_BITS - mantissa_bits - 1))
    found = bits >> _MANTISSA_BITS
    if rule == "rceil":
        # amax needs one power more where its mantissa is above that of M.
        mantissa = int((2 * fraction - 1) * (1 << _MANTISSA_BITS))
        found = found + ((bits & ((1 << _MANTISSA_BITS) - 1)) > mantissa).to(torch.int32)
    return (found - (exponent - 1)).clamp(0, 254).to(torch.uint8)


def power_of_two_bytes(scales: Tensor) -> Tensor:
    """E8M0 bytes of the smallest powers of two that are not below scales (fp32, > 0)."""
    bits = scales.contiguous().view(torch.int32)
    raised = (bits >> _MANTISSA_BITS) + ((bits & ((1 << _MANTISSA_BITS) - 1)) > 0).to(torch.int32)
    # Subnormals up to 2^-127 are byte 0, which stands for 2^-127.
    return torch.where(bits <= 1 << 22, 0, raised).clamp(0, 254).to(torch.uint8)


def best_of_neighbours(groups: Tensor, scale_bytes: Tensor, grid: Grid, search: str) -> Tensor:
    """The byte among b, b - 1 and b + 1 that leaves each group the least squared error.

    groups:      magnitudes, fp32 [..., groups, group]
    scale_bytes: uint8 [..., groups], what the rule chose
    """
    require_choice("scale search", search, SCALE_SEARCHES)
    wide = scale_bytes.to(torch.int16)
    tried = [(wide + step).clamp_(0, 254).to(torch.uint8) for step in (0, -1, 1)]
    best = least_squares(groups, [decode_e8m0(found) for found in tried], grid)
    return torch.stack(tried).gather(0, best[None])[0]
