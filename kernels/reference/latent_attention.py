"""Plain-torch twins of kernels/latent_attention.py, in fp32.

T tokens, H heads, L latent width, P rotary width, U value width of a head.
"""

import torch
from torch import Tensor

from kernels.reference.latent_cache import of_heads
from quant.tensor import QuantTensor


def latent_attention_decode(
    query: Tensor,
    cache: Tensor,
    position: Tensor,
    projection: Tensor | QuantTensor,
    out: Tensor,
    *,
    scale: float,
    acc: Tensor,
    stats: Tensor,
    chosen: Tensor | None = None,
) -> Tensor:
    """Same arguments and results as the kernels; the scratch is not used."""
    latents = query.new_empty((1, len(query), projection.shape[1]), dtype=torch.float32)
    rows = None if chosen is None else chosen[None]
    latent_attention_prefill(query[None], cache, position, latents, scale=scale, chosen=rows)
    for_values = of_heads(projection, len(query))[:, -out.shape[1] :]
    return out.copy_(torch.einsum("hl,hul->hu", latents[0], for_values))


def latent_attention_prefill(
    query: Tensor,
    cache: Tensor,
    position: Tensor,
    out: Tensor,
    *,
    scale: float,
    chosen: Tensor | None = None,
) -> Tensor:
    """Same arguments and results as the kernel, one token after the other."""
    for t, q in enumerate(query.float()):
        length = int(position) + t + 1
        rows = cache[:length] if chosen is None else cache[chosen[t, :length].long()]
        weights = (scale * q @ rows.float().T).softmax(dim=-1)
        out[t] = (weights @ rows[:, : out.shape[2]].float()).to(out.dtype)
    return out
