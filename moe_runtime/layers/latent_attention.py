"""Multi-head latent attention (MLA) in its absorbed form, in plain torch fp32.

A token caches one latent of width L and one rotated key of width P, which all heads share. Keys
and values of the heads are never built: a head's key projection is applied to its query, its value
projection to the mean of latents, which is the same sum in another order.

T tokens, S cached tokens, H heads, L latent width, P rotary width, N and U widths of a head's part
without rope and of its values.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_SCORES = 1 << 25  # at once: bounds the memory


def latent_attention(
    q_THN: Tensor,
    q_THP: Tensor,
    latents_SL: Tensor,
    keys_SP: Tensor,
    projections_HXL: Tensor,
    seen_TS: Tensor,
    scale: float,
) -> Tensor:
    """Attention of all heads, [T, H * U].

    q_THN, q_THP:    parts of the queries without and with rope
    projections_HXL: each head's N rows for keys, then its U rows for values
    seen_TS:         which cached tokens a query sees; at least one
    scale:           of the scores before the softmax
    """
    width = q_THN.shape[-1]
    for_keys_HNL, for_values_HUL = projections_HXL[:, :width], projections_HXL[:, width:]
    queries = max(1, _MAX_SCORES // (q_THN.shape[1] * len(latents_SL)))
    out = []
    for q_nope, q_rope, seen in zip(
        q_THN.split(queries), q_THP.split(queries), seen_TS.split(queries), strict=True
    ):
        absorbed_THL = torch.einsum("thn,hnl->thl", q_nope, for_keys_HNL)
        scores_THS = scale * (absorbed_THL @ latents_SL.T + q_rope @ keys_SP.T)
        weights_THS = scores_THS.masked_fill(~seen[:, None], float("-inf")).softmax(dim=-1)
        out.append(torch.einsum("thl,hul->thu", weights_THS @ latents_SL, for_values_HUL))
    return torch.cat(out).flatten(1)


def causal_is_seen(positions_T: Tensor, num_cached: int) -> Tensor:
    """[T, S]: the query's own token and all before it."""
    return positions_T[:, None] >= torch.arange(num_cached, device=positions_T.device)
