"""Routing of many tokens: top-k, and the order in which a grouped GEMM visits them.

Plain torch operations of fixed sizes: nothing waits for the device, so the largest possible number
of row blocks is planned and those without work end at once.

T tokens, E experts, K experts per token, M rows in a block, B blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which (token, slot) pairs each row block computes, and with which expert.

    expert_weights:  [T, K] fp32, softmax over the chosen logits
    block_expert:    [B] int32; E for a block without work
    block_rows:      [B, M] int32: token * K + slot, or T * K for a row without work
    """

    expert_weights: Tensor
    block_expert: Tensor
    block_rows: Tensor


def route_tokens(logits_TE: Tensor, experts_per_token: int, block_rows: int) -> Routing:
    """Choose K experts a token (a tie takes the lower id) and group the pairs by expert.

    logits_TE:   [T, E] fp32
    block_rows:  M, rows of a block; every expert's pairs start a new block
    """
    tokens, experts = logits_TE.shape
    pairs = tokens * experts_per_token
    device = logits_TE.device
    ordered = logits_TE.sort(dim=-1, descending=True, stable=True)
    weights_TK = ordered.values[:, :experts_per_token].softmax(-1)
    pair_expert = ordered.indices[:, :experts_per_token].flatten()
    order = pair_expert.sort(stable=True)
    counts_E = (pair_expert[:, None] == torch.arange(experts, device=device)).sum(0)
    blocks_E = (counts_E + block_rows - 1) // block_rows
    block_ends_E = blocks_E.cumsum(0)
    num_blocks = -(-pairs // block_rows) + min(experts, pairs)
    block_expert = torch.searchsorted(
        block_ends_E, torch.arange(num_blocks, device=device), right=True
    )
    first_pair_E = counts_E.cumsum(0) - counts_E
    first_row_E = (block_ends_E - blocks_E) * block_rows
    shift = (first_row_E - first_pair_E)[order.values]
    rows = torch.full((num_blocks * block_rows,), pairs, dtype=torch.int32, device=device)
    rows[torch.arange(pairs, device=device) + shift] = order.indices.to(torch.int32)
    return Routing(weights_TK, block_expert.to(torch.int32), rows.view(num_blocks, block_rows))
