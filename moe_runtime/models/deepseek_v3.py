"""DeepSeek V3, R1, V3.1 and Kimi-K2 in plain torch: V2 with a router of sigmoids and a bias.

The bias counts in the choice of groups and experts, not in the weights. A group of experts is
worth the sum of its best two. Kimi-K2 has one group.
"""

from __future__ import annotations

from torch import Tensor

from moe_runtime.layers.routing import choose_experts, limit_groups
from moe_runtime.models.deepseek_v2 import DeepseekV2Reference

_LEAST_SUM = 1e-20  # added to the sum of a token's weights


class DeepseekV3Reference(DeepseekV2Reference):
    """One DeepSeek V3 model on one device with its cache of latents and rotated keys."""

    def _route(self, name: str, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        scores_TE = logits_TE.sigmoid()
        limited_TE = limit_groups(
            scores_TE + self.weight(name + "router_bias"),
            num_groups=c.num_expert_groups,
            num_limited=c.num_limited_groups,
            best_of_group=2,
        )
        ids_TK = choose_experts(limited_TE, c.experts_per_token)
        weights_TK = scores_TE.gather(1, ids_TK)
        if c.normalized:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + _LEAST_SUM)
        return c.routed_scale * weights_TK, ids_TK
