"""Plain-torch twins of kernels/latent_cache.py.

T tokens, H heads, L latent width, P rotary width, N width of a head's part without rope.
"""

import torch
from torch import Tensor

from kernels.reference.rms_norm import rms_norm
from quant.codecs import decode
from quant.tensor import QuantTensor


def rotated_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [.., P] with pairs (2i, 2i + 1) turned; cos and sin end in [.., P / 2]."""
    first, second = x[..., 0::2], x[..., 1::2]
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return pairs.flatten(-2)


def latent_cache(
    q: Tensor,
    latent: Tensor,
    norm: Tensor,
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    cache: Tensor,
    query: Tensor,
    *,
    eps: float,
) -> Tensor:
    """Same arguments and results as the kernel."""
    positions = int(position) + torch.arange(len(q), device=q.device)
    cos, sin = (table[positions] for table in rope)
    rotary = 2 * cos.shape[1]
    width = latent.shape[1] - rotary
    cache[positions, :width] = rms_norm(latent[:, :width].float(), norm, eps).to(cache.dtype)
    cache[positions, width:] = rotated_pairs(latent[:, width:].float(), cos, sin).to(cache.dtype)
    turned = rotated_pairs(q[..., -rotary:].float(), cos[:, None], sin[:, None])
    query[..., width:] = turned.to(query.dtype)
    return query


def of_heads(projection: Tensor | QuantTensor, heads: int) -> Tensor:
    """[H, N + U, L] fp32."""
    plain = projection.float() if isinstance(projection, Tensor) else decode(projection)
    return plain.unflatten(0, (heads, -1))


def latent_query(
    q: Tensor,
    latent: Tensor,
    norm: Tensor,
    projection: Tensor | QuantTensor,
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    cache: Tensor,
    query: Tensor,
    *,
    eps: float,
) -> Tensor:
    """Same arguments and results as the kernel."""
    latent_cache(q[None], latent[None], norm, rope, position, cache, query[None], eps=eps)
    nope = q.shape[1] - 2 * rope[0].shape[1]
    for_keys = of_heads(projection, len(q))[:, :nope]
    absorbed = torch.einsum("hn,hnl->hl", q[:, :nope], for_keys)
    query[:, : absorbed.shape[1]] = absorbed.to(query.dtype)
    return query
