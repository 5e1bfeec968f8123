"""What a stored format costs a weight: errors, clipping, blocks and scales, counted exactly.

quality = measure(weight, encode(weight, MXFP4))
quality.sqnr_db            10 log10(sum w^2 / sum (w - decoded)^2), None if nothing was lost
merge([of this, of that])  the figures of several tensors together
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quant.blocks import magnitude_bits
from quant.codecs import decode
from quant.e8m0 import decode_e8m0
from quant.tensor import QuantTensor
from quant.tiles import Tile, as_matrices, for_each, tiles_of


@dataclass(frozen=True)
class TensorQuality:
    """Counts and sums over the weights of one tensor, or of several merged."""

    weights: int = 0
    signal: float = 0.0  # sum of squared weights
    noise: float = 0.0  # sum of squared errors
    plain_noise: float = 0.0  # the same without the search for scales; 0 where there was none
    largest: float = 0.0  # largest magnitude of a weight
    max_abs_error: float = 0.0
    saturated: int = 0  # weights beyond the largest value of their block, clipped to it
    vanished: int = 0  # weights other than zero that became zero
    blocks: int = 0  # scales; 0 for formats that have none
    zero_blocks: int = 0  # blocks in which every decoded weight is zero
    zero_scales: int = 0
    nan_scales: int = 0
    # floor(log2 of a scale), the tensor scale included, -> blocks; subnormals count as -127
    scale_exponents: Mapping[int, int] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether every weight decodes to itself."""
        return self.noise == 0 and self.max_abs_error == 0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to noise ratio in dB; None if either of them is zero or not finite."""
        return _decibels(self.signal, self.noise)

    @property
    def plain_sqnr_db(self) -> float | None:
        """The same of the plain rule; None where there was no search."""
        return _decibels(self.signal, self.plain_noise)

    @property
    def relative_mse(self) -> float:
        """Noise over signal; 0 for an exact tensor."""
        return self.noise / self.signal if self.signal else 0.0

    @property
    def saturated_share(self) -> float:
        """Share of weights that were clipped."""
        return self.saturated / self.weights if self.weights else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, from which `from_dict` makes an equal object."""
        return {
            "sqnr_db": self.sqnr_db,
            "plain_sqnr_db": self.plain_sqnr_db,
            "relative_mse": self.relative_mse,
            "saturated_share": self.saturated_share,
            **{name: getattr(self, name) for name in _SUMMED + _LARGEST},
            "scale_exponents": {str(e): n for e, n in sorted(self.scale_exponents.items())},
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> TensorQuality:
        """The object that `as_dict` described."""
        exponents = {int(e): n for e, n in saved["scale_exponents"].items()}
        return cls(**{name: saved[name] for name in _SUMMED + _LARGEST}, scale_exponents=exponents)


_SUMMED = (
    *("weights", "signal", "noise", "plain_noise", "saturated", "vanished"),
    *("blocks", "zero_blocks", "zero_scales", "nan_scales"),
)
_LARGEST = ("largest", "max_abs_error")


def merge(parts: Iterable[TensorQuality]) -> TensorQuality:
    """The figures of all parts together; of none, zeros."""
    parts = list(parts)
    exponents: Counter[int] = Counter()
    for part in parts:
        exponents.update(part.scale_exponents)
    figures: dict[str, Any] = {name: sum(getattr(p, name) for p in parts) for name in _SUMMED}
    for name in _LARGEST:
        figures[name] = max((getattr(part, name) for part in parts), default=0.0)
    return TensorQuality(**figures, scale_exponents=dict(sorted(exponents.items())))


def measure(weight: Tensor, stored: QuantTensor) -> TensorQuality:
    """Compare a weight with what its stored form decodes to.

    weight: [..., rows, columns] of a floating dtype, or [n]
    stored: of the same logical shape, on the same device

    Goes tile by tile: its memory does not grow with the tensor.
    """
    if tuple(weight.shape) != stored.shape:
        raise ValueError(f"the weight is {tuple(weight.shape)}, the stored form {stored.shape}")
    stack, values = as_matrices(weight), as_matrices(stored.values)
    height, width = block = _block_of(stored)
    scales = None if stored.scales is None else as_matrices(stored.scales)

    def measure_tile(tile: Tile) -> TensorQuality:
        chunk = tile.of(stack).float()
        part = replace(
            stored,
            values=tile.of(values, 1, stored.format.values_per_byte),
            scales=None if scales is None else tile.of(scales, height, width),
            shape=tuple(chunk.shape),
        )
        return _measure_tile(chunk, part)

    tiles = tiles_of(stack, block)
    return merge([_scale_figures(stored), *for_each(tiles, measure_tile, weight.device)])


def _decibels(signal: float, noise: float) -> float | None:
    if not (0 < noise < math.inf and 0 < signal < math.inf):
        return None
    return 10 * math.log10(signal / noise)


def _block_of(stored: QuantTensor) -> tuple[int, int]:
    height, width = stored.format.block or (1, 1)
    return height, width or stored.shape[-1]


def _measure_tile(exact: Tensor, stored: QuantTensor) -> TensorQuality:
    decoded = decode(stored)
    # Magnitudes as integers: fp32 >= 0 are in the order of their bits, and torch is faster so.
    exact_bits, decoded_bits = magnitude_bits(exact), magnitude_bits(decoded)
    error = decoded - exact  # not in place: plain fp32 numbers decode to themselves
    largest, max_abs_error = _largest(exact_bits), _largest(magnitude_bits(error))
    return TensorQuality(
        weights=exact.numel(),
        signal=_sum_of_squares(exact, largest),
        noise=_sum_of_squares(error, max_abs_error),
        largest=largest,
        max_abs_error=max_abs_error,
        vanished=max(0, _count_nonzero(exact_bits) - _count_nonzero(decoded_bits)),
        **_block_figures(stored, exact_bits, decoded_bits),
    )


def _largest(bits: Tensor) -> float:
    return float(bits.amax().view(torch.float32))


def _sum_of_squares(values: Tensor, largest: float) -> float:
    """largest: magnitude of any of the values"""
    if largest and not 2.0**-50 < largest < 2.0**50:  # squares would leave fp32
        return float(values.double().square().sum())
    return float((values * values).sum(-1).sum(dtype=torch.float64))


def _count_nonzero(bits: Tensor) -> int:
    return int(bits.clamp(max=1).sum(dtype=torch.int32))


def _block_figures(stored: QuantTensor, exact: Tensor, decoded: Tensor) -> dict[str, Any]:
    """Blocks that became zero, and weights beyond the largest value of their block.

    A scale that is itself rounded to fp32 may leave the largest weight an ulp over that value.
    """
    if stored.scales is None:
        return {}
    zero_blocks = int((_in_blocks(stored, decoded).amax(-1).amax(1) == 0).sum())
    end = scale_values(stored) * (stored.format.max_value * (1 + 2.0**-22))
    room = end.view(torch.int32)[:, None, :, None] - _in_blocks(stored, exact)
    return {"zero_blocks": zero_blocks, "saturated": -int((room >> 31).sum(dtype=torch.int32))}


def _in_blocks(stored: QuantTensor, values: Tensor) -> Tensor:
    """[rows, columns] as [block rows, height, block columns, width]; partial ones get zeros."""
    height, width = _block_of(stored)
    pad = (0, -values.shape[-1] % width, 0, -values.shape[-2] % height)
    if any(pad):
        values = torch.nn.functional.pad(values, pad)
    return values.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))


def _scale_figures(stored: QuantTensor) -> TensorQuality:
    """What the scales say alone."""
    if stored.scales is None:
        return TensorQuality()
    scales = scale_values(stored).flatten()
    bits = scales.view(torch.int32)
    # Exponents of fp32, and 0 for zero and subnormals, 255 for NaN and infinity.
    counts = torch.bincount((bits >> 23) & 0xFF, minlength=256).tolist()
    zeros, nans = int((scales == 0).sum()), int(torch.isnan(scales).sum())
    exponents = {e - 127: n for e, n in enumerate(counts) if n and 0 < e < 255}
    if counts[0] > zeros:
        exponents = {-127: counts[0] - zeros, **exponents}
    return TensorQuality(
        blocks=scales.numel(),
        zero_scales=zeros,
        nan_scales=nans,
        scale_exponents=exponents,
    )


def scale_values(stored: QuantTensor) -> Tensor:
    """The factor of each block in fp32, the tensor scale included; ValueError without scales."""
    if stored.scales is None:
        raise ValueError(f"{stored.format.name} has no scales")
    scales = stored.scales
    wide = decode_e8m0(scales) if scales.dtype == torch.uint8 else scales.float()
    return wide if stored.tensor_scale is None else wide * stored.tensor_scale
