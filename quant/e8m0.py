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
    if rule not in SCALE_RULES:
        raise ValueError(f"unknown scale rule {rule!r}, expected one of {', '.join(SCALE_RULES)}")
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
