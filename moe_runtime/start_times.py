"""How long the parts of opening a model took, from the start of the process on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTS = ("imports", "open", "device", "compile", "weights", "capture")


class StartTimes:
    """Seconds of each of PARTS; weights are read while kernels are compiled, so parts overlap.

    The first, "imports", is what the process did before, which a first model alone can blame on
    the imports.
    """

    def __init__(self) -> None:
        self.seconds = {"imports": process_age_s()}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        assert name in PARTS, name
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin


def process_age_s() -> float:
    """Seconds since this process was started, from the kernel's own figures (Linux); else 0."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return uptime - ticks / os.sysconf("SC_CLK_TCK")
