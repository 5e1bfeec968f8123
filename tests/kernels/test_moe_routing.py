"""Routing of many tokens: the kernels and their twin against loops, and against each other."""

import pytest
import torch

from kernels import moe_routing
from kernels.moe_routing import Routing
from kernels.reference import moe_routing as twin

BOTH = pytest.mark.parametrize("route_tokens", [moe_routing.route_tokens, twin.route_tokens])


def check_blocks(routing: Routing, expert_ids_TK: list[list[int]], experts: int) -> None:
    """Every pair stands once, in a block of its expert; blocks are in the order of experts."""
    pairs = routing.expert_weights.numel()
    top_k = routing.expert_weights.shape[1]
    blocks, block_rows = routing.block_rows.shape
    owners = routing.block_expert.tolist()
    assert owners == sorted(owners) and len(owners) == blocks
    seen = []
    for owner, rows in zip(owners, routing.block_rows.tolist(), strict=True):
        working = [row for row in rows if row < pairs]
        assert all(row == pairs for row in rows[len(working) :])
        assert (owner == experts) == (not working)
        assert all(expert_ids_TK[row // top_k][row % top_k] == owner for row in working)
        assert working == sorted(working)
        seen += working
    assert sorted(seen) == list(range(pairs))
    counts = [sum(ids.count(e) for ids in expert_ids_TK) for e in range(experts)]
    assert sum(owner < experts for owner in owners) == sum(-(-c // block_rows) for c in counts)


@BOTH
@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 4, 4), (1, 32, 4), (37, 5, 2), (100, 8, 1), (300, 128, 4)]
)
def test_routing(device, route_tokens, tokens, experts, top_k, block_rows):
    torch.manual_seed(tokens)
    logits = torch.randn(tokens, experts, device=device) * 3
    logits[:, 0] += 2  # uneven
    routing = route_tokens(logits, top_k, block_rows)
    chosen = [sorted(range(experts), key=lambda e: (-row[e], e))[:top_k] for row in logits.tolist()]
    check_blocks(routing, chosen, experts)
    picked = torch.stack([row[ids] for row, ids in zip(logits, chosen, strict=True)])
    weights = picked.exp() / picked.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(routing.expert_weights, weights, rtol=1e-5, atol=1e-7)
    assert routing.expert_weights.dtype == torch.float32
    assert routing.block_rows.dtype == routing.block_expert.dtype == torch.int32


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 4), (37, 5, 2), (100, 64, 6)])
def test_experts_chosen_elsewhere(device, tokens, experts, top_k):
    g = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=g).to(device)
    arguments = ids.to(device, torch.int32), weights, experts, 16
    ours, expected = (m.route_chosen(*arguments) for m in (moe_routing, twin))
    assert torch.equal(ours.block_expert, expected.block_expert)
    assert torch.equal(ours.block_rows, expected.block_rows)
    assert ours.expert_weights is weights


@BOTH
def test_ties_take_the_lower_id(device, route_tokens):
    logits = torch.tensor([[0.0, 1, 0, 1, 1, 0, 0, 1], [2.0] * 8], device=device)
    routing = route_tokens(logits, 4, 16)
    check_blocks(routing, [[1, 3, 4, 7], [0, 1, 2, 3]], 8)
    assert routing.expert_weights.tolist() == [[0.25] * 4] * 2


@BOTH
def test_all_tokens_to_one_expert(device, route_tokens):
    logits = torch.zeros(50, 6, device=device)
    logits[:, 5] = 9.0
    check_blocks(route_tokens(logits, 1, 16), [[5]] * 50, 6)


@BOTH
def test_the_plan_does_not_depend_on_the_logits(device, route_tokens):
    """Sizes are the largest that any routing needs: nothing waits for the device."""
    shapes = {
        route_tokens(torch.randn(64, 8, device=device) * scale, 4, 16).block_rows.shape
        for scale in (0.0, 1.0, 50.0)
    }
    assert shapes == {(16 + 8, 16)}


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "block_rows"),
    [(16, 3, 3, 16), (65, 33, 6, 64), (129, 7, 1, 16), (1100, 128, 4, 128)],
)
def test_the_kernels_agree_with_their_twin(device, tokens, experts, top_k, block_rows):
    torch.manual_seed(tokens)
    logits = (torch.randn(tokens, experts, device=device) * 2).round() / 2  # with ties
    ours, expected = (m.route_tokens(logits, top_k, block_rows) for m in (moe_routing, twin))
    assert torch.equal(ours.block_rows, expected.block_rows)
    assert torch.equal(ours.block_expert, expected.block_expert)
    torch.testing.assert_close(ours.expert_weights, expected.expert_weights, rtol=1e-6, atol=0)


def test_nan_and_infinity_choose_different_experts_that_exist(device):
    logits = torch.full((3, 5), float("nan"), device=device)
    logits[1] = float("-inf")
    logits[2, 3] = 1.0
    rows = moe_routing.route_tokens(logits, 3, 16)
    check_blocks(rows, [[0, 1, 2], [0, 1, 2], [3, 0, 1]], 5)
    assert rows.expert_weights[2].tolist() == [1.0, 0.0, 0.0]
