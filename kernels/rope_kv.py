"""Rotary embedding of q and k, and the write of k and v into the cache.

T tokens, H query heads, G kv heads, C head width, S slots of the cache.
"""

import triton
import triton.language as tl
from torch import Tensor


# A program handles one head (q, k or v) of one token. Grid: T, H + 2G.
@triton.jit
def _rope_kv_kernel(
    qkv_ptr,  # [T, (H + 2G) * C]
    cos_ptr,  # [positions, C / 2] fp32
    sin_ptr,
    position_ptr,  # [1] int32: position of token 0
    k_ptr,  # [G, S, C]
    v_ptr,
    q_ptr,  # [T, H, C]
    S: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(position_ptr) + tl.program_id(0)
    half: tl.constexpr = C // 2
    i = tl.arange(0, half)
    source = qkv_ptr + (token * (H + 2 * G) + head) * C
    first = tl.load(source + i).to(tl.float32)
    second = tl.load(source + half + i).to(tl.float32)
    if head < H + G:
        cos = tl.load(cos_ptr + position.to(tl.int64) * half + i)
        sin = tl.load(sin_ptr + position.to(tl.int64) * half + i)
        rotated = first * cos - second * sin
        second = second * cos + first * sin
        first = rotated
    slot = (position % S).to(tl.int64)
    if head < H:
        target = q_ptr + (token * H + head) * C
    elif head < H + G:
        target = k_ptr + ((head - H) * S + slot) * C
    else:
        target = v_ptr + ((head - H - G) * S + slot) * C
    tl.store(target + i, first.to(q_ptr.dtype.element_ty))
    tl.store(target + half + i, second.to(q_ptr.dtype.element_ty))


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
    q:         [T, H, C] of the caches' dtype, written
    """
    tokens, heads, width = q.shape
    kv_heads, slots, _ = k_cache.shape
    assert tokens <= slots, (tokens, slots)
    assert q.dtype == k_cache.dtype == v_cache.dtype
    _rope_kv_kernel[(tokens, heads + 2 * kv_heads)](
        qkv, cos, sin, position, k_cache, v_cache, q,
        S=slots, H=heads, G=kv_heads, C=width, num_warps=1,
    )  # fmt: skip
    return q
