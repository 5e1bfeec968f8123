"""Plain-torch twins of kernels/moe_gemv.py.

D model width, F expert width, K experts per token.
"""

import torch
from torch import Tensor

from kernels.packed_vector import activation_scale, pack_vector, unpack_vector
from quant.codecs import decode
from quant.tensor import QuantTensor


def moe_gate_up(
    packed: Tensor,
    unscale: Tensor,
    gate_up: QuantTensor,
    bias: Tensor,
    expert_ids: Tensor,
    out: Tensor,
    *,
    limit: float,
    alpha: float,
) -> Tensor:
    """Same arguments and results as the kernel; fp32 sums, fp16 results."""
    x = unpack_vector(packed) * unscale
    for slot, expert in enumerate(expert_ids.tolist()):
        y = decode(gate_up[expert]) @ x + bias[expert].float()
        gate, up = y[0::2].clamp(max=limit), y[1::2].clamp(-limit, limit)
        hidden = gate * torch.sigmoid(alpha * gate) * (up + 1)
        out[slot] = pack_vector(hidden * activation_scale(limit))
    return out


def moe_down(
    hidden: Tensor,
    down: QuantTensor,
    bias: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    out: Tensor,
    *,
    limit: float,
) -> Tensor:
    """Same arguments and results as the kernel, in fp32."""
    x = unpack_vector(hidden) / activation_scale(limit)
    for slot, expert in enumerate(expert_ids.tolist()):
        out += expert_weights[slot] * (decode(down[expert]) @ x[slot] + bias[expert].float())
    return out
