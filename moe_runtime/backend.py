"""What a backend offers to the generate loop: token ids in, token ids out. No text here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_runtime.plan import MemoryPlan
from moe_runtime.sampling import SamplingParams


@dataclass(frozen=True)
class SampledToken:
    """One new token, with natural-log probabilities under the unmodified logits (temperature 1)."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


class Backend(Protocol):
    """One loaded model on one device with its cache. One sequence at a time."""

    name: str  # "reference" or "triton"
    device: torch.device
    vocab_size: int
    max_context: int  # positions the cache holds: prompt and new tokens together
    plan: MemoryPlan  # bytes by component, as allocated
    read_bandwidth: float | None  # bytes/s measured on the device, None if it was not

    def decode(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        max_new_tokens: int,
        num_logprobs: int = 0,
    ) -> Iterator[SampledToken]:
        """Prefill the prompt, then yield new tokens in order, at most max_new_tokens.

        Nothing is done before the first token is asked for. Work is launched ahead of what the
        caller has read; closing the iterator ends it and leaves the backend usable. Stop tokens
        are the caller's business: the iterator goes on past them.
        """
        ...

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Teacher-forced logits [T, V] fp32 on the CPU: row t predicts token t + 1."""
        ...

    def close(self) -> None:
        """Free device memory; the backend cannot be used again."""
        ...
