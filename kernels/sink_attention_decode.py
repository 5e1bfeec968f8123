"""Attention of one token over the cache, split along the cached positions, with sinks and windows.

Takes the token's q, k and v as the projection leaves them: rotates q and k, writes k and v into the
cache. The split follows the length on the device, so one launch serves every length. The last
program of a kv head to finish merges the splits of its query heads; the sink is added there, once.
A head whose positions fit into one program needs no merging.

H query heads, G kv heads, C head width, S slots of the cache, P splits.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, wait_for_front

SPLITS = 32  # programs a kv head; short contexts leave most without work
BLOCK_S = 128  # cached positions a program reads at a time
MERGED = 8  # splits merged at a time


@triton.jit
def _rotated(head_ptr, cos, sin, mask, C: tl.constexpr):
    """Heads [.., C] at head_ptr, turned: pairs are (i, i + C / 2); cos and sin [.., C], signed."""
    c = tl.arange(0, C)
    plain = tl.load(head_ptr + c[None, :], mask=mask, other=0.0)
    partner = tl.load(head_ptr + ((c + C // 2) % C)[None, :], mask=mask, other=0.0)
    return plain * cos[None, :] + partner * sin[None, :]


# A program reads one split of the keys and values of one kv head. Grid: G, P.
@triton.jit
def _attention_kernel(
    qkv_ptr,  # [(H + 2G) * C] fp32
    cos_ptr,  # [positions, C / 2] fp32
    sin_ptr,
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
    MERGED: tl.constexpr,
    EARLY: tl.constexpr,
):
    let_next_start(EARLY)
    kv_head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    h = tl.arange(0, GROUP)
    c = tl.arange(0, C)
    own = (h < HEADS_PER_KV)[:, None]
    head = kv_head * HEADS_PER_KV + h
    # Programs without work end here: enough of the others wait. The projection in front lets this kernel start after its own wait: the position and what
    # earlier steps cached are there already. Only qkv must be waited for.
    position = tl.load(position_ptr)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    per_split = tl.cdiv(tl.cdiv(position + 1 - first, splits), BLOCK_S) * BLOCK_S
    used = tl.cdiv(position + 1 - first, per_split)
    if split < used:
        begin = first + split * per_split
        end = tl.minimum(begin + per_split, position + 1)
        cos = tl.load(cos_ptr + position * (C // 2) + c % (C // 2))
        sin = tl.load(sin_ptr + position * (C // 2) + c % (C // 2))
        sin = tl.where(c < C // 2, -sin, sin)
        sink = tl.load(sinks_ptr + head, mask=h < HEADS_PER_KV, other=0.0).to(tl.float32)
        s = begin + tl.arange(0, BLOCK_S)
        slot = (kv_head * S + s % S)[:, None] * C + c[None, :]
        seen = (s < tl.minimum(end, position))[:, None]
        k = tl.load(k_ptr + slot, mask=seen, other=0.0)
        v = tl.load(v_ptr + slot, mask=seen, other=0.0)
        wait_for_front(EARLY)
        heads = tl.num_programs(0) * HEADS_PER_KV
        q = _rotated(qkv_ptr + head[:, None] * C, cos, sin, own, C).to(k_ptr.dtype.element_ty)
        one = tl.zeros((1, 1), tl.int64)
        k_at = qkv_ptr + (heads + kv_head) * C + one
        k_new = _rotated(k_at, cos, sin, one == 0, C).to(k_ptr.dtype.element_ty)
        v_at = qkv_ptr + (heads + tl.num_programs(0) + kv_head) * C + one
        v_new = tl.load(v_at + c[None, :]).to(v_ptr.dtype.element_ty)
        if split == used - 1:
            at = (kv_head * S + position % S) * C + c[None, :]
            tl.store(k_ptr + at, k_new)
            tl.store(v_ptr + at, v_new)
        biggest = tl.full((GROUP,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP,), tl.float32)
        acc = tl.zeros((GROUP, C), tl.float32)
        for s0 in range(begin, end, BLOCK_S):
            # This token's own row may not be in the cache yet.
            newest = (s == position)[:, None]
            k = tl.where(newest, k_new, k)
            v = tl.where(newest, v_new, v)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
            scores = tl.where((s < end)[None, :], scores, float("-inf"))
            new = tl.maximum(biggest, tl.max(scores, axis=1))
            p = tl.exp(scores - new[:, None])
            shrink = tl.exp(biggest - new)
            total = total * shrink + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            biggest = new
            s = s0 + BLOCK_S + tl.arange(0, BLOCK_S)
            slot = (kv_head * S + s % S)[:, None] * C + c[None, :]
            seen = (s < tl.minimum(end, position))[:, None]
            k = tl.load(k_ptr + slot, mask=seen, other=0.0)
            v = tl.load(v_ptr + slot, mask=seen, other=0.0)
        out = out_ptr + head[:, None] * C + c[None, :]
        if used == 1:
            new = tl.maximum(biggest, sink)
            shrink = tl.exp(biggest - new)
            total = total * shrink + tl.exp(sink - new)
            tl.store(out, acc * (shrink / total)[:, None], mask=own)
        else:
            part = (kv_head * splits + split) * GROUP + h
            tl.store(acc_ptr + part[:, None] * C + c[None, :], acc)
            tl.store(stats_ptr + part * 2, biggest)
            tl.store(stats_ptr + part * 2 + 1, total)
            tl.debug_barrier()
            if tl.atomic_add(ticket_ptr + kv_head, 1, sem="acq_rel") == used - 1:
                tl.debug_barrier()
                biggest = sink
                total = tl.full((GROUP,), 1.0, tl.float32)
                acc = tl.zeros((GROUP, C), tl.float32)
                for p0 in range(0, used, MERGED):
                    p_index = p0 + tl.arange(0, MERGED)
                    parts = (kv_head * splits + p_index)[:, None] * GROUP + h[None, :]
                    there = (p_index < used)[:, None] & (h < HEADS_PER_KV)[None, :]
                    peaks = tl.load(
                        stats_ptr + parts * 2, mask=there, other=float("-inf"), cache_modifier=".cg"
                    )
                    sums = tl.load(
                        stats_ptr + parts * 2 + 1, mask=there, other=0.0, cache_modifier=".cg"
                    )
                    accs = tl.load(
                        acc_ptr + parts[:, :, None] * C + c[None, None, :],
                        mask=there[:, :, None] & (c < C)[None, None, :],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    new = tl.maximum(biggest, tl.max(peaks, axis=0))
                    shrink = tl.exp(biggest - new)
                    grow = tl.exp(peaks - new[None, :])
                    total = total * shrink + tl.sum(sums * grow, axis=0)
                    acc = acc * shrink[:, None] + tl.sum(accs * grow[:, :, None], axis=0)
                    biggest = new
                tl.store(out, acc / total[:, None], mask=own)
                tl.store(ticket_ptr + kv_head, 0)


def sink_attention_decode(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor],
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

    qkv:      [(H + 2G) * C] fp32, the heads of q, then k, then v, not rotated
    rope:     cos and sin, [positions, C / 2] fp32 tables of rope_table; pairs are (i, i + C / 2)
    k_cache:  [G, S, C] bf16; position j stands in slot j % S; the token's own key is written
    v_cache:  [G, S, C] bf16, likewise
    sinks:    [H], one logit a head in the denominator, not scaled
    position: [1] int32 on the device
    out:      [H, C] fp32, written
    window:   positions seen, the token counted; 0 sees all
    acc:      [G, SPLITS, 16 or H / G, C] fp32 scratch
    stats:    [G, SPLITS, 16 or H / G, 2] fp32 scratch
    ticket:   [G] int32, zero before the first call; left zero

    The kernel in front must let this one start only after its own wait, because the position and
    the cache are read early (see kernels/dependent_launch.py).
    Reads 4 * G * C bytes a visible position, which sets its time for long contexts.
    """
    kv_heads, slots, width = k_cache.shape
    assert k_cache.dtype == v_cache.dtype
    _attention_kernel[(kv_heads, SPLITS)](
        qkv,
        *rope,
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
        HEADS_PER_KV=out.shape[0] // kv_heads,
        WINDOW=window,
        SCALE=width**-0.5,
        GROUP=acc.shape[2],
        BLOCK_S=BLOCK_S,
        MERGED=MERGED,
        num_warps=4,
        **early_start(qkv),
    )
    return out


def head_group(num_heads: int, num_kv_heads: int) -> int:
    """Rows of the score tile: query heads of a kv head, at least the 16 of a tensor-core tile."""
    return max(16, triton.next_power_of_2(num_heads // num_kv_heads))
