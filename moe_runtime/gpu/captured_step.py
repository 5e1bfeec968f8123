"""What the decode steps of all families have in common: the request's state, and captured graphs;
and what their prefills offer.

A step takes one token in and gives the next one out, without the host. Its buffers are allocated
once, because a captured graph keeps addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from kernels.sampling import SamplingState, make_state


class Prompts(Protocol):
    """Runs prompts through all layers, filling the cache that the decode step goes on with."""

    chunk: int  # tokens that go through the layers at once
    may_pad: bool  # whether tokens behind a prompt leave nothing that a later one could see

    def run(self, token_ids: Tensor) -> Iterator[Tensor]:
        """Run ids [N] int64 from position 0; yields each chunk's residual, one row a token."""
        ...

    def head(self, residual: Tensor, /) -> Tensor:
        """Logits [T, V] of rows of a residual."""
        ...

    def warm_up_lengths(self) -> list[int]:
        """One prompt length for every combination of kernel variants that a prompt can need."""
        ...


class CapturedStep:
    """The kernels of one token, captured as CUDA graphs with and without a cut distribution.

    state:     token, position, step and settings of the request; the last kernel moves it on
    residual:  what a prompt's last token leaves and the head reads, in the family's shape
    logits:    [V] fp32 of the last step
    """

    residual: Tensor
    logits: Tensor

    def __init__(self, vocab_size: int, max_context: int, device: torch.device) -> None:
        self.state: SamplingState = make_state(vocab_size, max_context + 1, device)
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    def capture(self) -> None:
        """Record both graphs (CUDA only); kernels not compiled yet are compiled here."""
        for filtered in (False, True):
            self.step(filtered=filtered)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step(filtered=filtered)
            self._graphs[filtered] = graph

    def replay(self, *, filtered: bool) -> None:
        """Feed state.token at state.position and draw the next: one graph launch on CUDA."""
        graph = self._graphs.get(filtered)
        if graph is None:
            self.step(filtered=filtered)
        else:
            graph.replay()

    def step(self, *, filtered: bool) -> None:
        """Launch the kernels of one token."""
        raise NotImplementedError

    def where_it_stands(self) -> str | None:
        """After an error of the GPU: where in the step it was, if that is watched."""
        return None

    def sample_residual(self, *, filtered: bool) -> None:
        """Logits of the residual, then one draw; moves the request one step on."""
        raise NotImplementedError
