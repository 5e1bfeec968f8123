"""Plain-torch twin of kernels/router_topk.py."""

import torch
from torch import Tensor

from kernels.packed_vector import PackedVectors, store_vector
from kernels.reference.rms_norm import rms_norm


def router_topk(
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    bias: Tensor,
    *,
    eps: float,
    logits: Tensor,
    ticket: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    packed: PackedVectors,
) -> None:
    """Same arguments and results as the kernel; the ticket stays as it is."""
    y = rms_norm(x[None], norm.float(), eps)[0]
    logits.copy_(router.float() @ y + bias.float())
    ordered = logits.sort(descending=True, stable=True)
    expert_ids.copy_(ordered.indices[: len(expert_ids)])
    expert_weights.copy_(ordered.values[: len(expert_ids)].softmax(0))
    exponent = torch.frexp(y.abs().amax().clamp(min=1e-30)).exponent - 1
    store_vector(packed, 0, y, 2.0 ** (int(exponent) - 14))
