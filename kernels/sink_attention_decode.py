"""Attention of one token over the cache, split along the cached positions, with sinks and windows.

The split follows the length on the device, so one launch serves every length. The last program of
a kv head to finish merges the splits of its query heads; the sink is added there, once.

H query heads, G kv heads, C head width, S slots of the cache, P splits.
"""

import triton
import triton.language as tl
from torch import Tensor

SPLITS = 32  # programs a kv head; short contexts leave most without work
BLOCK_S = 64  # cached positions a program reads at a time


# A program reads one split of the keys and values of one kv head. Grid: G, P.
@triton.jit
def _attention_kernel(
    q_ptr,  # [H, C]
    k_ptr,  # [G, S, C]
    v_ptr,  # [G, S, C]
    sinks_ptr,  # [H]
    position_ptr,  # [1] int32
    acc_ptr,  # [G, P, GROUP, C] fp32, scratch
    stats_ptr,  # [G, P, GROUP, 2] fp32, scratch: running maximum and sum
    ticket_ptr,  # [G] int32, zero before and after
    out_ptr,  # [H, C] fp32
    S: tl.constexpr,
    C: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    kv_head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    position = tl.load(position_ptr)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    per_split = tl.cdiv(tl.cdiv(position + 1 - first, splits), BLOCK_S) * BLOCK_S
    used = tl.cdiv(position + 1 - first, per_split)
    if split < used:
        h = tl.arange(0, GROUP)
        c = tl.arange(0, C)
        head = kv_head * HEADS_PER_KV + h
        own = (h < HEADS_PER_KV)[:, None]
        q = tl.load(q_ptr + head[:, None] * C + c[None, :], mask=own, other=0.0)
        q = q.to(k_ptr.dtype.element_ty)
        biggest = tl.full((GROUP,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP,), tl.float32)
        acc = tl.zeros((GROUP, C), tl.float32)
        begin = first + split * per_split
        end = tl.minimum(begin + per_split, position + 1)
        for s0 in range(begin, end, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            slot = (kv_head * S + s % S)[:, None] * C + c[None, :]
            seen = s < end
            k = tl.load(k_ptr + slot, mask=seen[:, None], other=0.0)
            v = tl.load(v_ptr + slot, mask=seen[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new = tl.maximum(biggest, tl.max(scores, axis=1))
            p = tl.exp(scores - new[:, None])
            shrink = tl.exp(biggest - new)
            total = total * shrink + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            biggest = new
        part = (kv_head * splits + split) * GROUP + h
        tl.store(acc_ptr + part[:, None] * C + c[None, :], acc)
        tl.store(stats_ptr + part * 2, biggest)
        tl.store(stats_ptr + part * 2 + 1, total)
        tl.debug_barrier()
        if tl.atomic_add(ticket_ptr + kv_head, 1, sem="acq_rel") == used - 1:
            tl.debug_barrier()
            sink = tl.load(sinks_ptr + head, mask=h < HEADS_PER_KV, other=0.0).to(tl.float32)
            biggest = sink
            total = tl.full((GROUP,), 1.0, tl.float32)
            acc = tl.zeros((GROUP, C), tl.float32)
            for p_index in range(0, used):
                part = (kv_head * splits + p_index) * GROUP + h
                peak = tl.load(stats_ptr + part * 2, cache_modifier=".cg")
                new = tl.maximum(biggest, peak)
                shrink = tl.exp(biggest - new)
                grow = tl.exp(peak - new)
                part_total = tl.load(stats_ptr + part * 2 + 1, cache_modifier=".cg")
                total = total * shrink + part_total * grow
                part_acc = tl.load(acc_ptr + part[:, None] * C + c[None, :], cache_modifier=".cg")
                acc = acc * shrink[:, None] + part_acc * grow[:, None]
                biggest = new
            tl.store(out_ptr + head[:, None] * C + c[None, :], acc / total[:, None], mask=own)
            tl.store(ticket_ptr + kv_head, 0)


def sink_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sinks: Tensor,
    position: Tensor,
    out: Tensor,
    *,
    window: int,
    acc: Tensor,
    stats: Tensor,
    ticket: Tensor,
) -> Tensor:
    """Attention of the token at `position` over itself and what is cached before it.

    q:        [H, C] after rope
    k_cache:  [G, S, C] bf16; position j stands in slot j % S, the token's own key included
    v_cache:  [G, S, C] bf16
    sinks:    [H], one logit a head in the denominator, not scaled
    position: [1] int32 on the device
    out:      [H, C] fp32, written
    window:   positions seen, the token counted; 0 sees all
    acc:      [G, SPLITS, 16 or H / G, C] fp32 scratch
    stats:    [G, SPLITS, 16 or H / G, 2] fp32 scratch
    ticket:   [G] int32, zero before the first call; left zero

    Reads 4 * G * C bytes a visible position, which sets its time for long contexts.
    """
    kv_heads, slots, width = k_cache.shape
    group = acc.shape[2]
    _attention_kernel[(kv_heads, SPLITS)](
        q,
        k_cache,
        v_cache,
        sinks,
        position,
        acc,
        stats,
        ticket,
        out,
        S=slots,
        C=width,
        HEADS_PER_KV=q.shape[0] // kv_heads,
        WINDOW=window,
        SCALE=width**-0.5,
        GROUP=group,
        BLOCK_S=BLOCK_S,
        num_warps=4,
    )
    return out


def head_group(num_heads: int, num_kv_heads: int) -> int:
    """Rows of the score tile: query heads of a kv head, at least the 16 of a tensor-core tile."""
    return max(16, triton.next_power_of_2(num_heads // num_kv_heads))
