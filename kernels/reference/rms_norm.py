"""Plain-torch twin of kernels/rms_norm.py."""

import torch
from torch import Tensor


def rms_norm(
    x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x / rms(x) * weight in fp32, cast to dtype. [T, D], [D] -> [T, D]."""
    y_TD = x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps)
    return (y_TD * weight_D.float()).to(dtype)
