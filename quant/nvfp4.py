"""NVFP4: E2M1 codes, 16 along a row sharing one E4M3 scale, and one fp32 scale a tensor.

    w[r, 16 g + i] = E2M1(code) * E4M3(scales[r, g]) * tensor_scale
    tensor_scale = amax of the tensor / (448 * 6), so that the largest block scale is 448

Weights that are used side by side (gate and up) must share one tensor scale: give it to `encode`.
"""

import torch
from torch import Tensor

from quant.e2m1 import E2M1_MAX, decode_codes, encode_codes, pack
from quant.formats import NVFP4
from quant.fp8 import E4M3_MAX, round_to_e4m3
from quant.require import require_encodable
from quant.tensor import QuantTensor

GROUP = 16
# The smallest normal E4M3: a block of zeros gets it too, so that no scale is zero.
_SMALLEST_SCALE = 2.0**-6


def tensor_scale_for(*weights: Tensor) -> Tensor:
    """The fp32 scale [] that tensors share; 1 if all of them are zero."""
    amax = torch.stack([weight.float().abs().amax() for weight in weights]).amax()
    return torch.where(amax > 0, amax / (E4M3_MAX * E2M1_MAX), torch.ones_like(amax))


def decode(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns]: codes times (block scale times tensor scale)."""
    assert tensor.scales is not None and tensor.tensor_scale is not None
    values = decode_codes(tensor.values).unflatten(-1, (-1, GROUP))
    return (values * (tensor.scales.float() * tensor.tensor_scale)[..., None]).flatten(-2)


def encode(weight: Tensor, tensor_scale: Tensor | None = None) -> QuantTensor:
    """Encode fp32 [..., rows, columns] (columns a multiple of 16) as NVFP4.

    tensor_scale: fp32 [], default that of this tensor alone
    Raises ValueError for a non-finite weight or an odd width.
    """
    require_encodable(weight, NVFP4, GROUP)
    if tensor_scale is None:
        tensor_scale = tensor_scale_for(weight)
    groups = weight.float().unflatten(-1, (-1, GROUP))
    wanted = groups.abs().amax(-1) / E2M1_MAX / tensor_scale
    scales = round_to_e4m3(wanted.clamp(min=_SMALLEST_SCALE))
    codes = encode_codes(groups / (scales.float() * tensor_scale)[..., None])
    shape = tuple(weight.shape)
    return QuantTensor(pack(codes).flatten(-2), scales, NVFP4, shape, tensor_scale)
