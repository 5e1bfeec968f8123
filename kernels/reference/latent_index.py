"""Plain-torch twins of kernels/latent_index.py.

T tokens, I index heads, J index width, P rotary width, C chosen tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from kernels.latent_index import NORM_EPS


def index_rows(
    q: Tensor,
    key: Tensor,
    norm: Tensor,
    bias: Tensor,
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    cache: Tensor,
    query: Tensor,
) -> Tensor:
    """Same arguments and results as the kernel."""
    positions = int(position) + torch.arange(len(q), device=q.device)
    cos, sin = (table[positions] for table in rope)
    key = layer_norm(key.float(), key.shape[1:], norm.float(), bias.float(), NORM_EPS)
    cache[positions] = _rotated(key, cos, sin).to(cache.dtype)
    return query.copy_(_rotated(q.float(), cos[:, None], sin[:, None]))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, still = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, still), dim=-1)


def index_choose(
    query: Tensor,
    weights: Tensor,
    cache: Tensor,
    position: Tensor,
    scores: Tensor,
    chosen: Tensor,
    *,
    ratio: int = 1,
    cut: Tensor | None = None,
) -> Tensor:
    """Same arguments and results as the kernels; the scratches are not used."""
    for t, (q, weight) in enumerate(zip(query.float(), weights, strict=True)):
        length = (int(position) + t + 1) // ratio
        row = (weight[:, None] * (q @ cache[:length].float().T).relu()).sum(0)
        best = row.sort(descending=True, stable=True).indices[: chosen.shape[1]]
        chosen[t, : len(best)] = best.sort().values.to(torch.int32)
    return chosen
