"""The router of one token: RMS norm, logits, top-k, and the normed vector packed for the experts.

The last program to finish picks the experts: a ticket counter replaces a second launch.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front
from kernels.packed_vector import PackedVectors, store_packed


# Program 0 packs the normed vector; program p > 0 computes ROWS logits; the last one to finish
# chooses. Grid: 1 + E / ROWS.
@triton.jit
def _router_kernel(
    x_ptr,  # [D] fp32
    norm_ptr,  # [D]
    w_ptr,  # [E, D]
    bias_ptr,  # [E]
    logits_ptr,  # [E] fp32, scratch
    ticket_ptr,  # [1] int32, zero before and after
    ids_ptr,  # [K] int32, written
    weights_ptr,  # [K] fp32, written
    packed_ptr,  # [2, D] int8 or [4, D / 8, 2] fp16, written; see kernels/packed_vector.py
    unscale_ptr,  # [D / 32] or [1] fp32, written
    trace_ptr,  # [programs, 3] int64 or None
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DIGITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    e = (program - 1) * ROWS + tl.arange(0, ROWS)
    inside = (e >= 0)[:, None] & (e < E)[:, None] & (d < D)[None, :]
    w = tl.load(w_ptr + e[:, None] * D + d[None, :], mask=inside, other=0.0)
    norm = tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + e, mask=(e >= 0) & (e < E), other=0.0).to(tl.float32)
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    x = tl.load(x_ptr + d, mask=d < D, other=0.0)
    factor = tl.rsqrt(tl.sum(x * x) / D + EPS)
    x *= norm
    if program == 0:
        store_packed(x * factor, packed_ptr, unscale_ptr, D, BLOCK_D, DIGITS)
    else:
        logit = tl.sum(w.to(tl.float32) * x[None, :], axis=1) * factor + bias
        # NaN (weights that overflow) must not lead to an expert that does not exist.
        logit = tl.where(logit == logit, logit, float("-inf"))
        tl.store(logits_ptr + e, logit, mask=e < E)
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.debug_barrier()
        expert = tl.arange(0, BLOCK_E)
        logits = tl.load(
            logits_ptr + expert, mask=expert < E, other=float("-inf"), cache_modifier=".cg"
        )
        others = tl.load(
            logits_ptr + expert[:, None], mask=(expert < E)[:, None], other=float("-inf"),
            cache_modifier=".cg",
        )  # fmt: skip
        # An expert's rank is the number of experts in front of it; a tie takes the lower id.
        in_front = (others > logits[None, :]) | (
            (others == logits[None, :]) & (expert[:, None] < expert[None, :])
        )
        rank = tl.sum(in_front.to(tl.int32), axis=0)
        chosen = (rank < K) & (expert < E)
        weights = tl.where(chosen, tl.exp(logits - tl.max(logits)), 0.0)
        weights = weights / tl.sum(weights)
        tl.store(ids_ptr + rank, expert, mask=chosen)
        tl.store(weights_ptr + rank, weights, mask=chosen)
        tl.store(ticket_ptr, 0)
    stamp(trace_ptr, 2)


def router_topk(
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    bias: Tensor,
    *,
    eps: float,
    logits: Tensor,
    ticket: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    packed: PackedVectors,
    trace: Tensor | None = None,
) -> None:
    """Choose the experts of one token and pack its normed vector for them.

    x:               [D] fp32, the residual
    norm:            [D] weight of the RMS norm in front, with eps
    router, bias:    [E, D], [E]
    logits:          [E] fp32, scratch
    ticket:          [1] int32, zero before the first call; left zero
    expert_ids:      [K] int32, written, by falling logit; a tie takes the lower id
    expert_weights:  [K] fp32, written: softmax over the chosen logits
    packed:          one vector, written: the normed one, in either form

    Reads E * D weights; bound by latency at every published size.
    """
    experts, width = router.shape
    rows = 2
    _router_kernel[(1 + triton.cdiv(experts, rows),)](
        x,
        norm,
        router,
        bias,
        logits,
        ticket,
        expert_ids,
        expert_weights,
        packed.values,
        packed.unscale,
        trace,
        D=width,
        E=experts,
        K=len(expert_ids),
        EPS=eps,
        ROWS=rows,
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_E=triton.next_power_of_2(experts),
        DIGITS=packed.digits,
        num_warps=4,
        **early_start(x),
    )
