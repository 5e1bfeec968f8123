"""When the programs of launched kernels started, had waited and ended, by the GPU's clock.

Kernels that take a `trace` write three times for each program (kernels/dependent_launch.stamp), a
kernel of several parts three for each part.
Inside trace_launches every launch of such a kernel is given a tensor for them, so the code that
launches knows nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer
from triton.runtime.jit import JITFunction

_TRACE = "trace_ptr"  # the parameter of kernels that write times


@dataclass(frozen=True)
class TracedLaunch:
    """One launch of a kernel that writes times."""

    kernel: str
    operands: frozenset[int]  # addresses of its tensors
    parts: tuple[str, ...]  # what the kernel does one after the other; empty: one thing
    stamps: Tensor  # [programs, parts or 1, 3] int64 ns: start, after the wait, end; 0: not there


_parts_of: dict[str, Callable[..., tuple[str, ...]]] = {}  # of kernels that do several things


def traced_parts(kernel: JITFunction) -> Callable[[Callable], Callable]:
    """A decorator: the function says of a launch's keyword arguments what its parts are for."""

    def register(parts: Callable[..., tuple[str, ...]]) -> Callable[..., tuple[str, ...]]:
        _parts_of[kernel.fn.__name__] = parts
        return parts

    return register


@contextmanager
def trace_launches(again: Sequence[TracedLaunch] = ()) -> Iterator[list[TracedLaunch]]:
    """Collect every traced launch inside, in order.

    again: of a run before with the same launches, whose tensors are used again: a graph that is
           captured then holds no allocation and no clearing
    """
    launch = JITFunction.run
    found: list[TracedLaunch] = []

    def traced(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        place = kernel.arg_names.index(_TRACE) if _TRACE in kernel.arg_names else len(args)
        if place < len(args) and args[place] is None:
            tensors = [value for value in args if isinstance(value, Tensor)]
            names = _parts_of.get(kernel.fn.__name__, lambda **_: ())(**kwargs)
            shape = (math.prod(grid), max(1, len(names)), 3)
            if again:
                stamps = again[len(found)].stamps
                assert stamps.shape == shape, kernel.fn.__name__
            else:
                stamps = torch.zeros(shape, dtype=torch.int64, device=tensors[0].device)
            addresses = frozenset(tensor.data_ptr() for tensor in tensors)
            found.append(TracedLaunch(kernel.fn.__name__, addresses, names, stamps))
            args = (*args[:place], stamps, *args[place + 1 :])
        return launch(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    JITFunction.run = traced
    try:
        yield found
    finally:
        JITFunction.run = launch


# One program writes the time. Grid: 1.
@triton.jit
def _mark_kernel(out_ptr):
    tl.store(out_ptr, globaltimer())


def mark_time(out: Tensor) -> None:
    """out [] int64 = the time in ns, once all that was launched before has ended."""
    _mark_kernel[(1,)](out, num_warps=1)
