"""Prompts as CUDA graphs: launching their kernels one by one takes the host longer than they take
the GPU.

A prompt of one chunk is padded to one of a few lengths. What padding leaves in the cache stands
behind the prompt, where nothing looks before it is overwritten. All prompts of up to the largest
length are padded, captured or not: a prompt always runs the same kernels and leaves the same bits.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.gpu.captured_step import Prompts

_SHORT = (4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# From 512 on in steps of at most an eighth: padding takes the GPU as long as tokens do.
LENGTHS = (*_SHORT, *range(576, 1024, 64), *range(1024, 2049, 128))
_SPARE_BYTES = 256 << 20  # of the GPU's memory, that captured graphs leave free


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    residual: Tensor  # that a replay writes


class CapturedPrompts:
    """Prompts of which the second of about the same length is captured, and replayed from then on.

    Where memory for that is short, prompts go on being launched kernel by kernel; a RuntimeWarning
    says so once.
    """

    may_pad = True

    def __init__(self, prompts: Prompts, max_context: int, device: torch.device) -> None:
        self._prompts = prompts
        self.chunk = prompts.chunk
        self._most = min(max_context, prompts.chunk)
        self._ids = torch.zeros(LENGTHS[-1], dtype=torch.int64, device=device)
        self._needed: dict[int, int] = {}  # bytes that a padded length took when it ran first
        self._captured: dict[int, _Captured] = {}
        self._warned = False
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def run(self, token_ids: Tensor) -> Iterator[Tensor]:
        """See Prompts.run; a residual is valid until the next prompt."""
        padded = padded_length(len(token_ids), self._most)
        if padded is None:
            yield from self._prompts.run(token_ids)
            return
        ids = self._ids[:padded]
        ids[: len(token_ids)] = token_ids
        # The last token again: it asks for few experts that the prompt does not.
        ids[len(token_ids) :] = token_ids[-1]
        if padded not in self._captured and self._can_capture(padded):
            self._capture(padded)
        if padded in self._captured:
            captured = self._captured[padded]
            captured.graph.replay()
            residual = captured.residual
        else:
            residual = self._launch(padded)
        yield residual[: len(token_ids)]

    def head(self, residual: Tensor, /) -> Tensor:
        """See Prompts.head."""
        return self._prompts.head(residual)

    def warm_up_lengths(self) -> list[int]:
        """See Prompts.warm_up_lengths."""
        return self._prompts.warm_up_lengths()

    def _launch(self, padded: int) -> Tensor:
        if self._pool is None or padded in self._needed:
            return self._run_ids(padded)
        before = torch.cuda.memory_allocated(self._ids.device)
        torch.cuda.reset_peak_memory_stats(self._ids.device)
        residual = self._run_ids(padded)
        peak = torch.cuda.max_memory_allocated(self._ids.device)
        self._needed[padded] = peak - before
        return residual

    def _run_ids(self, padded: int) -> Tensor:
        (residual,) = self._prompts.run(self._ids[:padded])
        return residual

    def _can_capture(self, padded: int) -> bool:
        if padded not in self._needed:
            return False
        free, _ = torch.cuda.mem_get_info(self._ids.device)
        least = 2 * self._needed[padded] + _SPARE_BYTES
        if free <= least and not self._warned:
            self._warned = True
            warnings.warn(
                f"prompts of {padded} tokens are launched kernel by kernel, which is slower: "
                f"{free >> 20} MB of the GPU's memory are free, a graph of them takes up to "
                f"{least >> 20} MB; a smaller max_context leaves more",
                RuntimeWarning,
                stacklevel=2,
            )
        return free > least

    def _capture(self, padded: int) -> None:
        torch.cuda.synchronize(self._ids.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            residual = self._run_ids(padded)
        self._captured[padded] = _Captured(graph, residual)


def padded_length(tokens: int, most: int) -> int | None:
    """What a prompt of so many tokens is padded to; None if it is too long for that."""
    at = bisect_left(LENGTHS, tokens)
    return LENGTHS[at] if at < len(LENGTHS) and LENGTHS[at] <= most else None
