"""Plain-torch twin of kernels/sink_attention_prefill.py.

T tokens, H query heads, G kv heads, C head width, S slots of the cache.
"""

import torch
from torch import Tensor


def sink_attention_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sinks: Tensor,
    position: Tensor,
    out: Tensor,
    *,
    window: int,
) -> Tensor:
    """Same arguments and result as the kernel, one token at a time in fp32."""
    heads_per_kv = q.shape[1] // k_cache.shape[0]
    for t in range(q.shape[0]):
        last = int(position) + t
        first = max(0, last - window + 1) if window else 0
        slot = torch.arange(first, last + 1, device=q.device) % k_cache.shape[1]
        k_HSC = k_cache[:, slot].float().repeat_interleave(heads_per_kv, 0)
        v_HSC = v_cache[:, slot].float().repeat_interleave(heads_per_kv, 0)
        scores_HS = torch.einsum("hc,hsc->hs", q[t].float(), k_HSC) * q.shape[2] ** -0.5
        weights_HS = torch.cat((scores_HS, sinks.float()[:, None]), dim=1).softmax(dim=1)[:, :-1]
        out[t] = torch.einsum("hs,hsc->hc", weights_HS, v_HSC).flatten().to(out.dtype)
    return out
