"""Memory of the host: how much could be had, and whether loading a model's weights fits in it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.errors import DoesNotFitError
from moe_runtime.plan import gb

if TYPE_CHECKING:
    from loaders.names.table import LoadPlan


def free_host_bytes() -> int:
    """What the system could hand out; on Linux without swapping, page cache included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    if found:
        return int(found[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def check_host_memory(plan: LoadPlan) -> None:
    """DoesNotFitError if the weights that are not used where they lie in the files do not fit.

    Experts in tensors of their own are put together in memory; other weights stay in mapped files,
    which the system reads again when it needs the room.
    """
    needed = copied_bytes(plan)
    free = free_host_bytes()
    if needed > free:
        raise DoesNotFitError(
            f"cpu: experts are put together in memory: needs {gb(needed)}, {gb(free)} are free",
            hint="it needs a machine with more memory, or a checkpoint in a smaller format "
            "(moe-runtime convert)",
        )


def copied_bytes(plan: LoadPlan) -> int:
    """Bytes that loading onto the CPU takes besides the mapped files."""
    copied = 0
    for weight in plan.weights:
        if len(weight.pieces) > 1:
            copied += 4 * math.prod(weight.shape)  # decoded to fp32
        else:
            copied += sum(part.nbytes for part in weight.parts if len(part.sources) > 1)
    return copied
