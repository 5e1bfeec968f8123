"""The reference backend: plain torch in fp32, on any device. Slow, and the numbers to trust."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.reference import sampling as draw
from moe_runtime.backend import SampledToken
from moe_runtime.models.reference_model import ReferenceModel
from moe_runtime.plan import PREFILL_CHUNK, MemoryPlan
from moe_runtime.sampling import SamplingParams

_LOGITS_CHUNK = 256  # rows of logits computed at once
_ONE_THREAD_BYTES = 64 << 20  # of weights, below which a step runs on one thread


class ReferenceBackend:
    """A Backend (see moe_runtime/backend.py) over a reference model."""

    name = "reference"
    read_bandwidth: float | None = None

    def __init__(self, model: ReferenceModel, plan: MemoryPlan) -> None:
        self.model = model
        self.plan = plan
        self.device = model.device
        self.vocab_size = model.config.vocab_size
        self.max_context = plan.max_context

    def decode(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        max_new_tokens: int,
        num_logprobs: int = 0,
    ) -> Iterator[SampledToken]:
        """See Backend.decode."""
        device = self.device
        self.model.reset()
        settings = sampling_settings(sampling).to(device)
        seed = torch.tensor([signed64(sampling.seed)], device=device)
        seen = torch.zeros(self.vocab_size, dtype=torch.uint8, device=device)
        seen[torch.tensor(list(prompt_ids), device=device)] = 1
        logits = self.model.head(self._prefill(prompt_ids)[-1:])[0]
        for step in range(max_new_tokens):
            step_number = torch.tensor([step], device=device)
            with self._threads_of_a_step():
                token, logprob = draw.sample(logits, seen, settings, seed, step_number)
            seen[token] = 1
            yield SampledToken(token, logprob, top_logprobs(logits, num_logprobs))
            if step + 1 < max_new_tokens:
                with self._threads_of_a_step():
                    logits = self.model.head(self.model.forward(torch.tensor([token])))[0]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """See Backend.logits."""
        self.model.reset()
        x_TD = self._prefill(token_ids)
        return torch.cat([self.model.head(rows).cpu() for rows in x_TD.split(_LOGITS_CHUNK)])

    def close(self) -> None:
        """See Backend.close."""
        self.model.close()

    @contextmanager
    def _threads_of_a_step(self) -> Iterator[None]:
        """One thread for a small model: its operations are shorter than the wake-up of a second
        thread, by far when other programs use the cores."""
        threads = torch.get_num_threads()
        if self.plan.total_weight_bytes < _ONE_THREAD_BYTES:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _prefill(self, token_ids: Sequence[int]) -> Tensor:
        chunks = torch.tensor(list(token_ids)).split(PREFILL_CHUNK)
        return torch.cat([self.model.forward(chunk) for chunk in chunks])


def sampling_settings(sampling: SamplingParams) -> Tensor:
    """The five numbers that the sampling kernels read, [5] fp32."""
    s = sampling
    return torch.tensor([s.temperature, s.repetition_penalty, s.top_k, s.top_p, s.min_p])


def signed64(seed: int) -> int:
    """The 64 bits of an unsigned seed as torch's signed int64."""
    return seed - 2**64 if seed >= 2**63 else seed


def top_logprobs(logits: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most probable tokens of logits [V] with their log probabilities."""
    if count == 0:
        return ()
    best = logits.log_softmax(0).topk(count)
    return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
