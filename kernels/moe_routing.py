"""Routing of many tokens: top-k, and the order in which a grouped GEMM visits them.

Two launches of fixed sizes: nothing waits for the device, so the largest possible number of row
blocks is planned and those without work end at once. Each program of the first counts the experts
that its tokens chose; each of the second adds up the counts of those in front of it, so every pair
has its place without atomics, and the same logits always give the same order.

T tokens, E experts, K experts per token, M rows in a block, B blocks, P programs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_PER_PROGRAM = 16


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


# A program chooses the experts of BLOCK_T tokens, counts them, and clears its share of the rows.
@triton.jit(do_not_specialize=["tokens", "rows"])
def _choose_kernel(
    logits_ptr,  # [T, E] fp32
    weights_ptr,  # [T, K] fp32, written
    ids_ptr,  # [T, K] int32, written
    counts_ptr,  # [P, E] int32, written
    rows_ptr,  # [B * M] int32, written: T * K everywhere
    tokens,
    rows,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FILL: tl.constexpr,
):
    program = tl.program_id(0)
    t = program * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)[None, :]
    k = tl.arange(0, BLOCK_K)[None, :]
    left = (t < tokens)[:, None] & (e < E)
    logits = tl.load(logits_ptr + t[:, None].to(tl.int64) * E + e, mask=left, other=0.0)
    # NaN (weights that overflow) must not lead to an expert that does not exist.
    logits = tl.where(logits == logits, logits, float("-inf"))
    values = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
    ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for slot in tl.static_range(K):
        best = tl.max(tl.where(left, logits, float("-inf")), axis=1)[:, None]
        index = tl.min(tl.where(left & (logits == best), e, BLOCK_E), axis=1)[:, None]
        values = tl.where(k == slot, best, values)
        ids = tl.where(k == slot, index, ids)
        taken = left & (e == index)
        counts += tl.sum(taken.to(tl.int32), axis=0)
        left = left & (e != index)
    weights = tl.exp(values - tl.max(values, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    place = t[:, None] * K + k
    inside = (t < tokens)[:, None] & (k < K)
    tl.store(weights_ptr + place, weights, mask=inside)
    tl.store(ids_ptr + place, ids, mask=inside)
    expert = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + program * E + expert, counts, mask=expert < E)
    for start in range(program * FILL, rows, tl.num_programs(0) * FILL):
        row = start + tl.arange(0, FILL)
        tl.store(rows_ptr + row, tl.zeros((FILL,), tl.int32) + tokens * K, mask=row < rows)


# A program puts the pairs of the same BLOCK_T tokens into their rows, and names some blocks.
@triton.jit(do_not_specialize=["tokens", "blocks", "M"])
def _place_kernel(
    ids_ptr,  # [T, K] int32
    counts_ptr,  # [P, E] int32
    block_expert_ptr,  # [B] int32, written
    rows_ptr,  # [B * M] int32, written where there is work
    tokens,
    blocks,
    M,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    e = tl.arange(0, BLOCK_E)
    in_front = tl.zeros((BLOCK_E,), tl.int32)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        counts = tl.load(
            counts_ptr + p[:, None] * E + e[None, :],
            mask=(p < programs)[:, None] & (e < E)[None, :],
            other=0,
        )
        total += tl.sum(counts, axis=0)
        in_front += tl.sum(tl.where((p < program)[:, None], counts, 0), axis=0)
    blocks_E = (total + M - 1) // M
    block_ends_E = tl.cumsum(blocks_E, axis=0)
    first_row_E = (block_ends_E - blocks_E) * M + in_front
    i = tl.arange(0, BLOCK_T * BLOCK_K)
    token = program * BLOCK_T + i // BLOCK_K
    pair = token * K + i % BLOCK_K
    real = (token < tokens) & (i % BLOCK_K < K)
    expert = tl.load(ids_ptr + pair, mask=real, other=BLOCK_E)
    same = (expert[:, None] == expert[None, :]) & (i[None, :] < i[:, None])
    of_expert = expert[:, None] == e[None, :]
    row = tl.sum(same.to(tl.int32), axis=1)
    row += tl.sum(tl.where(of_expert, first_row_E[None, :], 0), axis=1)
    tl.store(rows_ptr + row, pair, mask=real)
    for start in range(program * BLOCK_B, blocks, programs * BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        ended = (block_ends_E[None, :] <= b[:, None]) & (e < E)[None, :]
        tl.store(block_expert_ptr + b, tl.sum(ended.to(tl.int32), axis=1), mask=b < blocks)


def most_blocks(pairs: int, experts: int, block_rows: int) -> int:
    """Row blocks that the worst routing needs: every expert's pairs start a new one."""
    return -(-pairs // block_rows) + min(experts, pairs)


def route_tokens(logits_TE: Tensor, experts_per_token: int, block_rows: int) -> Routing:
    """Choose K experts a token (a tie takes the lower id) and group the pairs by expert.

    logits_TE:   [T, E] fp32, contiguous
    block_rows:  M, rows of a block; every expert's pairs start a new block

    Bound by latency: two launches.
    """
    tokens, experts = logits_TE.shape
    assert logits_TE.is_contiguous() and tokens > 0, logits_TE.shape
    blocks = most_blocks(tokens * experts_per_token, experts, block_rows)
    programs = triton.cdiv(tokens, TOKENS_PER_PROGRAM)

    def int32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=logits_TE.device)

    weights = torch.empty((tokens, experts_per_token), device=logits_TE.device)
    ids, counts = int32(tokens, experts_per_token), int32(programs, experts)
    block_expert, rows = int32(blocks), int32(blocks, block_rows)
    sizes = _sizes(experts, experts_per_token)
    _choose_kernel[(programs,)](
        logits_TE, weights, ids, counts, rows, tokens, rows.numel(), **sizes, FILL=1024
    )
    _place(ids, counts, block_expert, rows, sizes)
    return Routing(weights, block_expert, rows)


def route_chosen(ids_TK: Tensor, weights_TK: Tensor, num_experts: int, block_rows: int) -> Routing:
    """Group the pairs of tokens whose experts are already chosen; see route_tokens.

    ids_TK:      [T, K] int32, different ones for each token
    weights_TK:  [T, K] fp32

    Bound by latency: five launches.
    """
    tokens, experts_per_token = ids_TK.shape
    device = ids_TK.device
    blocks = most_blocks(tokens * experts_per_token, num_experts, block_rows)
    programs = triton.cdiv(tokens, TOKENS_PER_PROGRAM)
    counts = torch.zeros((programs, num_experts), dtype=torch.int32, device=device)
    program_T1 = (torch.arange(tokens, device=device) // TOKENS_PER_PROGRAM)[:, None]
    places = (program_T1 * num_experts + ids_TK).flatten()
    counts.view(-1).scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))
    block_expert = torch.empty(blocks, dtype=torch.int32, device=device)
    rows = torch.full(
        (blocks, block_rows), tokens * experts_per_token, dtype=torch.int32, device=device
    )
    _place(ids_TK, counts, block_expert, rows, _sizes(num_experts, experts_per_token))
    return Routing(weights_TK, block_expert, rows)


def _sizes(experts: int, experts_per_token: int) -> dict[str, int]:
    return {
        "E": experts,
        "K": experts_per_token,
        "BLOCK_T": TOKENS_PER_PROGRAM,
        "BLOCK_E": triton.next_power_of_2(experts),
        "BLOCK_K": triton.next_power_of_2(experts_per_token),
    }


def _place(
    ids_TK: Tensor, counts: Tensor, block_expert: Tensor, rows: Tensor, sizes: dict[str, int]
) -> None:
    _place_kernel[(len(counts),)](
        ids_TK,
        counts,
        block_expert,
        rows,
        len(ids_TK),
        *rows.shape,
        **sizes,
        BLOCK_P=16,
        BLOCK_B=16,
        num_warps=8 if sizes["BLOCK_E"] > 256 else 4,  # its tables of experts fill the registers
    )
