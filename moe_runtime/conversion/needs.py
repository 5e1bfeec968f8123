"""What a conversion takes of the machine: threads, memory and disk. `plan` asks here too."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from moe_runtime.conversion.work import CHUNK_WEIGHTS

if TYPE_CHECKING:
    from moe_runtime.conversion.planning import Output, Task
    from moe_runtime.conversion.source import Source

RESERVE_BYTES = 64 << 20  # of disk: headers, report, tokenizer, journal
# Memory stays below MOST_MEMORY_BYTES and LARGEST_TENSORS times the largest tensor of the source.
MOST_MEMORY_BYTES = 2_000_000_000
LARGEST_TENSORS = 3
_BASE_MEMORY_BYTES = 400 << 20  # Python and torch
_BYTES_A_WEIGHT = 24  # in hand: source, fp32, codes, their decoded form


def num_threads(outputs: Sequence[Output]) -> int:
    """One a core, as long as memory allows."""
    largest = max((output.source.nbytes for output in outputs), default=0)
    room = MOST_MEMORY_BYTES + LARGEST_TENSORS * largest - _BASE_MEMORY_BYTES
    fit = room // (_BYTES_A_WEIGHT * _weights_in_hand(outputs))
    return max(1, min(os.cpu_count() or 1, fit))


def memory_bytes(outputs: Sequence[Output]) -> int:
    """At most what a conversion takes of memory."""
    in_hand = num_threads(outputs) * _weights_in_hand(outputs)
    return _BASE_MEMORY_BYTES + in_hand * _BYTES_A_WEIGHT


def disk_bytes(output_bytes: int, source_bytes: int) -> int:
    """Free disk for a result and the fetched files of the source that are held at once."""
    return output_bytes + source_bytes + RESERVE_BYTES


def most_held_bytes(tasks: Iterable[Task], source: Source) -> int:
    """The largest sum of fetched files: those whose weights reach over two are held together."""
    if not source.remote:
        return 0
    tasks = list(tasks)
    last_use = {file: number for number, task in enumerate(tasks) for file in task.files}
    held: set[str] = set()
    most = 0
    for number, task in enumerate(tasks):
        if not task.files <= held:
            held = {file for file in held if last_use[file] >= number} | task.files
            most = max(most, sum(source.size(file) for file in held))
    return most


def _weights_in_hand(outputs: Iterable[Output]) -> int:
    """Of one thread: some rows, or a whole matrix where it is written the other way round."""
    whole = (
        output.source.shape[-1] * output.source.shape[-2]
        for output in outputs
        if output.format is not None and (output.transposed or output.source.transposed)
    )
    return max((CHUNK_WEIGHTS, *whole))
