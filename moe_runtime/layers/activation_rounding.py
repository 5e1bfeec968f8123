"""The rounding of activations in the vendor's code of DeepSeek V3 and V4: E4M3 with a scale for 128
columns, for V4's cached rows for 64; E2M1 with a scale for 32 in V4's indexer.

Off by default: activations in fp32 are nearer to what the weights mean. It is for comparisons with
the vendor's code, which multiplies in FP8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant import mxfp4

_BLOCK = 128
_GROUP = 32  # of E2M1
_LARGEST = 448.0  # E4M3


def rounded_to_e4m3(x: Tensor, *, powers_of_two: bool, block: int = _BLOCK) -> Tensor:
    """[.., K] fp32 as it is after E4M3 and back; K is padded to a multiple of the block.

    powers_of_two: scales are raised to the next one (scale_fmt ue8m0)
    block:         columns that share a scale
    """
    columns = x.shape[-1]
    blocks = pad(x, (0, -columns % block)).unflatten(-1, (-1, block))
    scales = blocks.abs().amax(-1, keepdim=True) / _LARGEST
    if powers_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    scales = torch.where(scales > 0, scales, 1.0)
    codes = (blocks / scales).to(torch.float8_e4m3fn)
    return (codes.float() * scales).flatten(-2)[..., :columns]


def rounded_to_e2m1(x: Tensor) -> Tensor:
    """[.., K] fp32 as it is after E2M1 and back, a power of two for 32 columns; K is padded."""
    if not x.numel():
        return x
    columns = x.shape[-1]
    rows = pad(x, (0, -columns % _GROUP)).flatten(0, -2)
    rounded = mxfp4.decode(mxfp4.encode(rows, "rceil"))[:, :columns]
    return rounded.view(x.shape)


def hadamard(width: int, device: torch.device) -> Tensor:
    """The orthogonal Hadamard matrix [width, width]; width is a power of two (ValueError)."""
    if width & (width - 1):
        raise ValueError(f"a Hadamard matrix needs a power of two, got {width}")
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < width:
        top = torch.cat((matrix, matrix), dim=1)
        matrix = torch.cat((top, torch.cat((matrix, -matrix), dim=1)))
    return matrix / math.sqrt(width)
