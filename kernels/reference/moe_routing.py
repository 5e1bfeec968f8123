"""Plain-torch twin of kernels/moe_routing.py.

T tokens, E experts, K experts per token, M rows in a block, B blocks.
"""

import torch
from torch import Tensor

from kernels.moe_routing import Routing, most_blocks


def route_tokens(logits_TE: Tensor, experts_per_token: int, block_rows: int) -> Routing:
    """Same arguments and result as the kernels."""
    ordered = logits_TE.sort(dim=-1, descending=True, stable=True)
    weights_TK = ordered.values[:, :experts_per_token].softmax(-1)
    ids_TK = ordered.indices[:, :experts_per_token].to(torch.int32)
    return route_chosen(ids_TK, weights_TK, logits_TE.shape[1], block_rows)


def route_chosen(ids_TK: Tensor, weights_TK: Tensor, num_experts: int, block_rows: int) -> Routing:
    """Same arguments and result as the kernel."""
    pairs, experts, device = ids_TK.numel(), num_experts, ids_TK.device
    pair_expert = ids_TK.flatten().long()
    order = pair_expert.sort(stable=True)
    counts_E = (pair_expert[:, None] == torch.arange(experts, device=device)).sum(0)
    blocks_E = (counts_E + block_rows - 1) // block_rows
    block_ends_E = blocks_E.cumsum(0)
    num_blocks = most_blocks(pairs, experts, block_rows)
    block_expert = torch.searchsorted(
        block_ends_E, torch.arange(num_blocks, device=device), right=True
    )
    first_pair_E = counts_E.cumsum(0) - counts_E
    first_row_E = (block_ends_E - blocks_E) * block_rows
    shift = (first_row_E - first_pair_E)[order.values]
    rows = torch.full((num_blocks * block_rows,), pairs, dtype=torch.int32, device=device)
    rows[torch.arange(pairs, device=device) + shift] = order.indices.to(torch.int32)
    return Routing(weights_TK, block_expert.to(torch.int32), rows.view(num_blocks, block_rows))
