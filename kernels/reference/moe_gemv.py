"""Plain-torch twins of kernels/moe_gemv.py.

D model width, F expert width, K experts per token.
"""

import torch
from torch import Tensor

from kernels.packed_vector import PackedVectors, activation_scale, store_vector, unpack_vectors
from kernels.swiglu import Swiglu
from quant.codecs import decode
from quant.tensor import QuantTensor


def moe_gate_up(
    x: PackedVectors,
    gate_up: QuantTensor,
    bias: Tensor | None,
    expert_ids: Tensor,
    out: PackedVectors,
    activation: Swiglu,
) -> PackedVectors:
    """Same arguments and results as the kernel; fp32 sums, packed results."""
    vector = unpack_vectors(x)[0]
    for slot, expert in enumerate(expert_ids.tolist()):
        y = decode(gate_up[expert]) @ vector
        if bias is not None:
            y += bias[expert].float()
        gate, up = (y[0::2], y[1::2]) if activation.alternating else y.chunk(2)
        if activation.limit is not None:
            gate = gate.clamp(max=activation.limit)
            up = up.clamp(-activation.limit, activation.limit)
        hidden = gate * torch.sigmoid(activation.alpha * gate) * (up + activation.offset)
        store_vector(out, slot, hidden, 1.0 / activation_scale(activation.limit))
    return out


def moe_down(
    hidden: PackedVectors,
    down: QuantTensor,
    bias: Tensor | None,
    expert_ids: Tensor,
    expert_weights: Tensor,
    out: Tensor,
) -> Tensor:
    """Same arguments and results as the kernel, in fp32."""
    vectors = unpack_vectors(hidden)
    for slot, expert in enumerate(expert_ids.tolist()):
        y = decode(down[expert]) @ vectors[slot]
        if bias is not None:
            y += bias[expert].float()
        out += expert_weights[slot] * y
    return out
