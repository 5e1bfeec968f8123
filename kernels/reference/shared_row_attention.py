"""Plain-torch twin of kernels/shared_row_attention.py, in fp32."""

import torch
from torch import Tensor


def shared_row_attention_decode(
    query: Tensor,
    rows: Tensor,
    position: Tensor,
    sinks: Tensor,
    out: Tensor,
    *,
    window: int,
    ratio: int,
    acc: Tensor,
    stats: Tensor,
    chosen: Tensor | None = None,
) -> Tensor:
    """Same arguments and result as the kernels; the scratch is not used."""
    seen = int(position) + 1
    finished = seen // ratio if ratio else 0
    far = torch.arange(finished, device=rows.device) if chosen is None else chosen[:finished].long()
    near = rows[: min(seen, window)]
    kept = torch.cat((near, rows[window + far])).float()
    scores = query.float() @ kept.T * query.shape[1] ** -0.5
    weights = torch.cat((scores, sinks.float()[:, None]), dim=1).softmax(dim=1)
    return out.copy_(weights[:, :-1] @ kept)
