"""Plain-torch twin of kernels/swiglu.py."""

import torch
from torch import Tensor

from kernels.swiglu import Swiglu


def apply_swiglu(y: Tensor, activation: Swiglu) -> Tensor:
    """The activation of gate and up columns, [.., 2F] -> [.., F]."""
    gate, up = (y[..., 0::2], y[..., 1::2]) if activation.alternating else y.chunk(2, dim=-1)
    if activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.offset)
