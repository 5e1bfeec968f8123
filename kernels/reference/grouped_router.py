"""Plain-torch twins of kernels/grouped_router.py. D model width, E experts, K experts a token."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kernels.packed_vector import PackedVectors, store_vector
from kernels.reference.rms_norm import rms_norm

_SCORES = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(0),
    "sqrtsoftplus": lambda logits: softplus(logits).sqrt(),
}


def grouped_router(
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    scores: str,
    num_groups: int,
    num_limited: int,
    normalized: bool,
    scale: float,
    logits: Tensor,
    ticket: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    packed: PackedVectors,
    also: PackedVectors | None = None,
    token: Tensor | None = None,
    table: Tensor | None = None,
) -> None:
    """Same arguments and results as the kernel, but for the scale of planes."""
    normed = rms_norm(x[None], norm, eps)[0]
    logits.copy_(router.float() @ normed)
    ids, weights = choose(
        logits[None],
        bias,
        scores=scores,
        num_groups=num_groups,
        num_limited=num_limited,
        normalized=normalized,
        scale=scale,
        experts_per_token=len(expert_ids),
        named_TK=None if table is None or token is None else table[token.long()],
    )
    expert_ids.copy_(ids[0])
    expert_weights.copy_(weights[0])
    for vectors in (packed, *([] if also is None else [also])):
        store_vector(vectors, 0, normed)


def choose(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    scores: str,
    num_groups: int,
    num_limited: int,
    normalized: bool,
    scale: float,
    experts_per_token: int,
    named_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Expert ids and weights, both [T, K], one token after the other.

    named_TK: experts that are not chosen
    """
    ids, weights = [], []
    for t, logits in enumerate(logits_TE.float()):
        scores_E = _SCORES[scores](logits)
        choice = scores_E if bias_E is None else scores_E + bias_E.float()
        groups = choice.view(num_groups, -1)
        best_of = 2 if scores == "sigmoid" else 1
        worth = groups.sort(descending=True).values[:, :best_of].sum(1)
        dropped = worth.sort(descending=True, stable=True).indices[num_limited:]
        choice = groups.clone().index_fill(0, dropped, float("-inf")).flatten()
        best = choice.sort(descending=True, stable=True).indices[:experts_per_token]
        if named_TK is not None:
            best = named_TK[t].long()
        weight = scores_E[best]
        if normalized:
            weight = weight / (weight.sum() + 1e-20)
        ids.append(best)
        weights.append(scale * weight)
    return torch.stack(ids), torch.stack(weights)


def norm_and_pack(x: Tensor, norm: Tensor, packed: PackedVectors, *, eps: float) -> PackedVectors:
    """Same arguments and results as the kernel, but for the scale of planes."""
    store_vector(packed, 0, rms_norm(x[None], norm, eps)[0])
    return packed
