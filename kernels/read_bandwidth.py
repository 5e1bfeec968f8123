"""How fast this device reads its memory: the denominator of every share of bandwidth we report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # words a program reads
_GPU_BUFFER_BYTES = 1 << 30  # far beyond any L2
_CPU_BUFFER_BYTES = 1 << 28
_SMALLEST_BUFFER_BYTES = 1 << 26
_WARMUPS = 3
_REPEATS = 11


@dataclass(frozen=True)
class ReadBandwidth:
    """A measured read rate and how it was measured."""

    gbps: float  # 10^9 bytes a second, median
    best_gbps: float
    buffer_bytes: int
    repeats: int
    method: str


# A program sums BLOCK words, wrapping. Grid: words / BLOCK.
@triton.jit
def _block_sums_kernel(words_ptr, sums_ptr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    words = tl.load(words_ptr + block * BLOCK + tl.arange(0, BLOCK))  # [BLOCK]
    tl.store(sums_ptr + block, tl.sum(words, axis=0))


def block_sums(words: Tensor) -> Tensor:
    """Sum of each BLOCK of words, modulo 2^32.

    words:   [N] int32, N a multiple of BLOCK
    returns  [N / BLOCK] int32

    Reads 4 * N bytes and writes 1 / BLOCK of that: nothing but reading takes time.
    """
    sums = torch.empty(words.numel() // BLOCK, dtype=torch.int32, device=words.device)
    _block_sums_kernel[(sums.numel(),)](words, sums, BLOCK=BLOCK, num_warps=8)
    return sums


def read_bandwidth(device: torch.device | str, *, buffer_bytes: int | None = None) -> ReadBandwidth:
    """Measure the read bandwidth of a device.

    buffer_bytes:  size of what is read; default 1 GiB on CUDA (less if less is free), 256 MiB else
    Raises RuntimeError when the device has no room for the smallest buffer.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _read_bandwidth_cuda(device, buffer_bytes)
    words = torch.ones((buffer_bytes or _CPU_BUFFER_BYTES) // 4, device=device)
    method = f"torch.sum, {torch.get_num_threads()} threads"
    return _summary(words, _wall_times(lambda: words.sum()), method)


def _read_bandwidth_cuda(device: torch.device, buffer_bytes: int | None) -> ReadBandwidth:
    if buffer_bytes is None:
        free = torch.cuda.mem_get_info(device)[0]
        buffer_bytes = max(_SMALLEST_BUFFER_BYTES, min(_GPU_BUFFER_BYTES, free // 2))
    with torch.cuda.device(device):
        words = torch.ones(
            triton.cdiv(buffer_bytes, 4 * BLOCK) * BLOCK, dtype=torch.int32, device=device
        )
        if int(block_sums(words).sum()) != words.numel():
            raise RuntimeError("the read kernel returned a wrong sum")
        return _summary(words, _event_times(lambda: block_sums(words)), "Triton streaming read")


def _event_times(launch: Callable[[], Tensor]) -> list[float]:
    """Seconds of each launch on the current CUDA device."""
    marks = []
    for _ in range(_WARMUPS + _REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks[_WARMUPS:]]


def _wall_times(run: Callable[[], Tensor]) -> list[float]:
    times = []
    for _ in range(_WARMUPS + _REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[_WARMUPS:]


def _summary(words: Tensor, seconds: list[float], method: str) -> ReadBandwidth:
    size = words.numel() * words.element_size()
    return ReadBandwidth(
        gbps=size / statistics.median(seconds) / 1e9,
        best_gbps=size / min(seconds) / 1e9,
        buffer_bytes=size,
        repeats=len(seconds),
        method=method,
    )
