"""Choosing experts from router scores, in plain torch fp32. T tokens, E experts, K per token."""

from __future__ import annotations

from torch import Tensor


def choose_experts(scores_TE: Tensor, experts_per_token: int) -> Tensor:
    """Expert ids [T, K] of the largest scores; a tie takes the lower id."""
    ordered = scores_TE.sort(dim=-1, descending=True, stable=True)
    return ordered.indices[:, :experts_per_token]


def limit_groups(
    scores_TE: Tensor, *, num_groups: int, num_limited: int, best_of_group: int
) -> Tensor:
    """Scores with -inf outside each token's best groups of experts.

    best_of_group: a group is worth the sum of this many of its best scores
    """
    if num_limited == num_groups:
        return scores_TE
    scores_TGE = scores_TE.unflatten(-1, (num_groups, -1))
    best = min(best_of_group, scores_TGE.shape[-1])
    worth_TG = scores_TGE.topk(best, dim=-1).values.sum(dim=-1)
    dropped_TG = choose_experts(worth_TG, num_groups)[:, num_limited:]
    dropped_TGE = dropped_TG[..., None].expand(-1, -1, scores_TGE.shape[-1])
    return scores_TGE.scatter(1, dropped_TGE, float("-inf")).flatten(1)
