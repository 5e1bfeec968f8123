"""Plain-torch twins of kernels/moe_gemm.py.

T tokens, D model width, F expert width, E experts, K experts per token.
"""

import torch
from torch import Tensor

from kernels.moe_routing import Routing
from kernels.reference.swiglu import apply_swiglu
from kernels.swiglu import Swiglu
from quant.codecs import decode
from quant.tensor import QuantTensor


def moe_gemm_gate_up(
    x_TD: Tensor,
    gate_up: QuantTensor,
    bias: Tensor | None,
    routing: Routing,
    activation: Swiglu,
) -> Tensor:
    """Same arguments and result as the kernel, in fp32, cast at the end."""
    top_k = routing.expert_weights.shape[1]
    pair_expert = _pair_expert(routing)
    out = x_TD.new_empty((len(pair_expert), gate_up.shape[1] // 2))
    for expert in pair_expert.unique().tolist():
        pairs = (pair_expert == expert).nonzero()[:, 0]
        y = x_TD[pairs // top_k].float() @ decode(gate_up[expert]).T
        y += 0.0 if bias is None else bias[expert].float()
        out[pairs] = apply_swiglu(y, activation).to(out.dtype)
    return out


def moe_gemm_down(
    hidden: Tensor, down: QuantTensor, bias: Tensor | None, routing: Routing
) -> Tensor:
    """Same arguments and result as the kernel, in fp32."""
    pair_expert = _pair_expert(routing)
    hidden = hidden.float()
    out = torch.empty((len(hidden), down.shape[1]), device=hidden.device)
    for expert in pair_expert.unique().tolist():
        pairs = (pair_expert == expert).nonzero()[:, 0]
        y = hidden[pairs] @ decode(down[expert]).T
        y += 0.0 if bias is None else bias[expert].float()
        out[pairs] = routing.expert_weights.flatten()[pairs, None] * y
    return out


def add_expert_outputs(outputs: Tensor, residual_TD: Tensor) -> Tensor:
    """Same arguments and result as the kernel."""
    residual_TD += outputs.unflatten(0, (len(residual_TD), -1)).sum(1)
    return residual_TD


def _pair_expert(routing: Routing) -> Tensor:
    """The expert of each (token, slot) pair, read back from the row blocks."""
    pairs = routing.expert_weights.numel()
    expert_of_row = routing.block_expert[:, None].expand_as(routing.block_rows)
    working = routing.block_rows < pairs
    result = torch.full((pairs,), -1, dtype=torch.int64, device=routing.block_rows.device)
    result[routing.block_rows[working].long()] = expert_of_row[working].long()
    assert bool((result >= 0).all()), "a pair has no row"
    return result
