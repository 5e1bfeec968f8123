"""Going through a large weight a few rows at a time: fast in a CPU's cache, bounded in memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Weights in hand at once. On a CPU the fp32 copies of them stay in the second-level cache; on a
# GPU they only need to be enough to fill it.
_CPU_WEIGHTS = 1 << 18
_GPU_WEIGHTS = 1 << 26


def as_matrices(tensor: Tensor) -> Tensor:
    """[..., rows, columns] as [n, rows, columns]; a vector is one row."""
    return tensor.reshape(-1, *(1, *tensor.shape)[-2:])


def row_chunks(
    rows: int, columns: int, multiple: int, device: torch.device
) -> Iterator[tuple[int, int]]:
    """(start, stop) that cover the rows of a matrix, each start a multiple of `multiple`."""
    wanted = _CPU_WEIGHTS if device.type == "cpu" else _GPU_WEIGHTS
    step = max(1, wanted // max(1, columns * multiple)) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
