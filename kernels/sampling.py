"""Drawing a token on the device: penalty, temperature, cut, Gumbel arg max, log probability.

The noise of token v at step t is Philox4x32-10 with key `seed` and counter (v, t, 0, 0): the same
on every device and in any order of work. See kernels/reference/sampling.py for the plain form.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.sampling import cut_threshold

BLOCK_V = 2048  # tokens a program looks at
NO_CUT = float("-inf")


@dataclass(frozen=True)
class SamplingState:
    """Device buffers of one request; every field is written in place, addresses never change."""

    settings: Tensor  # [5] fp32: temperature, repetition penalty, top_k, top_p, min_p
    seed: Tensor  # [1] int64
    step: Tensor  # [1] int32: tokens sampled so far
    position: Tensor  # [1] int32: position of the token that is fed next
    token: Tensor  # [1] int32: the token that is fed next
    seen: Tensor  # [V] uint8: 1 for tokens in the prompt or sampled
    history: Tensor  # [N] int32: sampled tokens by step
    logprobs: Tensor  # [N] fp32: their log probabilities under the plain logits
    threshold: Tensor  # [1] fp32: adjusted logits below it are cut
    partial: Tensor  # [P, 4] fp32 scratch: best score, its token's logit, maximum, sum of exp
    partial_token: Tensor  # [P] int32 scratch


def make_state(vocab_size: int, max_steps: int, device: torch.device) -> SamplingState:
    """Allocate the buffers for a vocabulary and the longest request."""
    programs = triton.cdiv(vocab_size, BLOCK_V)

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return SamplingState(
        settings=zeros(5, dtype=torch.float32),
        seed=zeros(1, dtype=torch.int64),
        step=zeros(1, dtype=torch.int32),
        position=zeros(1, dtype=torch.int32),
        token=zeros(1, dtype=torch.int32),
        seen=zeros(vocab_size, dtype=torch.uint8),
        history=zeros(max_steps, dtype=torch.int32),
        logprobs=zeros(max_steps, dtype=torch.float32),
        threshold=torch.full((1,), NO_CUT, device=device),
        partial=zeros(programs, 4, dtype=torch.float32),
        partial_token=zeros(programs, dtype=torch.int32),
    )


@triton.jit
def _adjust(logits, seen, penalty, temperature):
    """Repetition penalty, then temperature; greedy (temperature 0) divides by 1."""
    penalised = tl.where(logits > 0, logits / penalty, logits * penalty)
    logits = tl.where(seen != 0, penalised, logits)
    return logits / tl.where(temperature > 0, temperature, 1.0)


# A program finds the best token of BLOCK_V; grid: V / BLOCK_V.
@triton.jit
def _best_of_block_kernel(
    logits_ptr,
    seen_ptr,
    settings_ptr,
    seed_ptr,
    step_ptr,
    threshold_ptr,
    partial_ptr,
    partial_token_ptr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    program = tl.program_id(0)
    v = program * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = v < V
    temperature = tl.load(settings_ptr)
    logits = tl.load(logits_ptr + v, mask=inside, other=float("-inf"))
    seen = tl.load(seen_ptr + v, mask=inside, other=0)
    scores = _adjust(logits, seen, tl.load(settings_ptr + 1), temperature)
    scores = tl.where(scores >= tl.load(threshold_ptr), scores, float("-inf"))
    if temperature > 0:
        zero = v * 0
        word, _, _, _ = tl.philox(
            tl.load(seed_ptr), v.to(tl.uint32), zero + tl.load(step_ptr), zero, zero
        )
        uniform = ((word >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
        scores += -tl.log(-tl.log(uniform))
    # NaN (weights that overflow) must not lead to a token that does not exist.
    scores = tl.where(inside & (scores == scores), scores, float("-inf"))
    best, index = tl.max(scores, axis=0, return_indices=True)
    peak = tl.max(logits, axis=0)
    total = tl.sum(tl.where(inside, tl.exp(logits - peak), 0.0), axis=0)
    chosen = tl.sum(tl.where(tl.arange(0, BLOCK_V) == index, logits, 0.0), axis=0)
    tl.store(partial_ptr + program * 4, best)
    tl.store(partial_ptr + program * 4 + 1, chosen)
    tl.store(partial_ptr + program * 4 + 2, peak)
    tl.store(partial_ptr + program * 4 + 3, total)
    tl.store(partial_token_ptr + program, program * BLOCK_V + index)


# One program picks among the blocks and moves the request one step on.
@triton.jit
def _pick_kernel(
    partial_ptr,
    partial_token_ptr,
    seen_ptr,
    step_ptr,
    position_ptr,
    token_ptr,
    history_ptr,
    logprobs_ptr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    p = tl.arange(0, BLOCK_P)
    inside = p < P
    scores = tl.load(partial_ptr + p * 4, mask=inside, other=float("-inf"))
    _, index = tl.max(scores, axis=0, return_indices=True)
    peaks = tl.load(partial_ptr + p * 4 + 2, mask=inside, other=float("-inf"))
    sums = tl.load(partial_ptr + p * 4 + 3, mask=inside, other=0.0)
    peak = tl.max(peaks, axis=0)
    log_total = peak + tl.log(tl.sum(sums * tl.exp(peaks - peak), axis=0))
    token = tl.load(partial_token_ptr + index)
    step = tl.load(step_ptr)
    tl.store(history_ptr + step, token)
    tl.store(logprobs_ptr + step, tl.load(partial_ptr + index * 4 + 1) - log_total)
    tl.store(seen_ptr + token, 1)
    tl.store(token_ptr, token)
    tl.store(step_ptr, step + 1)
    tl.store(position_ptr, tl.load(position_ptr) + 1)


def sample(logits: Tensor, state: SamplingState, *, filtered: bool) -> None:
    """Draw one token and move the request one step on, all on the device.

    logits:    [V] fp32
    state:     reads settings, seed, step, seen; writes token, history[step], logprobs[step],
               seen[token]; adds one to step and position
    filtered:  whether top-k, top-p or min-p may cut: sorts the vocabulary (about 0.1 ms for
               200,000 tokens); without it state.threshold must be NO_CUT
    """
    vocab_size = len(logits)
    if filtered:
        state.threshold.copy_(cut_threshold(logits, state.seen, state.settings))
    programs = triton.cdiv(vocab_size, BLOCK_V)
    _best_of_block_kernel[(programs,)](
        logits,
        state.seen,
        state.settings,
        state.seed,
        state.step,
        state.threshold,
        state.partial,
        state.partial_token,
        V=vocab_size,
        BLOCK_V=BLOCK_V,
        num_warps=8,
    )
    _pick_kernel[(1,)](
        state.partial,
        state.partial_token,
        state.seen,
        state.step,
        state.position,
        state.token,
        state.history,
        state.logprobs,
        P=programs,
        BLOCK_P=triton.next_power_of_2(programs),
        num_warps=4,
    )
