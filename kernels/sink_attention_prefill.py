"""Attention of a chunk of tokens over the cache: causal, with sinks and sliding windows.

T tokens, H query heads, G kv heads, C head width, S slots of the cache.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tile:
    """How a program walks its keys."""

    block_n: int  # keys in one step
    num_warps: int
    num_stages: int  # steps in flight


# The best measured tile for each number of rows in a program.
TILES = {32: Tile(64, 4, 3), 128: Tile(64, 8, 3)}


@triton.jit
def _read_keys(
    q,  # [BLOCK_M, C]
    k_ptr,  # [S, C] of one kv head
    v_ptr,
    query_position,  # [BLOCK_M]
    begin,
    stop,
    end,  # keys from here on are not in the cache
    acc,
    total,
    biggest,
    RING: tl.constexpr,  # slots that a window's keys go round in
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    ALL_SEEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One pass of the running softmax over keys begin to stop; without masks if ALL_SEEN."""
    c = tl.arange(0, C)
    for n0 in range(begin, stop, BLOCK_N):
        key = n0 + tl.arange(0, BLOCK_N)
        # Only a window's ring wraps; a full cache has a slot for every position.
        slot = (key % RING if WINDOW > 0 else key)[:, None] * C + c[None, :]
        # What lies beyond the end may be NaN, and 0 * NaN is NaN: it must not be read.
        cached = None if ALL_SEEN else (key < end)[:, None]
        k = tl.load(k_ptr + slot, mask=cached)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not ALL_SEEN:
            distance = query_position[:, None] - key[None, :]
            seen = distance >= 0
            if WINDOW > 0:
                seen = seen & (distance < WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(biggest, tl.max(scores, axis=1) * SCALE_LOG2)
        p = tl.exp2(scores * SCALE_LOG2 - new[:, None])
        shrink = tl.exp2(biggest - new)
        total = total * shrink + tl.sum(p, axis=1)
        v = tl.load(v_ptr + slot, mask=cached, other=None if ALL_SEEN else 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        biggest = new
    return acc, total, biggest


# A program computes BLOCK_M rows of one kv head; a row is one query head of one token, so that
# heads that share keys share the reads. Grid: G, T * (H / G) / BLOCK_M.
# T and S are not specialised: no prompt length and no length of the cache compiles anything new.
@triton.jit(do_not_specialize=["T", "S"])
def _prefill_attention_kernel(
    q_ptr,  # [T, H, C]
    k_ptr,  # [G, S, C]
    v_ptr,
    sinks_ptr,  # [H]
    position_ptr,  # [1] int32: position of token 0
    out_ptr,  # [T, H * C]
    T,
    S,
    RING: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    SCALE_LOG2: tl.constexpr = SCALE * _LOG2_E
    kv_head = tl.program_id(0).to(tl.int64)
    # The last rows have the most keys to read: they start first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    start = tl.load(position_ptr)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // HEADS_PER_KV
    head = kv_head * HEADS_PER_KV + row % HEADS_PER_KV
    inside = token < T
    c = tl.arange(0, C)
    place = (token * H + head)[:, None] * C + c[None, :]
    q = tl.load(q_ptr + place, mask=inside[:, None], other=0.0)
    query_position = start + token
    first_query = start + block * BLOCK_M // HEADS_PER_KV
    last_token = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // HEADS_PER_KV, T - 1)
    end = start + last_token + 1
    k_ptr += kv_head * (S * C)
    v_ptr += kv_head * (S * C)
    # The sink opens the running softmax: one logit with no value, not scaled.
    biggest = tl.load(sinks_ptr + head, mask=inside, other=0.0).to(tl.float32) * _LOG2_E
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    acc = tl.zeros((BLOCK_M, C), tl.float32)
    if WINDOW > 0:
        masked_from = tl.maximum(first_query - WINDOW + 1, 0)
    else:
        # Whole blocks of keys that every row sees.
        masked_from = (first_query + 1) // BLOCK_N * BLOCK_N
        acc, total, biggest = _read_keys(
            q, k_ptr, v_ptr, query_position, 0, masked_from, end, acc, total, biggest,
            RING, C, WINDOW, SCALE_LOG2, True, BLOCK_N,
        )  # fmt: skip
    acc, total, biggest = _read_keys(
        q, k_ptr, v_ptr, query_position, masked_from, end, end, acc, total, biggest,
        RING, C, WINDOW, SCALE_LOG2, False, BLOCK_N,
    )  # fmt: skip
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
              window, S is at least window + T - 1; without, at least position + T
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
    block_m = rows_per_program(tokens, heads_per_kv)
    tile = TILES[block_m]
    _prefill_attention_kernel[(kv_heads, triton.cdiv(tokens * heads_per_kv, block_m))](
        q,
        k_cache,
        v_cache,
        sinks,
        position,
        out,
        tokens,
        slots,
        RING=slots if window else 0,
        H=heads,
        C=width,
        HEADS_PER_KV=heads_per_kv,
        WINDOW=window,
        SCALE=width**-0.5,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def rows_per_program(tokens: int, heads_per_kv: int) -> int:
    """Rows of a program: large tiles once there are enough of them to fill a GPU."""
    return 128 if tokens * heads_per_kv >= 2048 else 32
