"""Attention of one token over the cache, split along the cached positions, with sinks and windows.

Takes the token's q, k and v as the projection leaves them: rotates q and k, writes k and v into the
cache. The split follows the length on the device, so one launch serves every length. A second
kernel merges the splits of a head and adds its sink; layers whose window fits into one program's
tile have one split and need none.

H query heads, G kv heads, C head width, S slots of the cache, P splits.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front

SPLITS = 32  # programs a kv head; short contexts leave most without work
BLOCK_S = 128  # cached positions a program reads at a time
# Shared memory for more stages would come out of the L1 cache, which other kernels use.
NUM_STAGES = 1


@triton.jit
def _rotated(head_ptr, cos, sin, mask, C: tl.constexpr):
    """Heads [.., C] at head_ptr, turned: pairs are (i, i + C / 2); cos and sin [.., C], signed."""
    c = tl.arange(0, C)
    plain = tl.load(head_ptr + c[None, :], mask=mask, other=0.0)
    partner = tl.load(head_ptr + ((c + C // 2) % C)[None, :], mask=mask, other=0.0)
    return plain * cos[None, :] + partner * sin[None, :]


@triton.jit
def _positions_of(split, splits, position, WINDOW: tl.constexpr, BLOCK_S: tl.constexpr):
    """First and last + 1 of a split's positions, and the number of splits that have any."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    length = position + 1 - first
    per_split = tl.cdiv(tl.cdiv(length, splits), BLOCK_S) * BLOCK_S
    begin = first + split * per_split
    return begin, tl.minimum(begin + per_split, position + 1), tl.cdiv(length, per_split)


@triton.jit
def _attend(q, k, v, s, end, biggest, total, acc, SCALE: tl.constexpr):
    """One tile of keys and values more: running maximum, sum and weighted values."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
    scores = tl.where((s < end)[None, :], scores, float("-inf"))
    new = tl.maximum(biggest, tl.max(scores, axis=1))
    p = tl.exp(scores - new[:, None])
    shrink = tl.exp(biggest - new)
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new, total, acc


# A program reads one split of the keys and values of one kv head. Grid: G, P.
# S is not specialised: no length of the cache compiles anything new.
@triton.jit(do_not_specialize=["S"])
def _attention_kernel(
    qkv_ptr,  # [(H + 2G) * C] fp32
    cos_ptr,  # [positions, C / 2] fp32
    sin_ptr,
    k_ptr,  # [G, S, C]
    v_ptr,  # [G, S, C]
    sinks_ptr,  # [H], read if SINGLE
    position_ptr,  # [1] int32
    acc_ptr,  # [G, P, GROUP, C] fp32, written unless SINGLE
    stats_ptr,  # [G, P, GROUP, 2] fp32, likewise: running maximum and sum
    out_ptr,  # [H, C] fp32, written if SINGLE
    trace_ptr,  # [programs, 3] int64 or None
    S,
    RING: tl.constexpr,  # slots that a window's positions go round in
    C: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SINGLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    kv_head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    h = tl.arange(0, GROUP)
    c = tl.arange(0, C)
    own = (h < HEADS_PER_KV)[:, None]
    head = kv_head * HEADS_PER_KV + h
    # The projection in front lets this kernel start after its own wait: the position and what
    # earlier steps cached are there already, only qkv must be waited for. Programs without work
    # end at once: split 0 always waits.
    position = tl.load(position_ptr)
    begin, end, used = _positions_of(split, splits, position, WINDOW, BLOCK_S)
    if split < used:
        cos = tl.load(cos_ptr + position * (C // 2) + c % (C // 2))
        sin = tl.load(sin_ptr + position * (C // 2) + c % (C // 2))
        sin = tl.where(c < C // 2, -sin, sin)
        s = begin + tl.arange(0, BLOCK_S)
        slot = (kv_head * S + (s % RING if WINDOW > 0 else s))[:, None] * C + c[None, :]
        cached = (s < tl.minimum(end, position))[:, None]
        k = tl.load(k_ptr + slot, mask=cached, other=0.0)
        v = tl.load(v_ptr + slot, mask=cached, other=0.0)
        wait_for_front(EARLY)
        stamp(trace_ptr, 1)
        heads = tl.num_programs(0) * HEADS_PER_KV
        q = _rotated(qkv_ptr + head[:, None] * C, cos, sin, own, C).to(k_ptr.dtype.element_ty)
        one = tl.zeros((1, 1), tl.int64)
        k_at = qkv_ptr + (heads + kv_head) * C + one
        k_new = _rotated(k_at, cos, sin, one == 0, C).to(k_ptr.dtype.element_ty)
        v_at = qkv_ptr + (heads + tl.num_programs(0) + kv_head) * C + one
        v_new = tl.load(v_at + c[None, :]).to(v_ptr.dtype.element_ty)
        if split == used - 1:
            place = position % RING if WINDOW > 0 else position
            at = (kv_head * S + place) * C + c[None, :]
            tl.store(k_ptr + at, k_new)
            tl.store(v_ptr + at, v_new)
        biggest = tl.full((GROUP,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP,), tl.float32)
        acc = tl.zeros((GROUP, C), tl.float32)
        # This token's own row may not be in the cache yet.
        newest = (s == position)[:, None]
        k = tl.where(newest, k_new, k)
        v = tl.where(newest, v_new, v)
        biggest, total, acc = _attend(q, k, v, s, end, biggest, total, acc, SCALE)
        for s0 in range(begin + BLOCK_S, end, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            slot = (kv_head * S + (s % RING if WINDOW > 0 else s))[:, None] * C + c[None, :]
            cached = (s < tl.minimum(end, position))[:, None]
            newest = (s == position)[:, None]
            k = tl.where(newest, k_new, tl.load(k_ptr + slot, mask=cached, other=0.0))
            v = tl.where(newest, v_new, tl.load(v_ptr + slot, mask=cached, other=0.0))
            biggest, total, acc = _attend(q, k, v, s, end, biggest, total, acc, SCALE)
        if SINGLE:
            sink = tl.load(sinks_ptr + head, mask=h < HEADS_PER_KV, other=0.0).to(tl.float32)
            new = tl.maximum(biggest, sink)
            shrink = tl.exp(biggest - new)
            total = total * shrink + tl.exp(sink - new)
            out = out_ptr + head[:, None] * C + c[None, :]
            tl.store(out, acc * (shrink / total)[:, None], mask=own)
        else:
            part = (kv_head * splits + split) * GROUP + h
            tl.store(acc_ptr + part[:, None] * C + c[None, :], acc, mask=own)
            tl.store(stats_ptr + part * 2, biggest, mask=h < HEADS_PER_KV)
            tl.store(stats_ptr + part * 2 + 1, total, mask=h < HEADS_PER_KV)
        stamp(trace_ptr, 2)


# A program merges the splits of one query head. Grid: H.
@triton.jit
def _merge_kernel(
    acc_ptr,
    stats_ptr,
    sinks_ptr,
    position_ptr,
    out_ptr,
    trace_ptr,
    C: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    head = tl.program_id(0)
    c = tl.arange(0, C)
    split = tl.arange(0, SPLITS)
    sink = tl.load(sinks_ptr + head).to(tl.float32)
    _, _, used = _positions_of(0, SPLITS, tl.load(position_ptr), WINDOW, BLOCK_S)
    part = (head // HEADS_PER_KV * SPLITS + split) * GROUP + head % HEADS_PER_KV
    there = split < used
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    peaks = tl.load(stats_ptr + part * 2, mask=there, other=float("-inf"))
    sums = tl.load(stats_ptr + part * 2 + 1, mask=there, other=0.0)
    accs = tl.load(acc_ptr + part[:, None] * C + c[None, :], mask=there[:, None], other=0.0)
    biggest = tl.maximum(tl.max(peaks, axis=0), sink)
    grow = tl.exp(peaks - biggest)
    total = tl.sum(sums * grow, axis=0) + tl.exp(sink - biggest)
    out = tl.sum(accs * grow[:, None], axis=0) / total
    tl.store(out_ptr + head * C + c, out)
    stamp(trace_ptr, 2)


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
    trace: tuple[Tensor | None, Tensor | None] = (None, None),
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

    The kernel in front must let this one start only after its own wait, because the position and
    the cache are read early (see kernels/dependent_launch.py).
    Reads 4 * G * C bytes a visible position, which sets its time for long contexts.
    """
    kv_heads, slots, width = k_cache.shape
    heads = out.shape[0]
    assert k_cache.dtype == v_cache.dtype
    single = 0 < window <= BLOCK_S
    sizes = {
        "C": width,
        "HEADS_PER_KV": heads // kv_heads,
        "WINDOW": window,
        "GROUP": acc.shape[2],
        "BLOCK_S": BLOCK_S,
    }
    _attention_kernel[(kv_heads, 1 if single else SPLITS)](
        qkv,
        *rope,
        k_cache,
        v_cache,
        sinks,
        position,
        acc,
        stats,
        out,
        trace[0],
        slots,
        RING=slots if window else 0,
        SCALE=width**-0.5,
        SINGLE=single,
        num_warps=4,
        num_stages=NUM_STAGES,
        **sizes,
        **early_start(qkv),
    )
    if not single:
        _merge_kernel[(heads,)](
            acc,
            stats,
            sinks,
            position,
            out,
            trace[1],
            SPLITS=SPLITS,
            num_warps=2,
            **sizes,
            **early_start(qkv),
        )
    return out


def head_group(num_heads: int, num_kv_heads: int) -> int:
    """Rows of the score tile: query heads of a kv head, at least the 16 of a tensor-core tile."""
    return max(16, triton.next_power_of_2(num_heads // num_kv_heads))
