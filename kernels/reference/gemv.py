"""Plain-torch twins of kernels/gemv.py."""

import torch
from torch import Tensor

from kernels.reference.rms_norm import rms_norm
from quant.codecs import decode
from quant.tensor import QuantTensor


def gemv(
    x: Tensor,
    weight: Tensor | QuantTensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    add: bool = False,
    groups: int = 1,
    start_next_first: bool = True,
) -> Tensor:
    """out [N] = weight [N, K] @ rms_norm(x [K]) + bias [N], or added to out; all in fp32.

    With groups: each part of the rows times its own part of x.
    """
    if norm is not None:
        x = rms_norm(x[None], norm.float(), eps)[0]
    plain = weight.float() if isinstance(weight, Tensor) else decode(weight)
    y = torch.bmm(plain.unflatten(0, (groups, -1)), x.view(groups, -1, 1)).flatten()
    if bias is not None:
        y = y + bias.float()
    return out.add_(y) if add else out.copy_(y)


def embedding(token: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """out [D] fp32 = table [V, D][token [1]]."""
    return out.copy_(table[token.long()[0]])
