"""Going through a large weight tile by tile: in a CPU's cache, on all its cores, bounded in memory.

On a CPU each core takes whole tiles and runs the operations on them alone. torch's own way, to
split every operation among the cores, makes them wait for each other after each one; beside other
programs that is ten times slower.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

# Weights in a tile. On a CPU its fp32 copies stay near, and an operation takes long enough that
# threads do not spend their time on handing each other the interpreter's lock: with a quarter of it
# two threads are as slow as one. On a GPU it only needs to be enough to fill it.
_CPU_WEIGHTS = 1 << 19
_GPU_WEIGHTS = 1 << 26

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Tile:
    """Whole blocks of one matrix of a stack [n, rows, columns]."""

    matrix: int
    rows: slice
    columns: slice

    def of(self, stack: Tensor, height: int = 1, width: int = 1) -> Tensor:
        """The tile's part of a tensor with one entry for height x width weights."""
        rows = slice(self.rows.start // height, -(-self.rows.stop // height))
        columns = slice(self.columns.start // width, -(-self.columns.stop // width))
        return stack[self.matrix, rows, columns]


def as_matrices(tensor: Tensor) -> Tensor:
    """[..., rows, columns] as [n, rows, columns]; a vector is one row."""
    return tensor.reshape(-1, *(1, *tensor.shape)[-2:])


def tiles_of(stack: Tensor, block: tuple[int, int]) -> list[Tile]:
    """Tiles that cover [n, rows, columns], cut between blocks of (rows, columns) weights.

    Rows are kept whole where a block is one row high.
    """
    n, rows, columns = stack.shape
    height, width = block
    limit = _CPU_WEIGHTS if stack.device.type == "cpu" else _GPU_WEIGHTS
    across = columns if height == 1 else min(columns, max(1, limit // (height * width)) * width)
    down = max(1, limit // max(1, across * height)) * height
    return [
        Tile(i, slice(r, min(r + down, rows)), slice(c, min(c + across, columns)))
        for i in range(n)
        for r in range(0, rows, down)
        for c in range(0, columns, across)
    ]


def for_each(
    items: Iterable[Item], work: Callable[[Item], Result], device: torch.device
) -> list[Result]:
    """The results of work(item), in order; on a CPU several at a time, each on one core."""
    items = list(items)
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(items) < 2:
        return [work(item) for item in items]
    inference = torch.is_inference_mode_enabled()

    def in_worker(item: Item) -> Result:
        with torch.inference_mode(inference):  # modes are a thread's own
            return work(item)

    workers = min(threads, len(items))
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(in_worker, items))
    finally:
        torch.set_num_threads(threads)  # what threads made later start with
