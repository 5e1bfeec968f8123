"""Compiling many kernels at once, on all processors, before any of them is launched.

Triton compiles a kernel when it is launched first, one after the other. Inside compile_ahead every
launch only asks for its kernel, and threads compile: the compiler lets go of the interpreter's
lock, so twice the processors take half the time. Triton's cache on disk keeps what they make.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction

# Triton 3.4 has no such mode, the interpreter has nothing to compile.
_CAN = hasattr(triton, "AsyncCompileMode") and not triton.knobs.runtime.interpret


class Asked:
    """What the launches inside compile_ahead asked for."""

    def __init__(self) -> None:
        self.num_kernels = 0  # set at the end: different ones that were not in this process yet


@contextmanager
def compile_ahead() -> Iterator[Asked]:
    """Inside, launches by this thread compile their kernels and run nothing.

    Tensors must lie on the device that is current; what kernels would write stays as it was. At the
    end everything is compiled. Raises what the compiler raises. In the interpreter, and before
    Triton 3.5, launches run.
    """
    asked = Asked()
    if not _CAN:
        yield asked
        return
    caller = threading.get_ident()
    launch = JITFunction.run

    def ask(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        warmup = warmup or threading.get_ident() == caller
        return launch(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool) as mode:
        JITFunction.run = ask
        try:
            yield asked
        finally:
            JITFunction.run = launch
            asked.num_kernels = len(mode.future_kernels)
