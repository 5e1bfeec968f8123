"""Plain-torch twins of kernels/grouped_router.py. D model width, E experts, K experts a token."""

import torch
from torch import Tensor

from kernels.packed_vector import PackedVectors, store_vector
from kernels.reference.rms_norm import rms_norm


def grouped_router(
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    sigmoid: bool,
    num_groups: int,
    num_limited: int,
    normalized: bool,
    scale: float,
    logits: Tensor,
    ticket: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    packed: PackedVectors,
) -> None:
    """Same arguments and results as the kernel, but for the scale of planes."""
    normed = rms_norm(x[None], norm, eps)[0]
    logits.copy_(router.float() @ normed)
    ids, weights = choose(
        logits[None],
        bias,
        sigmoid=sigmoid,
        num_groups=num_groups,
        num_limited=num_limited,
        normalized=normalized,
        scale=scale,
        experts_per_token=len(expert_ids),
    )
    expert_ids.copy_(ids[0])
    expert_weights.copy_(weights[0])
    store_vector(packed, 0, normed)


def choose(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    sigmoid: bool,
    num_groups: int,
    num_limited: int,
    normalized: bool,
    scale: float,
    experts_per_token: int,
) -> tuple[Tensor, Tensor]:
    """Expert ids and weights, both [T, K], one token after the other."""
    ids, weights = [], []
    for logits in logits_TE.float():
        scores = logits.sigmoid() if sigmoid else logits.softmax(0)
        choice = scores if bias_E is None else scores + bias_E.float()
        groups = choice.view(num_groups, -1)
        worth = groups.sort(descending=True).values[:, : 2 if sigmoid else 1].sum(1)
        dropped = worth.sort(descending=True, stable=True).indices[num_limited:]
        choice = groups.clone().index_fill(0, dropped, float("-inf")).flatten()
        best = choice.sort(descending=True, stable=True).indices[:experts_per_token]
        weight = scores[best]
        if normalized:
            weight = weight / (weight.sum() + 1e-20)
        ids.append(best)
        weights.append(scale * weight)
    return torch.stack(ids), torch.stack(weights)


def norm_and_pack(x: Tensor, norm: Tensor, packed: PackedVectors, *, eps: float) -> PackedVectors:
    """Same arguments and results as the kernel, but for the scale of planes."""
    store_vector(packed, 0, rms_norm(x[None], norm, eps)[0])
    return packed
