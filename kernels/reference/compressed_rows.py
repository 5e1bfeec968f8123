"""Plain-torch twin of kernels/compressed_rows.py: the same state, one token after the other.

C row width, P rotary width, R ratio.
"""

import torch
from torch import Tensor

from kernels.reference.rms_norm import rms_norm
from kernels.reference.shared_rows import turned


def compressed_rows(
    projected: Tensor,
    position_bias: Tensor,
    norm: Tensor,
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    before: Tensor,
    after: Tensor,
    rows: Tensor,
    *,
    eps: float,
) -> Tensor:
    """Same arguments and results as the kernel."""
    ratio, width = len(position_bias), rows.shape[1]
    parts = before.clone()
    nothing = torch.zeros_like(parts[0])
    nothing[0] = float("-inf")
    for t, token in enumerate(projected.float()):
        at = int(position) + t
        if at % ratio == 0:
            last = parts[1].clone() if len(parts) > 1 and at > 0 else nothing
            parts[:] = nothing
            if len(parts) > 1:
                parts[0] = last
        values, gates = token.chunk(2)
        gates = gates + position_bias[at % ratio].float()
        halves = zip(gates.split(width), values.split(width), strict=True)
        for part, (gate, value) in zip(parts[-2:], halves, strict=True):
            part.copy_(_with(part, torch.stack((gate, torch.ones_like(gate), value))))
        if at % ratio == ratio - 1:
            whole = parts[-1] if len(parts) == 1 else _with(parts[-1], parts[0])
            row = rms_norm((whole[2] / whole[1])[None], norm, eps)
            cos, sin = (table[at - ratio + 1] for table in rope)
            rows[at // ratio] = turned(row, cos, sin)[0].to(rows.dtype)
    after.copy_(parts)
    return rows


def _with(one: Tensor, other: Tensor) -> Tensor:
    """Two running softmaxes [3, C] as one."""
    biggest = torch.maximum(one[0], other[0])
    own, others = (one[0] - biggest).exp(), (other[0] - biggest).exp()
    return torch.stack(
        (biggest, one[1] * own + other[1] * others, one[2] * own + other[2] * others)
    )
