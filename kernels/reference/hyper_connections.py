"""Plain-torch twins of kernels/hyper_connections.py.

T tokens, N streams, D model width, M rows of the function.
"""

import torch
from torch import Tensor


def hyper_step(
    streams: Tensor,
    result: Tensor,
    mix: Tensor,
    function: Tensor,
    base: Tensor,
    scale: Tensor,
    out: Tensor,
    *,
    first: bool,
    iterations: int,
    eps: float,
    norm_eps: float,
    partial: Tensor,
    ticket: Tensor,
) -> Tensor:
    """Same arguments and results as the kernel; the scratch is not used."""
    if first:
        streams.copy_(result)
    else:
        hyper_write(streams[None], result[None], mix[None])
    result.zero_()
    z = streams.flatten() @ function.float().T
    read = hyper_read(
        streams[None],
        z[None],
        base,
        scale,
        mix[None],
        iterations=iterations,
        eps=eps,
        norm_eps=norm_eps,
    )
    return out.copy_(read[0])


def hyper_write(streams: Tensor, result: Tensor, mix: Tensor) -> Tensor:
    """Same arguments and results as the kernel."""
    count = streams.shape[1]
    post, matrix = mix[:, :count], mix[:, count:].unflatten(1, (count, count))
    mixed = torch.einsum("tjk,tjd->tkd", matrix, streams)
    return streams.copy_(mixed + post[..., None] * result.float()[:, None])


def hyper_read(
    streams: Tensor,
    z: Tensor,
    base: Tensor,
    scale: Tensor,
    mix: Tensor,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """Same arguments and results as the kernel."""
    count = streams.shape[1]
    z = z * torch.rsqrt(streams.flatten(1).square().mean(1, keepdim=True) + norm_eps)
    pre = torch.sigmoid(scale[0] * z[:, :count] + base[:count]) + eps
    if z.shape[1] > count:
        post = 2 * torch.sigmoid(scale[1] * z[:, count : 2 * count] + base[count : 2 * count])
        logits = (scale[2] * z[:, 2 * count :] + base[2 * count :]).unflatten(1, (count, count))
        matrix = logits.softmax(-1) + eps
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
        for _ in range(iterations - 1):
            matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
            matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
        mix.copy_(torch.cat((post, matrix.flatten(1)), dim=1))
    return torch.einsum("tn,tnd->td", pre, streams)
