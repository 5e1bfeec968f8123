"""MXFP8: E4M3 codes, 32 along a row sharing one E8M0 scale (OCP Microscaling Formats 1.0).

w[r, 32 g + i] = E4M3(values[r, 32 g + i]) * 2^(scales[r, g] - 127)
"""

from torch import Tensor

from quant import e8m0
from quant.blocks import block_maxima, encode_in_tiles, signed_codes
from quant.e4m3 import E4M3_MAX, decode_e4m3
from quant.formats import MXFP8
from quant.minifloat import E4M3
from quant.tensor import QuantTensor

GROUP = 32


def decode(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns], exact."""
    assert tensor.scales is not None
    values = decode_e4m3(tensor.values).unflatten(-1, (-1, GROUP))
    return values.mul_(e8m0.decode_e8m0(tensor.scales)[..., None]).flatten(-2)


def encode(
    weight: Tensor, scale_rule: str = "even", scale_search: str | None = None
) -> QuantTensor:
    """Encode [..., rows, columns] (columns a multiple of 32) as MXFP8.

    scale_rule:   "floor", "even" or "rceil", see quant/e8m0.py
    scale_search: "mse" takes the best of the rule's power of two and its two neighbours
    Raises ValueError for a non-finite weight, an unknown rule or an odd width.
    """

    def encode_tile(values: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        groups = magnitudes.unflatten(-1, (-1, GROUP))
        amax = block_maxima(magnitudes, GROUP)
        scale_bytes = e8m0.scale_bytes_for(amax, scale_rule, largest=E4M3_MAX, mantissa_bits=3)
        if scale_search:
            scale_bytes = e8m0.best_of_neighbours(groups, scale_bytes, E4M3, scale_search)
        scales = e8m0.decode_e8m0(scale_bytes)[..., None]
        return signed_codes(values, groups, scales, E4M3), scale_bytes

    return encode_in_tiles(weight, MXFP8, encode_tile)
