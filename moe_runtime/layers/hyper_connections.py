"""Hyper-connections (mHC) of DeepSeek V4: N residual streams in place of one, in plain torch fp32.

Before a block the streams are mixed to one vector with weights `pre`; its result goes back into
every stream with weights `post`, on top of the streams mixed among themselves by an N x N matrix
that Sinkhorn's iteration makes doubly stochastic. All three come from the streams themselves.

T tokens, N streams, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HyperWeights:
    """The weights that make the mixing from the streams, fp32."""

    function: Tensor  # [2N + N * N, N * D]: rows of pre, of post, of the matrix row by row
    base: Tensor  # [2N + N * N]
    scale: Tensor  # [3]: of pre, post and the matrix


@dataclass(frozen=True)
class Mixing:
    """How one block reads the streams and writes them back."""

    pre_TN: Tensor
    post_TN: Tensor
    matrix_TNN: Tensor  # [from stream, to stream]; its rows and columns sum to 1

    def read(self, streams_TND: Tensor) -> Tensor:
        """What the block is given, [T, D]."""
        return torch.einsum("tn,tnd->td", self.pre_TN, streams_TND)

    def write(self, streams_TND: Tensor, result_TD: Tensor) -> Tensor:
        """The streams after the block, [T, N, D]."""
        mixed_TND = torch.einsum("tjk,tjd->tkd", self.matrix_TNN, streams_TND)
        return mixed_TND + self.post_TN[..., None] * result_TD[:, None]


def mixing(
    streams_TND: Tensor, weights: HyperWeights, *, iterations: int, eps: float, norm_eps: float
) -> Mixing:
    """The mixing of one block for each token.

    iterations: of Sinkhorn, the softmax and the first division by columns counted as one
    eps:        added to pre, to the matrix and to its sums
    norm_eps:   of the RMS over all streams of a token
    """
    streams = streams_TND.shape[1]
    z = projected(streams_TND, weights.function, norm_eps)
    parts = (streams, streams, streams * streams)
    pre, post, matrix = z.split(parts, dim=-1)
    pre_base, post_base, matrix_base = weights.base.split(parts)
    pre_scale, post_scale, matrix_scale = weights.scale.unbind()
    matrix = (matrix_scale * matrix + matrix_base).unflatten(-1, (streams, streams))
    return Mixing(
        torch.sigmoid(pre_scale * pre + pre_base) + eps,
        2 * torch.sigmoid(post_scale * post + post_base),  # the one without eps
        sinkhorn(matrix.softmax(-1) + eps, iterations=iterations, eps=eps),
    )


def sinkhorn(matrix: Tensor, *, iterations: int, eps: float) -> Tensor:
    """Divide by the sums of columns, then of rows and columns in turn; ends with columns."""
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def merge_streams(
    streams_TND: Tensor, weights: HyperWeights, *, eps: float, norm_eps: float
) -> Tensor:
    """The streams after the last layer as one vector, [T, D].

    weights: function [N, N * D], base [N] and scale [1]
    """
    z_TN = projected(streams_TND, weights.function, norm_eps)
    pre_TN = torch.sigmoid(weights.scale * z_TN + weights.base) + eps
    return torch.einsum("tn,tnd->td", pre_TN, streams_TND)


def projected(streams_TND: Tensor, function: Tensor, norm_eps: float) -> Tensor:
    """function times the streams of a token, which are divided by their common RMS."""
    flat = streams_TND.flatten(1)
    inverse_rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return (flat @ function.T) * inverse_rms
