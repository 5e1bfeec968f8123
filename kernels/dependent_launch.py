"""Launches that may begin before the kernel in front has ended (programmatic dependent launch).

A kernel launched with `early_start(...)` starts as soon as every program of the kernel in front has
called `let_next_start` or ended. Before `wait_for_front` it may read weights, which nothing writes;
after it, all that the kernel in front wrote is there. Every program must call `wait_for_front`, so
that a kernel's end means that all before it have ended.

If each program of the kernel in front calls `let_next_start` after its own wait, then whatever
came before that kernel is also complete, and may be read before the wait.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

_HOPPER = (9, 0)


def early_start(tensor: Tensor) -> dict[str, bool]:
    """Keyword arguments of a launch on the tensor's device: EARLY for the kernel, and launch_pdl.

    False on GPUs before Hopper and in the interpreter, which start it after the one in front.
    """
    early = tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= _HOPPER
    return {"EARLY": early, "launch_pdl": early} if early else {"EARLY": False}


@triton.jit
def wait_for_front(EARLY: tl.constexpr):
    """Until all that the kernels in front wrote can be read."""
    if EARLY:
        gdc_wait()


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """The kernel behind may start, once all programs have said so."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def stamp(trace_ptr, which: tl.constexpr):
    """Write the time in ns to trace [programs, 3]: 0 at the start, 1 after the wait, 2 at the end.

    Nothing if trace_ptr is None, as it is in every build but that of the time line.
    """
    if trace_ptr is not None:
        program = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
        tl.store(trace_ptr + program * 3 + which, globaltimer())
