"""Plain-torch twin of kernels/shared_rows.py.

T tokens, H heads, C row width, P rotary width, I index heads, J index width.
"""

import torch
from torch import Tensor

from kernels.reference.latent_cache import rotated_pairs
from kernels.reference.rms_norm import rms_norm


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [.., C] with the last P columns turned in pairs; cos and sin end in [.., P / 2]."""
    rotary = 2 * cos.shape[-1]
    still, last = x[..., : x.shape[-1] - rotary], x[..., x.shape[-1] - rotary :]
    return torch.cat((still, rotated_pairs(last, cos, sin)), dim=-1)


def shared_rows(
    q: Tensor,
    row: Tensor,
    norm: Tensor,
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    ring: Tensor,
    query: Tensor,
    *,
    eps: float,
    index_q: Tensor | None = None,
    index_query: Tensor | None = None,
) -> Tensor:
    """Same arguments and results as the kernel."""
    positions = int(position) + torch.arange(len(q), device=q.device)
    cos, sin = (table[positions] for table in rope)
    ring[positions % len(ring)] = turned(rms_norm(row.float(), norm, eps), cos, sin).to(ring.dtype)
    if index_q is not None and index_query is not None:
        index_query.copy_(turned(index_q.float(), cos[:, None], sin[:, None]))
    heads = rms_norm(q.float(), torch.ones(q.shape[-1], device=q.device), eps)
    return query.copy_(turned(heads, cos[:, None], sin[:, None]))
