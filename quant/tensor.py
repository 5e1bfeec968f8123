"""QuantTensor: stored values, their scales and the format that says what they mean."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.formats import QuantFormat


@dataclass(frozen=True)
class QuantTensor:
    """A weight in a stored format; plain data, never a torch.Tensor subclass.

    values: [..., rows, columns / codes per byte] of format.value_dtype
    scales: one entry a block, [..., rows / block rows, columns / block columns]; None for bf16
    shape:  the logical shape [..., rows, columns]
    tensor_scale: fp32 [] for formats that have one
    """

    values: Tensor
    scales: Tensor | None
    format: QuantFormat
    shape: tuple[int, ...]
    tensor_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales as stored."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.values.nbytes + scales

    def __getitem__(self, index: int) -> "QuantTensor":
        """One entry of the leading axis (one expert), without copying."""
        if len(self.shape) < 3:
            raise IndexError(
                f"only stacked weights can be indexed, this one has shape {self.shape}"
            )
        scales = None if self.scales is None else self.scales[index]
        return replace(self, values=self.values[index], scales=scales, shape=self.shape[1:])

    def to(self, device: torch.device | str) -> "QuantTensor":
        """The same tensor on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        whole = None if self.tensor_scale is None else self.tensor_scale.to(device)
        return replace(self, values=self.values.to(device), scales=scales, tensor_scale=whole)
