"""MXFP4: E2M1 codes, 32 along a row sharing one E8M0 scale (OCP Microscaling Formats 1.0).

    w[r, 32 g + 2 b + n] = E2M1(nibble n of values[r, 16 g + b]) * 2^(scales[r, g] - 127)

Elements round to nearest, ties to the even code, and saturate at 6 under every scale rule.
"""

from torch import Tensor

from quant.e2m1 import E2M1_MAX, decode_codes, encode_codes, pack
from quant.e8m0 import decode_e8m0
from quant.e8m0 import scale_bytes_for as e8m0_bytes_for
from quant.formats import MXFP4
from quant.require import require_encodable
from quant.tensor import QuantTensor

GROUP = 32


def decode(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns], exact: every product of a code and a scale is an fp32."""
    assert tensor.scales is not None
    values = decode_codes(tensor.values).unflatten(-1, (-1, GROUP))
    return (values * decode_e8m0(tensor.scales)[..., None]).flatten(-2)


def encode(weight: Tensor, rule: str = "even") -> QuantTensor:
    """Encode fp32 [..., rows, columns] (columns a multiple of 32) as MXFP4.

    rule: "floor", "even" or "rceil", see quant/e8m0.py
    Raises ValueError for a non-finite weight, an unknown rule or an odd width.
    """
    require_encodable(weight, MXFP4, GROUP)
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scale_bytes = scale_bytes_for(groups.abs().amax(-1), rule)
    codes = encode_codes(groups / decode_e8m0(scale_bytes)[..., None])
    return QuantTensor(pack(codes).flatten(-2), scale_bytes, MXFP4, tuple(weight.shape))


def scale_bytes_for(amax: Tensor, rule: str) -> Tensor:
    """E8M0 bytes (uint8) for the block maxima `amax` (fp32, >= 0) under a named rule."""
    return e8m0_bytes_for(amax, rule, largest=E2M1_MAX, mantissa_bits=1)
