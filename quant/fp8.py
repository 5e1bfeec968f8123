"""FP8 E4M3 (fn: no infinities, 0x7F and 0xFF are NaN, largest 448).

Two blockings: 128x128 blocks (DeepSeek's weight_scale_inv, which multiplies; scales in fp32 or
raised to a power of two in E8M0) and one fp32 scale a row.
    scale = amax / 448,  code = nearest(w / scale),  w ~ code * scale
"""

import torch
from torch import Tensor

from quant.e8m0 import decode_e8m0
from quant.formats import FP8_BLOCK128, FP8_BLOCK128_E8M0, FP8_ROW
from quant.require import require_encodable
from quant.tensor import QuantTensor

E4M3_MAX = 448.0
BLOCK = 128


def encode_block128(weight: Tensor) -> QuantTensor:
    """Encode fp32 [..., rows, columns] with one fp32 scale per 128x128 block (edges are partial).

    A block of zeros gets scale 1. Raises ValueError for a non-finite weight.
    """
    require_encodable(weight, FP8_BLOCK128)
    rows, columns = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scales = _scales_for(tiles.abs().amax(dim=(-3, -1)))
    codes = round_to_e4m3(weight.float() / expand_block_scales(scales, rows, columns))
    return QuantTensor(codes, scales, FP8_BLOCK128, tuple(weight.shape))


def encode_block128_e8m0(weight: Tensor) -> QuantTensor:
    """The same with each scale raised to a power of two (DeepSeek's UE8M0), stored as E8M0."""
    plain = encode_block128(weight)
    assert plain.scales is not None
    # frexp: scale = fraction * 2^exponent with 1/2 <= fraction < 1
    fraction, exponent = torch.frexp(plain.scales)
    power = exponent - (fraction == 0.5).to(exponent.dtype)
    scale_bytes = (power + 127).clamp(0, 254).to(torch.uint8)
    rows, columns = weight.shape[-2:]
    scales = expand_block_scales(decode_e8m0(scale_bytes), rows, columns)
    codes = round_to_e4m3(weight.float() / scales)
    return QuantTensor(codes, scale_bytes, FP8_BLOCK128_E8M0, tuple(weight.shape))


def encode_row(weight: Tensor) -> QuantTensor:
    """Encode fp32 [..., rows, columns] with one fp32 scale a row, stored [..., rows, 1].

    A row of zeros gets scale 1. Raises ValueError for a non-finite weight.
    """
    require_encodable(weight, FP8_ROW)
    scales = _scales_for(weight.float().abs().amax(-1, keepdim=True))
    return QuantTensor(round_to_e4m3(weight.float() / scales), scales, FP8_ROW, tuple(weight.shape))


def decode_block128(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns]: one fp32 multiplication a weight."""
    assert tensor.scales is not None
    rows, columns = tensor.shape[-2:]
    return tensor.values.float() * expand_block_scales(tensor.scales, rows, columns)


def decode_block128_e8m0(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns], exact."""
    assert tensor.scales is not None
    rows, columns = tensor.shape[-2:]
    return tensor.values.float() * expand_block_scales(decode_e8m0(tensor.scales), rows, columns)


def decode_row(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns]: one fp32 multiplication a weight."""
    assert tensor.scales is not None
    return tensor.values.float() * tensor.scales


def expand_block_scales(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales [..., rows/128, columns/128], rounded up, to one a weight [..., rows, columns]."""
    wide = scales.float().repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return wide[..., :rows, :columns]


def _scales_for(amax: Tensor) -> Tensor:
    scales = amax / E4M3_MAX
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def round_to_e4m3(scaled: Tensor) -> Tensor:
    """fp32 to E4M3: nearest, ties to even, saturating at 448."""
    # Clamp first: torch 2.11 casts values above 464 to NaN where torch 2.13 saturates.
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
