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


def packed_buffer(vectors: int, width: int, device: torch.device) -> Tensor:
    """[vectors, 4, width / 8, 2] fp16 of zeros, with zeros for one vector more behind the end.

    Lanes of a tensor-core tile that hold no column of the vector read those zeros.
    """
    store = torch.zeros((vectors + 1) * width + 64, dtype=torch.float16, device=device)
    return store[: vectors * width].view(vectors, 4, width // 8, 2)
