"""Word order: how the columns of an activation stand when MXFP4 words multiply it on tensor cores.

A 32-bit word of published MXFP4 values holds columns 8 j to 8 j + 7 of a row, the lowest in bits
3..0. Shifting and masking yields columns p and p + 4 of all words at once, so within each group of
32 columns the activation is stored in that order: column 8 j + 4 h + p stands at 8 p + 2 j + h.
A group is thus an 8 x 4 matrix (2 j + h, p), transposed.
"""

import torch
from torch import Tensor


def to_word_order(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[..., D] in natural order to [..., D] in word order (D a multiple of 32), cast to dtype."""
    groups = x.unflatten(-1, (-1, 8, 4)).transpose(-1, -2)
    return (
        torch.empty(groups.shape, dtype=dtype or x.dtype, device=x.device)
        .copy_(groups)
        .view(x.shape)
    )


def from_word_order(x: Tensor) -> Tensor:
    """The inverse of to_word_order."""
    return x.unflatten(-1, (-1, 4, 8)).transpose(-1, -2).reshape(x.shape)
