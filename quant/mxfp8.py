"""MXFP8: E4M3 codes, 32 along a row sharing one E8M0 scale (OCP Microscaling Formats 1.0).

w[r, 32 g + i] = E4M3(values[r, 32 g + i]) * 2^(scales[r, g] - 127)
"""

from torch import Tensor

from quant.e8m0 import decode_e8m0, scale_bytes_for
from quant.formats import MXFP8
from quant.fp8 import E4M3_MAX, round_to_e4m3
from quant.require import require_encodable
from quant.tensor import QuantTensor

GROUP = 32


def decode(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns], exact."""
    assert tensor.scales is not None
    values = tensor.values.float().unflatten(-1, (-1, GROUP))
    return (values * decode_e8m0(tensor.scales)[..., None]).flatten(-2)


def encode(weight: Tensor, rule: str = "even") -> QuantTensor:
    """Encode fp32 [..., rows, columns] (columns a multiple of 32) as MXFP8.

    rule: "floor", "even" or "rceil", see quant/e8m0.py
    Raises ValueError for a non-finite weight, an unknown rule or an odd width.
    """
    require_encodable(weight, MXFP8, GROUP)
    groups = weight.float().unflatten(-1, (-1, GROUP))
    amax = groups.abs().amax(-1)
    scale_bytes = scale_bytes_for(amax, rule, largest=E4M3_MAX, mantissa_bits=3)
    codes = round_to_e4m3(groups / decode_e8m0(scale_bytes)[..., None])
    return QuantTensor(codes.flatten(-2), scale_bytes, MXFP8, tuple(weight.shape))
