"""Projections with weights in the form that they are stored in: of one token by our kernels, of
prompts by torch's matrix products.

For prompts a weight in FP8 blocks is decoded at each use into a buffer that all share, rounded to
the dtype of the activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from kernels.decode_blocks import decode_blocks
from kernels.gemv import gemv
from kernels.swiglu import Swiglu
from moe_runtime.gpu.deepseek_weights import GatedExperts, Matrix
from quant.codecs import decode
from quant.tensor import QuantTensor


def project_token(
    x: Tensor, weights: Sequence[Matrix], out: Tensor, norm: Tensor, eps: float
) -> None:
    """Projections of the same normed vector, one after the other in `out`."""
    first = 0
    for weight in weights:
        rows = weight.shape[0]
        gemv(x, weight, out[first : first + rows], norm=norm, eps=eps)
        first += rows


class PromptProjections:
    """Matrix products of many tokens.

    dtype:    of the activations
    weights:  all that `plain` will be given
    """

    def __init__(self, dtype: torch.dtype, weights: Iterable[Matrix], device: torch.device) -> None:
        self.dtype = dtype
        sizes = [math.prod(w.shape) for w in weights if isinstance(w, QuantTensor)]
        self._decoded = torch.empty(max(sizes, default=0), dtype=dtype, device=device)

    def project(self, x: Tensor, weights: Sequence[Matrix]) -> Tensor:
        """x [T, K] times weights that stand under each other."""
        parts = [linear(x, self.plain(weight)) for weight in weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def add_gated(self, experts: GatedExperts, x: Tensor, out: Tensor, activation: Swiglu) -> None:
        """out [T, D] += what all experts of a stack make of x [T, D]."""
        width, limit = experts.width, activation.limit
        for expert in range(experts.gate_up.shape[0]):
            gate_up = experts.gate_up[expert]
            gate = linear(x, self.plain(rows_of(gate_up, 0, width)))
            up = linear(x, self.plain(rows_of(gate_up, width, 2 * width)))
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            out += linear(silu(gate) * up, self.plain(experts.down[expert]))

    def plain(self, weight: Matrix) -> Tensor:
        """A matrix in the activations' dtype; if decoded, valid until the next call."""
        if isinstance(weight, Tensor):
            return weight.to(self.dtype)
        if weight.scales is None:
            return weight.values.to(self.dtype)
        if weight.format.block != (128, 128):
            return decode(weight).to(self.dtype)
        out = self._decoded[: math.prod(weight.shape)].view(weight.shape)
        return decode_blocks(weight, out)


def rows_of(weight: QuantTensor, start: int, stop: int) -> QuantTensor:
    """Some rows of a matrix, in the same memory; blocks of scales must line up."""
    high = (weight.format.block or (1, 1))[0]
    assert start % high == stop % high == 0, (start, stop, high)
    scales = weight.scales
    if scales is not None:
        scales = scales[start // high : stop // high]
    shape = (stop - start, weight.shape[1])
    return QuantTensor(weight.values[start:stop], scales, weight.format, shape)
