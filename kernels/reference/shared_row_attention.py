"""Plain-torch twins of kernels/shared_row_attention.py, in fp32."""

import torch
from torch import Tensor

from kernels.reference.shared_rows import turned


def shared_row_attention_decode(
    query: Tensor,
    rows: Tensor,
    position: Tensor,
    sinks: Tensor,
    rope: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    slots: int,
    window: int,
    ratio: int,
    acc: Tensor,
    stats: Tensor,
    chosen: Tensor | None = None,
) -> Tensor:
    """Same arguments and result as the kernels; the scratch is not used."""
    at = int(position)
    near = torch.arange(max(0, at + 1 - window), at + 1, device=rows.device) % slots
    finished = (at + 1) // ratio if ratio else 0
    far = torch.arange(finished, device=rows.device) if chosen is None else chosen[:finished].long()
    kept = torch.cat((rows[near], rows[slots + far])).float()
    scores = query.float() @ kept.T * query.shape[1] ** -0.5
    weights = torch.cat((scores, sinks.float()[:, None]), dim=1).softmax(dim=1)
    cos, sin = (table[at] for table in rope)
    return out.copy_(turned(weights[:, :-1] @ kept, cos, -sin))


def shared_row_attention_prefill(
    query: Tensor,
    rows: Tensor,
    position: Tensor,
    sinks: Tensor,
    rope: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    slots: int,
    window: int,
    ratio: int,
    chosen: Tensor | None = None,
) -> Tensor:
    """Same arguments and result as the kernel."""
    for t, q in enumerate(query):
        mine = None if chosen is None else chosen[t]
        shared_row_attention_decode(
            q, rows, position + t, sinks, rope, out[t], slots=slots, window=window, ratio=ratio,
            acc=q, stats=q, chosen=mine,
        )  # fmt: skip
    return out
