"""Attention of a chunk of tokens over the cache: causal, with sinks and sliding windows.

T tokens, H query heads, G kv heads, C head width, S slots of the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)


# A program computes BLOCK_M rows of one kv head; a row is one query head of one token, so that
# heads that share keys share the reads. Grid: T * (H / G) / BLOCK_M, G.
# T is not specialised: no prompt length compiles anything new.
@triton.jit(do_not_specialize=["T"])
def _prefill_attention_kernel(
    q_ptr,  # [T, H, C]
    k_ptr,  # [G, S, C]
    v_ptr,
    sinks_ptr,  # [H]
    position_ptr,  # [1] int32: position of token 0
    out_ptr,  # [T, H * C]
    T,
    S: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The last rows have the most keys to read: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    start = tl.load(position_ptr)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // HEADS_PER_KV
    head = kv_head * HEADS_PER_KV + row % HEADS_PER_KV
    inside = token < T
    c = tl.arange(0, C)
    place = (token * H + head)[:, None] * C + c[None, :]
    q = tl.load(q_ptr + place, mask=inside[:, None], other=0.0)
    query_position = start + token
    first = 0
    if WINDOW > 0:
        first = tl.maximum(start + block * BLOCK_M // HEADS_PER_KV - WINDOW + 1, 0)
    last_token = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // HEADS_PER_KV, T - 1)
    end = start + last_token + 1
    # The sink opens the running softmax: one logit with no value, not scaled.
    sink = tl.load(sinks_ptr + head, mask=inside, other=0.0).to(tl.float32)
    biggest = sink * _LOG2_E
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    acc = tl.zeros((BLOCK_M, C), tl.float32)
    for n0 in range(first, end, BLOCK_N):
        key = n0 + tl.arange(0, BLOCK_N)
        slot = (kv_head * S + key % S)[:, None] * C + c[None, :]
        k = tl.load(k_ptr + slot, mask=(key < end)[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * _LOG2_E)
        distance = query_position[:, None] - key[None, :]
        seen = distance >= 0
        if WINDOW > 0:
            seen = seen & (distance < WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(biggest, tl.max(scores, axis=1))
        p = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(biggest - new)
        total = total * shrink + tl.sum(p, axis=1)
        v = tl.load(v_ptr + slot, mask=(key < end)[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        biggest = new
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, out, mask=inside[:, None])


def sink_attention_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sinks: Tensor,
    position: Tensor,
    out: Tensor,
    *,
    window: int,
) -> Tensor:
    """Attention of T tokens at position, position + 1, ... over themselves and what came before.

    q:        [T, H, C] after rope, of the caches' dtype
    k_cache:  [G, S, C]; position j stands in slot j % S, the tokens' own keys included. With a
              window, S is at least window + T - 1
    v_cache:  [G, S, C]
    sinks:    [H], one logit a head in the denominator
    position: [1] int32 on the device
    out:      [T, H * C], written
    window:   positions seen, the query counted; 0 sees all

    4 * T * (keys seen) * H * C operations set its time.
    """
    tokens, heads, width = q.shape
    kv_heads, slots, _ = k_cache.shape
    heads_per_kv = heads // kv_heads
    rows = tokens * heads_per_kv
    block_m = rows_per_program(tokens, heads_per_kv)
    _prefill_attention_kernel[(triton.cdiv(rows, block_m), kv_heads)](
        q,
        k_cache,
        v_cache,
        sinks,
        position,
        out,
        tokens,
        S=slots,
        H=heads,
        C=width,
        HEADS_PER_KV=heads_per_kv,
        WINDOW=window,
        SCALE=width**-0.5,
        BLOCK_M=block_m,
        BLOCK_N=64,
        num_warps=8 if block_m == 128 else 4,
        num_stages=3,
    )
    return out


def rows_per_program(tokens: int, heads_per_kv: int) -> int:
    """Rows of a program: large tiles once there are enough of them to fill a GPU."""
    return 128 if tokens * heads_per_kv >= 2048 else 32
