"""What every encoder asks of a weight."""

import torch
from torch import Tensor

from quant.formats import QuantFormat


def require_encodable(weight: Tensor, format: QuantFormat, group: int = 1) -> None:
    """Raise ValueError unless a weight is finite and its columns come in whole groups."""
    name = format.name.upper().replace("_", " ")
    if weight.shape[-1] % group:
        raise ValueError(f"{name} needs columns in multiples of {group}, got {weight.shape[-1]}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"cannot encode NaN or infinity as {name}")
