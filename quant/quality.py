"""What a stored format costs a weight: errors, clipping, blocks and scales, counted exactly.

quality = measure(weight, encode(weight, MXFP4))
quality.sqnr_db            10 log10(sum w^2 / sum (w - decoded)^2), None if nothing was lost
merge([of this, of that])  the figures of several tensors together
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quant.chunks import as_matrices, row_chunks
from quant.codecs import decode
from quant.e8m0 import decode_e8m0
from quant.tensor import QuantTensor


@dataclass(frozen=True)
class TensorQuality:
    """Counts and sums over the weights of one tensor, or of several merged."""

    weights: int = 0
    signal: float = 0.0  # sum of squared weights
    noise: float = 0.0  # sum of squared errors
    largest: float = 0.0  # largest magnitude of a weight
    max_abs_error: float = 0.0
    saturated: int = 0  # weights beyond the largest value of their block, clipped to it
    vanished: int = 0  # weights other than zero that became zero
    blocks: int = 0  # scales; 0 for formats that have none
    zero_blocks: int = 0  # blocks in which every decoded weight is zero
    zero_scales: int = 0
    nan_scales: int = 0
    # floor(log2 of a scale, the tensor scale included) -> blocks
    scale_exponents: Mapping[int, int] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether every weight decodes to itself."""
        return self.noise == 0 and self.max_abs_error == 0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to noise ratio in dB; None if either of them is zero or not finite."""
        if not (0 < self.noise < math.inf and 0 < self.signal < math.inf):
            return None
        return 10 * math.log10(self.signal / self.noise)

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
    *("weights", "signal", "noise", "saturated", "vanished"),
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

    Takes a few rows at a time: its memory does not grow with the tensor.
    """
    if tuple(weight.shape) != stored.shape:
        raise ValueError(f"the weight is {tuple(weight.shape)}, the stored form {stored.shape}")
    parts = []
    for matrix, stored_matrix in zip(as_matrices(weight), stored.matrices(), strict=True):
        height = stored.format.block[0] if stored.format.block else 1
        for start, stop in row_chunks(len(matrix), matrix.shape[1], height, matrix.device):
            parts.append(_measure_rows(matrix[start:stop], stored_matrix.rows(start, stop)))
    return merge(parts)


def _measure_rows(weight: Tensor, stored: QuantTensor) -> TensorQuality:
    exact = weight.float()
    decoded = decode(stored)
    error = decoded - exact
    zeros = int((decoded == 0).sum())
    blocks = _blocks(stored, decoded, exact, any_zero=zeros > 0)
    vanished = zeros - int((exact == 0).sum()) if zeros else 0
    return TensorQuality(
        weights=exact.numel(),
        signal=_sum_of_squares(exact),
        noise=_sum_of_squares(error),
        largest=_largest(exact),
        max_abs_error=_largest(error),
        vanished=max(0, vanished),
        **blocks,
    )


def _sum_of_squares(values: Tensor) -> float:
    return float((values * values).sum(-1).sum(dtype=torch.float64))


def _largest(values: Tensor) -> float:
    return float(values.abs().amax()) if values.numel() else 0.0


def _blocks(
    stored: QuantTensor, decoded: Tensor, exact: Tensor, *, any_zero: bool
) -> dict[str, Any]:
    """What concerns scales; nothing for a format without them."""
    if stored.scales is None:
        return {}
    scales = scale_values(stored)
    zero_blocks = _zero_blocks(stored, decoded) if any_zero else 0
    sound = torch.isfinite(scales) & (scales > 0)
    exponents = torch.frexp(scales[sound]).exponent.cpu() - 1
    found, counts = torch.unique(exponents, return_counts=True)
    return {
        "saturated": _saturated(stored, exact, scales),
        "blocks": scales.numel(),
        "zero_blocks": zero_blocks,
        "zero_scales": int((scales == 0).sum()),
        "nan_scales": int(torch.isnan(scales).sum()),
        "scale_exponents": dict(zip(found.tolist(), counts.tolist(), strict=True)),
    }


def scale_values(stored: QuantTensor) -> Tensor:
    """The factor of each block in fp32, the tensor scale included; ValueError without scales."""
    if stored.scales is None:
        raise ValueError(f"{stored.format.name} has no scales")
    scales = stored.scales
    wide = decode_e8m0(scales) if scales.dtype == torch.uint8 else scales.float()
    return wide if stored.tensor_scale is None else wide * stored.tensor_scale


def _tiles(stored: QuantTensor, values: Tensor, fill: float = 0.0) -> Tensor:
    """[rows, columns] as [block rows, height, block columns, width]; partial blocks are filled."""
    assert stored.format.block is not None
    height, width = stored.format.block
    width = width or values.shape[-1]
    pad = (0, -values.shape[-1] % width, 0, -values.shape[-2] % height)
    if any(pad):
        values = torch.nn.functional.pad(values, pad, value=fill)
    return values.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))


def _zero_blocks(stored: QuantTensor, decoded: Tensor) -> int:
    return int((_tiles(stored, decoded).abs().amax(-1).amax(-2) == 0).sum())


def _saturated(stored: QuantTensor, exact: Tensor, scales: Tensor) -> int:
    """Weights over the largest value of their block by more than half a unit in fp32's last place.

    A scale that is itself rounded to fp32 leaves the largest weight an ulp over its block's end.
    """
    end = scales * (stored.format.max_value * (1 + 2.0**-22))
    tiles = _tiles(stored, exact).abs()
    over = tiles.amax(-1).amax(-2) > end
    if not bool(over.any()):
        return 0
    chosen = tiles.movedim(-2, -3)[over]
    return int((chosen > end[over][:, None, None]).sum())
