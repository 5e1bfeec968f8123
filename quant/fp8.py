"""FP8 E4M3 (fn: no infinities, 0x7F and 0xFF are NaN, largest 448) with fp32 scales.

Two blockings: 128x128 blocks (DeepSeek's weight_scale_inv, which multiplies) and one scale a row.
    scale = amax / 448,  code = nearest(w / scale),  w ~ code * scale
"""

import torch
from torch import Tensor

from quant.formats import FP8_BLOCK128, FP8_ROW
from quant.tensor import QuantTensor

E4M3_MAX = 448.0
BLOCK = 128


def encode_block128(weight: Tensor) -> QuantTensor:
    """Encode fp32 [..., rows, columns] with one fp32 scale per 128x128 block (edges are partial).

    A block of zeros gets scale 1. Raises ValueError for a non-finite weight.
    """
    _require_finite(weight)
    rows, columns = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scales = _scales_for(tiles.abs().amax(dim=(-3, -1)))
    codes = _round_to_e4m3(weight.float() / expand_block_scales(scales, rows, columns))
    return QuantTensor(codes, scales, FP8_BLOCK128, tuple(weight.shape))


def encode_row(weight: Tensor) -> QuantTensor:
    """Encode fp32 [..., rows, columns] with one fp32 scale a row, stored [..., rows, 1].

    A row of zeros gets scale 1. Raises ValueError for a non-finite weight.
    """
    _require_finite(weight)
    scales = _scales_for(weight.float().abs().amax(-1, keepdim=True))
    return QuantTensor(
        _round_to_e4m3(weight.float() / scales), scales, FP8_ROW, tuple(weight.shape)
    )


def decode_block128(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns]: one fp32 multiplication a weight."""
    assert tensor.scales is not None
    rows, columns = tensor.shape[-2:]
    return tensor.values.float() * expand_block_scales(tensor.scales, rows, columns)


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


def _round_to_e4m3(scaled: Tensor) -> Tensor:
    # Clamp first: torch 2.11 casts values above 464 to NaN where torch 2.13 saturates.
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _require_finite(weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("cannot encode NaN or infinity as FP8")
