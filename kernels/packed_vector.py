"""The order and scale in which kernels/moe_gemv.py reads a token's vector."""

import math

import torch
from torch import Tensor


def pack_vector(x: Tensor) -> Tensor:
    """[..., n] to [..., 4, n / 8, 2] fp16: element (i, w, h) is x[8 w + 4 h + i]."""
    return x.unflatten(-1, (-1, 2, 4)).movedim(-1, -3).to(torch.float16).contiguous()


def unpack_vector(packed: Tensor) -> Tensor:
    """The inverse of pack_vector, in fp32: [..., 4, n / 8, 2] to [..., n]."""
    return packed.float().movedim(-3, -1).flatten(-3)


def activation_scale(limit: float) -> float:
    """Power of two that the clamped SwiGLU's outputs are stored with: limit * (limit + 1) fits."""
    return 2.0 ** math.floor(math.log2(60000.0 / (limit * (limit + 1.0))))
