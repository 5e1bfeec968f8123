"""The router of one token: RMS norm, logits, top-k, and the normed vector packed for the experts.

The last program to finish picks the experts: a ticket counter replaces a second launch.
"""

import triton
import triton.language as tl
from torch import Tensor


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
    packed_ptr,  # [4, D / 8, 2] fp16, written; see kernels/moe_gemv.py
    unscale_ptr,  # [1] fp32, written: multiplies sums over the packed vector
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + d, mask=d < D, other=0.0)
    factor = tl.rsqrt(tl.sum(x * x) / D + EPS)
    y = x * factor * tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    program = tl.program_id(0)
    if program == 0:
        # The largest magnitude goes to [2^14, 2^15): products with codes (at most 6, scaled by
        # 2^-14) and sums of four stay in fp16's normal range.
        largest = tl.maximum(tl.max(tl.abs(y)), 1e-30)
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
        scale = ((14 - exponent + 127) << 23).to(tl.float32, bitcast=True)
        word = d >> 3
        place = ((d & 3) * (D // 8) + word) * 2 + ((d >> 2) & 1)
        tl.store(packed_ptr + place, (y * scale).to(tl.float16), mask=d < D)
        tl.store(unscale_ptr, ((exponent - 14 + 127) << 23).to(tl.float32, bitcast=True))
    else:
        e = (program - 1) * ROWS + tl.arange(0, ROWS)
        inside = (e < E)[:, None] & (d < D)[None, :]
        w = tl.load(w_ptr + e[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        logit = tl.sum(w * y[None, :], axis=1)
        logit += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        tl.store(logits_ptr + e, logit, mask=e < E)
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.debug_barrier()
        e = tl.arange(0, BLOCK_E)
        logits = tl.load(logits_ptr + e, mask=e < E, other=float("-inf"), cache_modifier=".cg")
        # NaN (weights that overflow) must not lead to an expert that does not exist.
        logits = tl.where(logits == logits, logits, float("-inf"))
        slot = tl.arange(0, BLOCK_K)
        chosen = tl.full((BLOCK_K,), float("-inf"), tl.float32)
        ids = tl.zeros((BLOCK_K,), tl.int32)
        for k in tl.static_range(K):
            best, index = tl.max(logits, axis=0, return_indices=True)
            chosen = tl.where(slot == k, best, chosen)
            ids = tl.where(slot == k, index, ids)
            logits = tl.where(e == index, float("-inf"), logits)
        weights = tl.exp(chosen - tl.max(chosen))
        weights = weights / tl.sum(weights)
        tl.store(ids_ptr + slot, ids, mask=slot < K)
        tl.store(weights_ptr + slot, weights, mask=slot < K)
        tl.store(ticket_ptr, 0)


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
    packed: Tensor,
    unscale: Tensor,
) -> None:
    """Choose the experts of one token and pack its normed vector for them.

    x:               [D] fp32, the residual
    norm:            [D] weight of the RMS norm in front, with eps
    router, bias:    [E, D], [E]
    logits:          [E] fp32, scratch
    ticket:          [1] int32, zero before the first call; left zero
    expert_ids:      [K] int32, written, by falling logit; a tie takes the lower id
    expert_weights:  [K] fp32, written: softmax over the chosen logits
    packed:          [4, D / 8, 2] fp16, written: the normed vector times 1 / unscale, in the order
                     of kernels/moe_gemv.py
    unscale:         [1] fp32, written: a power of two

    Reads E * D weights; bound by latency at every published size.
    """
    experts, width = router.shape
    rows = 1 if experts <= 64 else 2
    _router_kernel[(1 + triton.cdiv(experts, rows),)](
        x,
        norm,
        router,
        bias,
        logits,
        ticket,
        expert_ids,
        expert_weights,
        packed,
        unscale,
        D=width,
        E=experts,
        K=len(expert_ids),
        EPS=eps,
        ROWS=rows,
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_K=triton.next_power_of_2(len(expert_ids)),
        num_warps=8,
    )
