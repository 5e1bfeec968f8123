"""FP8 E4M3 with fp32 scales, or powers of two, over 128x128 blocks or rows.

    scale = amax / 448,  code = nearest(w / scale),  w ~ code * scale

Blocks are DeepSeek's: its weight_scale_inv holds these scales, which multiply. Raised to a power
of two (UE8M0) they are stored as E8M0.
"""

import torch
from torch import Tensor

from quant.blocks import encode_in_tiles, signed_codes
from quant.e4m3 import E4M3_MAX, decode_e4m3
from quant.e8m0 import decode_e8m0, power_of_two_bytes
from quant.formats import FP8_BLOCK128, FP8_BLOCK128_E8M0, FP8_ROW
from quant.minifloat import E4M3
from quant.tensor import QuantTensor

BLOCK = 128


def encode_block128(weight: Tensor) -> QuantTensor:
    """Encode [..., rows, columns] with one fp32 scale per 128x128 block (edges are partial).

    A block of zeros gets scale 1. Raises ValueError for a non-finite weight.
    """

    def encode_tile(values: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        scales = _scales_for(_tile_maxima(magnitudes))
        return _block_codes(values, magnitudes, scales), scales

    return encode_in_tiles(weight, FP8_BLOCK128, encode_tile)


def encode_block128_e8m0(weight: Tensor) -> QuantTensor:
    """The same with each scale raised to a power of two (DeepSeek's UE8M0), stored as E8M0."""

    def encode_tile(values: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        scale_bytes = power_of_two_bytes(_scales_for(_tile_maxima(magnitudes)))
        return _block_codes(values, magnitudes, decode_e8m0(scale_bytes)), scale_bytes

    return encode_in_tiles(weight, FP8_BLOCK128_E8M0, encode_tile)


def encode_row(weight: Tensor) -> QuantTensor:
    """Encode [..., rows, columns] with one fp32 scale a row, stored [..., rows, 1].

    A row of zeros gets scale 1. Raises ValueError for a non-finite weight.
    """

    def encode_tile(values: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        scales = _scales_for(magnitudes.amax(-1, keepdim=True))
        return signed_codes(values, magnitudes, scales, E4M3), scales

    return encode_in_tiles(weight, FP8_ROW, encode_tile)


def decode_block128(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns]: one fp32 multiplication a weight."""
    assert tensor.scales is not None
    rows, columns = tensor.shape[-2:]
    values = decode_e4m3(tensor.values)
    return values.mul_(expand_block_scales(tensor.scales, rows, columns))


def decode_block128_e8m0(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns], exact."""
    assert tensor.scales is not None
    rows, columns = tensor.shape[-2:]
    values = decode_e4m3(tensor.values)
    return values.mul_(expand_block_scales(decode_e8m0(tensor.scales), rows, columns))


def decode_row(tensor: QuantTensor) -> Tensor:
    """fp32 weights [..., rows, columns]: one fp32 multiplication a weight."""
    assert tensor.scales is not None
    return decode_e4m3(tensor.values).mul_(tensor.scales)


def expand_block_scales(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales [..., rows/128, columns/128], rounded up, to one a weight [..., rows, columns]."""
    wide = scales.float().repeat_interleave(BLOCK, -1)[..., :columns]
    return wide.repeat_interleave(BLOCK, -2)[..., :rows, :]


def _tile_maxima(magnitudes: Tensor) -> Tensor:
    """The largest of each 128x128 block of [rows, columns]; edges are partial."""
    rows, columns = magnitudes.shape
    if rows % BLOCK or columns % BLOCK:
        pad = (0, -columns % BLOCK, 0, -rows % BLOCK)
        magnitudes = torch.nn.functional.pad(magnitudes, pad)
    tiles = magnitudes.unflatten(-1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    return tiles.amax(1).amax(-1)


def _block_codes(values: Tensor, magnitudes: Tensor, scales: Tensor) -> Tensor:
    wide = expand_block_scales(scales, *values.shape)
    return signed_codes(values, magnitudes, wide, E4M3)


def _scales_for(amax: Tensor) -> Tensor:
    scales = amax / torch.full_like(amax, E4M3_MAX)
    return torch.where(scales > 0, scales, torch.ones_like(scales))
