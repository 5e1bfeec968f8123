"""MXFP4: E2M1 codes, 32 along a row sharing one E8M0 scale (OCP Microscaling Formats 1.0).

    w[r, 32 g + 2 b + n] = E2M1(nibble n of values[r, 16 g + b]) * 2^(scales[r, g] - 127)

Elements round to nearest, ties to the even code, and saturate at 6 under every scale rule.
"""

from torch import Tensor

from quant import e8m0
from quant.blocks import block_maxima, encode_in_tiles, signed_codes
from quant.e2m1 import E2M1_MAX, decode_codes, pack
from quant.formats import MXFP4
from quant.minifloat import E2M1
from quant.tensor import QuantTensor

GROUP = 32


def decode(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns], exact: every product of a code and a scale is an fp32."""
    assert tensor.scales is not None
    values = decode_codes(tensor.values).unflatten(-1, (-1, GROUP))
    return values.mul_(e8m0.decode_e8m0(tensor.scales)[..., None]).flatten(-2)


def encode(
    weight: Tensor, scale_rule: str = "even", scale_search: str | None = None
) -> QuantTensor:
    """Encode [..., rows, columns] (columns a multiple of 32) as MXFP4.

    scale_rule:   "floor", "even" or "rceil", see quant/e8m0.py
    scale_search: "mse" takes the best of the rule's power of two and its two neighbours
    Raises ValueError for a non-finite weight, an unknown rule or an odd width.
    """

    def encode_tile(values: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        groups = magnitudes.unflatten(-1, (-1, GROUP))
        scale_bytes = scale_bytes_for(block_maxima(magnitudes, GROUP), scale_rule)
        if scale_search:
            scale_bytes = e8m0.best_of_neighbours(groups, scale_bytes, E2M1, scale_search)
        scales = e8m0.decode_e8m0(scale_bytes)[..., None]
        return pack(signed_codes(values, groups, scales, E2M1)), scale_bytes

    return encode_in_tiles(weight, MXFP4, encode_tile)


def scale_bytes_for(amax: Tensor, rule: str) -> Tensor:
    """E8M0 bytes (uint8) for the block maxima `amax` (fp32, >= 0) under a named rule."""
    return e8m0.scale_bytes_for(amax, rule, largest=E2M1_MAX, mantissa_bits=1)
