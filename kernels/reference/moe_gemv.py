"""Plain-torch twins of kernels/moe_gemv.py.

D model width, F expert width, K experts per token.
"""

from torch import Tensor

from kernels.packed_vector import PackedVectors, activation_scale, store_vector, unpack_vectors
from kernels.reference.swiglu import apply_swiglu
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
    *,
    always: QuantTensor | None = None,
    in_order: bool = False,
) -> PackedVectors:
    """Same arguments and results as the kernel; fp32 sums, packed results."""
    assert not in_order or expert_ids.tolist() == list(range(len(expert_ids)))
    vector = unpack_vectors(x)[0]
    rows = [decode(gate_up[expert]) @ vector for expert in expert_ids.tolist()]
    if bias is not None:
        rows = [y + b for y, b in zip(rows, bias[expert_ids.long()].float(), strict=True)]
    if always is not None:
        rows += [decode(always[i]) @ vector for i in range(always.shape[0])]
    for slot, y in enumerate(rows):
        hidden = apply_swiglu(y, activation)
        store_vector(out, slot, hidden, 1.0 / activation_scale(activation.limit))
    return out


def moe_down(
    hidden: PackedVectors,
    down: QuantTensor,
    bias: Tensor | None,
    expert_ids: Tensor,
    expert_weights: Tensor,
    out: Tensor,
    *,
    always: QuantTensor | None = None,
) -> Tensor:
    """Same arguments and results as the kernel, in fp32."""
    vectors = unpack_vectors(hidden)
    for slot, expert in enumerate(expert_ids.tolist()):
        y = decode(down[expert]) @ vectors[slot]
        if bias is not None:
            y += bias[expert].float()
        out += expert_weights[slot] * y
    for i in range(0 if always is None else always.shape[0]):
        assert always is not None
        out += decode(always[i]) @ vectors[len(expert_ids) + i]
    return out
