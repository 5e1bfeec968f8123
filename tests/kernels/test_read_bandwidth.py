"""The streaming read kernel reads every word, and the measurement is of the right size."""

import time

import pytest
import torch

from kernels import read_bandwidth as kernel
from kernels.reference import read_bandwidth as twin


@pytest.mark.parametrize("blocks", [1, 3])
def test_sums_every_word(device, blocks):
    generator = torch.Generator().manual_seed(blocks)
    shape = (blocks * kernel.BLOCK,)
    words = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).to(device)
    assert kernel.BLOCK == twin.BLOCK
    assert torch.equal(kernel.block_sums(words), twin.block_sums(words))
    words[-1] += 1  # the last word counts too
    assert torch.equal(kernel.block_sums(words), twin.block_sums(words))


def test_measures_the_cpu():
    result = kernel.read_bandwidth("cpu", buffer_bytes=1 << 26)
    words = torch.ones(1 << 24)
    words.sum()
    start = time.perf_counter()
    for _ in range(5):
        words.sum()
    here = 5 * (1 << 26) / (time.perf_counter() - start) / 1e9
    assert here / 5 < result.gbps < here * 5, "bytes and seconds are mixed up"
    assert result.gbps <= result.best_gbps
    assert result.buffer_bytes == 1 << 26
