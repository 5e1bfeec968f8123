"""DeepSeek's router of one token: RMS norm, scores, the best groups of experts, top-k, weights.

Scores are sigmoids, a softmax or roots of softplus; a bias, where there is one, counts in the
choice alone. V4's first layers do not choose: a table names the experts of each token id. The last
program to finish chooses: a ticket counter replaces a second launch. The normed vector is packed
for the experts on the way, and a kernel of its own packs it for layers without a router.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front
from kernels.packed_vector import PackedVectors, store_packed

_ROWS = 2  # experts of a program
_LEAST_SUM = tl.constexpr(1e-20)  # added to the sum of a token's weights
_NOT_THERE = tl.constexpr(-3.0e38)  # below every score, above the -inf of what may not be chosen


@triton.jit
def _root_of_softplus(x):
    """sqrt(log(1 + exp(x))), exact for very negative x too."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    # Of log(1 + y): what is lost in rounding u is lost in u - 1 as well.
    small = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.sqrt(tl.maximum(x, 0.0) + small)


@triton.jit
def _scores_of(logits, SCORES: tl.constexpr):
    """Scores of a tile of logits; a softmax is over all of it."""
    if SCORES == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-logits))
    elif SCORES == "sqrtsoftplus":
        return _root_of_softplus(logits)
    else:
        tl.static_assert(SCORES == "softmax")
        scores = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))
        return scores / tl.sum(tl.sum(scores, axis=1), axis=0)


@triton.jit
def _key_of(score, expert):
    """int64 whose order is that of scores, and among equal ones of falling ids."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) | (0x7FFFFFFF - expert).to(tl.int64)


@triton.jit
def _in_best_groups(
    choice,  # [BLOCK_G, BLOCK_I], -inf where there is no expert
    there,
    G: tl.constexpr,
    LIMITED: tl.constexpr,
    BEST_OF: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """[BLOCK_G, 1]: whether a group is one of the LIMITED whose best scores sum to most."""
    g = tl.arange(0, BLOCK_G)
    i = tl.arange(0, BLOCK_I)[None, :]
    left = tl.where(there, choice, float("-inf"))
    worth = tl.max(left, axis=1)
    if BEST_OF == 2:
        first = tl.min(tl.where(left == worth[:, None], i, BLOCK_I), axis=1)
        left = tl.where(i == first[:, None], float("-inf"), left)
        second = tl.max(left, axis=1)
        worth += tl.where(second == float("-inf"), 0.0, second)
    worth = tl.where(g < G, worth, float("-inf"))
    key = _key_of(worth, g)
    best = g < 0
    for _ in tl.static_range(LIMITED):
        taken = key == tl.max(key, axis=0)
        best = best | taken
        key = tl.where(taken, -0x7FFFFFFFFFFFFFFF, key)
    return best[:, None]


# The first PACKS programs pack the normed vector; each other one computes ROWS logits; the last one
# to finish chooses. Grid: PACKS + E / ROWS.
@triton.jit
def _grouped_router_kernel(
    x_ptr,  # [D] fp32
    norm_ptr,  # [D]
    w_ptr,  # [E, D]
    bias_ptr,  # [E] or None
    token_ptr,  # [1] int32, and
    table_ptr,  # [V, K] any integers: experts by token id; or None
    logits_ptr,  # [E] fp32, scratch
    ticket_ptr,  # [1] int32, zero before and after
    ids_ptr,  # [K] int32, written
    weights_ptr,  # [K] fp32, written
    packed_ptr,  # see kernels/packed_vector.py, written
    unscale_ptr,
    also_ptr,  # the same in another form, written; or None
    also_unscale_ptr,
    trace_ptr,  # [programs, 3] int64 or None
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    SCORES: tl.constexpr,  # see _scores_of
    G: tl.constexpr,
    LIMITED: tl.constexpr,
    BEST_OF: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SCALE: tl.constexpr,
    DIGITS: tl.constexpr,
    PACKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    e = (program - PACKS) * ROWS + tl.arange(0, ROWS)
    inside = (e >= 0)[:, None] & (e < E)[:, None] & (d < D)[None, :]
    w = tl.load(w_ptr + e[:, None] * D + d[None, :], mask=inside, other=0.0)
    norm = tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    x = tl.load(x_ptr + d, mask=d < D, other=0.0)
    factor = tl.rsqrt(tl.sum(x * x) / D + EPS)
    x *= norm
    if program == 0:
        store_packed(x * factor, packed_ptr, unscale_ptr, D, BLOCK_D, DIGITS)
    elif program < PACKS:
        if also_ptr is not None:
            store_packed(x * factor, also_ptr, also_unscale_ptr, D, BLOCK_D, not DIGITS)
    else:
        logit = tl.sum(w.to(tl.float32) * x[None, :], axis=1) * factor
        # NaN (weights that overflow) must not lead to an expert that does not exist.
        logit = tl.where(logit == logit, logit, _NOT_THERE)
        tl.store(logits_ptr + e, logit, mask=e < E)
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.debug_barrier()
        if table_ptr is not None:
            slot_of = tl.arange(0, BLOCK_K)[None, :]
            chosen = slot_of < K
            row = table_ptr + tl.load(token_ptr).to(tl.int64) * K
            expert = tl.load(row + slot_of, mask=chosen, other=0).to(tl.int32)
            logits = tl.load(
                logits_ptr + expert, mask=chosen, other=float("-inf"), cache_modifier=".cg"
            )
            scores = _scores_of(logits, SCORES)
        else:
            PER_GROUP: tl.constexpr = E // G
            g = tl.arange(0, BLOCK_G)[:, None]
            i = tl.arange(0, BLOCK_I)[None, :]
            there = (g < G) & (i < PER_GROUP)
            expert = g * PER_GROUP + i
            logits = tl.load(
                logits_ptr + expert, mask=there, other=float("-inf"), cache_modifier=".cg"
            )
            scores = _scores_of(logits, SCORES)
            choice = scores
            if bias_ptr is not None:
                choice += tl.load(bias_ptr + expert, mask=there, other=0.0).to(tl.float32)
            allowed = there
            if LIMITED < G:
                best = _in_best_groups(choice, there, G, LIMITED, BEST_OF, BLOCK_G, BLOCK_I)
                allowed = there & best
            key = tl.where(allowed, _key_of(choice, expert), -0x7FFFFFFFFFFFFFFF)
            slot_of = tl.full((BLOCK_G, BLOCK_I), -1, tl.int32)
            for slot in tl.static_range(K):
                taken = key == tl.max(tl.max(key, axis=1), axis=0)
                slot_of = tl.where(taken, slot, slot_of)
                key = tl.where(taken, -0x7FFFFFFFFFFFFFFF, key)
            chosen = slot_of >= 0
        weights = tl.where(chosen, scores, 0.0)
        if NORMALIZED:
            weights = weights / (tl.sum(tl.sum(weights, axis=1), axis=0) + _LEAST_SUM)
        tl.store(ids_ptr + slot_of, expert, mask=chosen)
        tl.store(weights_ptr + slot_of, weights * SCALE, mask=chosen)
        tl.store(ticket_ptr, 0)
    stamp(trace_ptr, 2)


def grouped_router(
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    scores: str,
    num_groups: int,
    num_limited: int,
    normalized: bool,
    scale: float,
    logits: Tensor,
    ticket: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    packed: PackedVectors,
    also: PackedVectors | None = None,
    token: Tensor | None = None,
    table: Tensor | None = None,
    trace: Tensor | None = None,
) -> None:
    """Choose the experts of one token and pack its normed vector for them.

    x:               [D] fp32, the residual
    norm:            [D] weight of the RMS norm in front, with eps
    router:          [E, D]
    bias:            [E], added to scores where experts are chosen, not in their weights; or None
    scores:          "sigmoid", and a group is worth its best two; "softmax" over all experts, and
                     a group is worth its best one; or "sqrtsoftplus"
    num_groups:      of equal size, in order; experts come from the best num_limited of them
    normalized:      whether weights are divided by their sum
    scale:           multiplies the weights
    logits:          [E] fp32, scratch
    ticket:          [1] int32, zero before the first call; left zero
    expert_ids:      [K] int32, written, the best first; a tie takes the lower id
    expert_weights:  [K] fp32, written
    packed:          one vector, written: the normed one, in either form
    also:            the same in the other form, written; or None
    token:           [1] int32 on the device, and
    table:           [V, K] integers: the experts of each token id, in place of the choice; then
                     scores are no softmax, there are no groups, and ids stand as in the table

    Reads E * D weights; bound by latency at every published size.
    """
    experts, width = router.shape
    assert experts % num_groups == 0, (experts, num_groups)
    assert also is None or also.digits != packed.digits
    assert table is None or (scores != "softmax" and table.shape[1] == len(expert_ids))
    packs = 1 if also is None else 2
    _grouped_router_kernel[(packs + triton.cdiv(experts, _ROWS),)](
        x,
        norm,
        router,
        bias,
        token,
        table,
        logits,
        ticket,
        expert_ids,
        expert_weights,
        packed.values,
        packed.unscale,
        None if also is None else also.values,
        None if also is None else also.unscale,
        trace,
        D=width,
        E=experts,
        K=len(expert_ids),
        EPS=eps,
        SCORES=scores,
        G=num_groups,
        LIMITED=num_limited,
        BEST_OF=2 if scores == "sigmoid" else 1,
        NORMALIZED=normalized,
        SCALE=scale,
        DIGITS=packed.digits,
        PACKS=packs,
        ROWS=_ROWS,
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_G=triton.next_power_of_2(num_groups),
        BLOCK_I=triton.next_power_of_2(experts // num_groups),
        BLOCK_K=triton.next_power_of_2(len(expert_ids)),
        num_warps=8 if width > 4096 else 4,
        **early_start(x),
    )


# One program.
@triton.jit
def _norm_and_pack_kernel(
    x_ptr,
    norm_ptr,
    packed_ptr,
    unscale_ptr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    let_next_start(EARLY)
    d = tl.arange(0, BLOCK_D)
    norm = tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    wait_for_front(EARLY)
    x = tl.load(x_ptr + d, mask=d < D, other=0.0)
    x *= norm * tl.rsqrt(tl.sum(x * x) / D + EPS)
    store_packed(x, packed_ptr, unscale_ptr, D, BLOCK_D, DIGITS)


def norm_and_pack(x: Tensor, norm: Tensor, packed: PackedVectors, *, eps: float) -> PackedVectors:
    """Pack rms_norm(x) as one vector, for a gated layer without a router.

    x:       [D] fp32
    norm:    [D] weight of the RMS norm, with eps
    packed:  one vector, written, in either form

    One program: bound by latency.
    """
    width = len(x)
    _norm_and_pack_kernel[(1,)](
        x,
        norm,
        packed.values,
        packed.unscale,
        D=width,
        EPS=eps,
        DIGITS=packed.digits,
        BLOCK_D=triton.next_power_of_2(width),
        num_warps=8,
        **early_start(x),
    )
    return packed
