"""MXFP4: E2M1 codes, 32 along a row sharing one E8M0 scale (OCP Microscaling Formats 1.0).

    code  s e e m      value  0 0.5 1 1.5 2 3 4 6, then the negatives (8 is -0)
    byte  hhhh llll    low nibble: even column, high nibble: odd column
    scale byte b       2^(b - 127); 255 is NaN

    w[r, 32 g + 2 b + n] = E2M1(nibble n of values[r, 16 g + b]) * 2^(scales[r, g] - 127)

Scale rules (all saturate at 6 and round elements to nearest, ties to the even code):
    floor  floor(log2 amax) - 2: the OCP rule; a maximum in (6, 8) of its binade clips
    even   floor after adding half a mantissa step of the element (a quarter) to amax
    rceil  ceil(log2(amax / 6)): the smallest power of two that does not clip
"""

import torch
from torch import Tensor

from quant.formats import MXFP4
from quant.tensor import QuantTensor

GROUP = 32
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Halfway points between neighbours; a tie goes to the even code, so odd upper codes need "greater".
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
SCALE_RULES = ("floor", "even", "rceil")
_E8M0_BIAS = 127
_E8M0_NAN = 255


def decode_e8m0(scale_bytes: Tensor) -> Tensor:
    """E8M0 bytes to fp32, exact for every byte: 0 is 2^-127 (an fp32 subnormal), 255 is NaN."""
    wide = scale_bytes.to(torch.int32)
    bits = torch.where(wide == 0, torch.full_like(wide, 1 << 22), wide << 23)
    return torch.where(wide == _E8M0_NAN, torch.full_like(wide, 0x7FC00000), bits).view(
        torch.float32
    )


def decode_codes(packed: Tensor) -> Tensor:
    """Bytes [..., n] to E2M1 values [..., 2n] in fp32, low nibble first."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=packed.device)
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    return table[codes.long()]


def decode(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns], exact: every product of a code and a scale is an fp32."""
    assert tensor.scales is not None
    values = decode_codes(tensor.values).unflatten(-1, (-1, GROUP))
    return (values * decode_e8m0(tensor.scales)[..., None]).flatten(-2)


def encode(weight: Tensor, rule: str = "even") -> QuantTensor:
    """Encode fp32 [..., rows, columns] (columns a multiple of 32) as MXFP4.

    rule: "floor", "even" or "rceil", see the module's head.
    Raises ValueError for a non-finite weight, an unknown rule or an odd width.
    """
    if weight.shape[-1] % GROUP:
        raise ValueError(f"MXFP4 needs columns in multiples of {GROUP}, got {weight.shape[-1]}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("cannot encode NaN or infinity as MXFP4")
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scale_bytes = scale_bytes_for(groups.abs().amax(-1), rule)
    codes = encode_codes(groups / decode_e8m0(scale_bytes)[..., None])
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return QuantTensor(packed.flatten(-2), scale_bytes, MXFP4, tuple(weight.shape))


def scale_bytes_for(amax: Tensor, rule: str) -> Tensor:
    """E8M0 bytes (uint8) for the block maxima `amax` (fp32, >= 0) under a named rule."""
    if rule not in SCALE_RULES:
        raise ValueError(f"unknown scale rule {rule!r}, expected one of {', '.join(SCALE_RULES)}")
    bits = amax.float().contiguous().view(torch.int32)
    if rule == "floor":
        exponent = bits >> 23
    elif rule == "even":
        exponent = (bits + (1 << 21)) >> 23
    else:
        # ceil(log2(amax / 6)) = exponent - 2 + (mantissa > 1.5)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) > 0x400000).to(torch.int32)
    return (exponent - 2).clamp(0, 254).to(torch.uint8)


def encode_codes(scaled: Tensor) -> Tensor:
    """E2M1 codes (uint8, 0 to 15) of fp32 values: nearest, ties to even, saturating at 6."""
    magnitude = scaled.abs()
    code = torch.zeros_like(scaled, dtype=torch.uint8)
    for upper, midpoint in enumerate(_MIDPOINTS, start=1):
        over = magnitude > midpoint if upper % 2 else magnitude >= midpoint
        code += over.to(torch.uint8)
    return code | (torch.signbit(scaled).to(torch.uint8) << 3)
