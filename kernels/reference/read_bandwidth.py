"""Plain-torch twin of kernels/read_bandwidth.py."""

from torch import Tensor

BLOCK = 8192


def block_sums(words: Tensor) -> Tensor:
    """Sum of each BLOCK of words, modulo 2^32. [N] int32 -> [N / BLOCK] int32."""
    return words.view(-1, BLOCK).long().sum(dim=1).int()
