"""Plain-torch twin of kernels/sink_attention_decode.py.

H query heads, G kv heads, C head width, S slots of the cache.
"""

import torch
from torch import Tensor

from kernels.reference.rope_kv import rope_and_cache


def sink_attention_decode(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    sinks: Tensor,
    position: Tensor,
    out: Tensor,
    *,
    window: int,
    acc: Tensor,
    stats: Tensor,
) -> Tensor:
    """Same arguments and result as the kernel; the scratch buffers stay as they are."""
    kv_heads, slots, width = k_cache.shape
    q = torch.empty_like(out, dtype=k_cache.dtype)[None]
    q = rope_and_cache(qkv[None], *rope, position, k_cache, v_cache, q)[0]
    last = int(position)
    first = max(0, last - window + 1) if window else 0
    slot = torch.arange(first, last + 1, device=q.device) % slots
    heads_per_kv = q.shape[0] // kv_heads
    k_HSC = k_cache[:, slot].float().repeat_interleave(heads_per_kv, 0)
    v_HSC = v_cache[:, slot].float().repeat_interleave(heads_per_kv, 0)
    scores_HS = torch.einsum("hc,hsc->hs", q.float(), k_HSC) * width**-0.5
    with_sink = torch.cat((scores_HS, sinks.float()[:, None]), dim=1).softmax(dim=1)
    return out.copy_(torch.einsum("hs,hsc->hc", with_sink[:, :-1], v_HSC))
