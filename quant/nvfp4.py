"""NVFP4: E2M1 codes, 16 along a row sharing one E4M3 scale, and one fp32 scale a tensor.

    w[r, 16 g + i] = E2M1(code) * E4M3(scales[r, g]) * tensor_scale
    tensor_scale = amax of the tensor / (448 * 6), so that the largest block scale is 448

Weights that are used side by side (gate and up) must share one tensor scale: give it to `encode`.
"""

import torch
from torch import Tensor

from quant.blocks import (
    SCALE_SEARCHES,
    block_maxima,
    encode_in_tiles,
    largest_magnitude,
    least_squares,
    require_choice,
    signed_codes,
)
from quant.e2m1 import E2M1_MAX, decode_codes, pack
from quant.e4m3 import E4M3_MAX, nearest_e4m3
from quant.formats import NVFP4
from quant.minifloat import E2M1
from quant.tensor import QuantTensor

GROUP = 16
# The smallest normal E4M3: a block of zeros gets it too, so that no scale is zero.
_SMALLEST_SCALE = 2.0**-6
# Keeps the product of both scales a normal fp32.
_SMALLEST_TENSOR_SCALE = 2.0**-120
# Codes next to the rule's that a search tries. Five or four codes up, the largest weight of a block
# maps to 4 instead of 6, between which the elements have no step.
_NEIGHBOURS = (0, 1, -1, 2, -2, 3, 4, 5)
_LARGEST_CODE, _SMALLEST_CODE = 0x7E, 0x08  # 448 and 2^-6


def tensor_scale_for(*weights: Tensor) -> Tensor:
    """The fp32 scale [] that tensors share; 1 if all of them are zero."""
    amax = largest_magnitude(*weights)
    scale = (amax / torch.full_like(amax, E4M3_MAX * E2M1_MAX)).clamp(min=_SMALLEST_TENSOR_SCALE)
    return torch.where(amax > 0, scale, torch.ones_like(amax))


def decode(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns]: codes times (block scale times tensor scale)."""
    assert tensor.scales is not None and tensor.tensor_scale is not None
    values = decode_codes(tensor.values).unflatten(-1, (-1, GROUP))
    return values.mul_((tensor.scales.float() * tensor.tensor_scale)[..., None]).flatten(-2)


def encode(
    weight: Tensor, tensor_scale: Tensor | None = None, scale_search: str | None = None
) -> QuantTensor:
    """Encode [..., rows, columns] (columns a multiple of 16) as NVFP4.

    tensor_scale: fp32 [], default that of this tensor alone
    scale_search: "mse" takes the best E4M3 block scale among the neighbours of amax / 6
    Raises ValueError for a non-finite weight or an odd width.
    """
    require_choice("scale search", scale_search, SCALE_SEARCHES)
    whole = tensor_scale_for(weight) if tensor_scale is None else tensor_scale.to(weight.device)

    def encode_tile(values: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        groups = magnitudes.unflatten(-1, (-1, GROUP))
        amax = block_maxima(magnitudes, GROUP)
        wanted = amax.div_(torch.full_like(amax, E2M1_MAX)).div_(whole)
        scales = nearest_e4m3(wanted.clamp_(min=_SMALLEST_SCALE))
        if scale_search:
            scales = _best_scales(groups, scales, whole)
        factors = (scales.float() * whole)[..., None]
        return pack(signed_codes(values, groups, factors, E2M1)), scales

    return encode_in_tiles(weight, NVFP4, encode_tile, whole)


def _best_scales(groups: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
    codes = scales.view(torch.uint8).to(torch.int16)
    tried = [(codes + step).clamp_(_SMALLEST_CODE, _LARGEST_CODE) for step in _NEIGHBOURS]
    candidates = [c.to(torch.uint8).view(torch.float8_e4m3fn) for c in tried]
    best = least_squares(groups, [c.float() * tensor_scale for c in candidates], E2M1)
    chosen = torch.stack(tried).gather(0, best[None])[0]
    return chosen.to(torch.uint8).view(torch.float8_e4m3fn)
