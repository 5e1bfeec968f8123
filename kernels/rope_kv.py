"""Rotary embedding of q and k, and the write of k and v into the cache.

T tokens, H query heads, G kv heads, C head width, S slots of the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

HEADS_PER_PROGRAM = 8


# A program handles BLOCK_H heads (of q, k or v, in that order) of one token.
# Grid: T, (H + 2G) / BLOCK_H.
# S is not specialised: no length of the cache compiles anything new.
@triton.jit(do_not_specialize=["S"])
def _rope_kv_kernel(
    qkv_ptr,  # [T, (H + 2G) * C]
    cos_ptr,  # [positions, C / 2] fp32
    sin_ptr,
    position_ptr,  # [1] int32: position of token 0
    k_ptr,  # [G, S, C]
    v_ptr,
    q_ptr,  # [T, H, C]
    S,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    HALF: tl.constexpr = C // 2
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr) + token
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, HALF)
    inside = (head < H + 2 * G)[:, None]
    source = qkv_ptr + (token * (H + 2 * G) + head)[:, None] * C + i[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    turns = (head < H + G)[:, None]
    cos = tl.where(turns, tl.load(cos_ptr + position * HALF + i)[None, :], 1.0)
    sin = tl.where(turns, tl.load(sin_ptr + position * HALF + i)[None, :], 0.0)
    rotated = (first * cos - second * sin).to(q_ptr.dtype.element_ty)
    turned = (second * cos + first * sin).to(q_ptr.dtype.element_ty)
    q = q_ptr + (token * H + head)[:, None] * C + i[None, :]
    tl.store(q, rotated, mask=(head < H)[:, None])
    tl.store(q + HALF, turned, mask=(head < H)[:, None])
    slot = position % S
    k = k_ptr + ((head - H) * S + slot)[:, None] * C + i[None, :]
    is_k = ((head >= H) & (head < H + G))[:, None]
    tl.store(k, rotated, mask=is_k)
    tl.store(k + HALF, turned, mask=is_k)
    v = v_ptr + ((head - H - G) * S + slot)[:, None] * C + i[None, :]
    is_v = ((head >= H + G) & (head < H + 2 * G))[:, None]
    tl.store(v, rotated, mask=is_v)
    tl.store(v + HALF, turned, mask=is_v)


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q: Tensor,
) -> Tensor:
    """Rotate q and k of T tokens that stand at position, position + 1, ...; cache k and v.

    qkv:       [T, (H + 2G) * C] any float dtype; heads of q, then k, then v
    cos, sin:  [positions, C / 2] fp32 tables of rope_table; pairs are (i, i + C / 2)
    position:  [1] int32 on the device
    k_cache:   [G, S, C], written at slot (position + t) % S; T is at most S
    v_cache:   [G, S, C], likewise, not rotated
    q:         [T, H, C] of the caches' dtype, written and returned

    Moves about 2 * T * (H + 2G) * C elements.
    """
    tokens, heads, width = q.shape
    kv_heads, slots, _ = k_cache.shape
    assert tokens <= slots, (tokens, slots)
    assert q.dtype == k_cache.dtype == v_cache.dtype
    programs = triton.cdiv(heads + 2 * kv_heads, HEADS_PER_PROGRAM)
    _rope_kv_kernel[(tokens, programs)](
        qkv, cos, sin, position, k_cache, v_cache, q,
        S=slots, H=heads, G=kv_heads, C=width, BLOCK_H=HEADS_PER_PROGRAM, num_warps=1,
    )  # fmt: skip
    return q
