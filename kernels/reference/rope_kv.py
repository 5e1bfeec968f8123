"""Plain-torch twin of kernels/rope_kv.py, and the tables both read.

T tokens, H query heads, G kv heads, C head width, S slots of the cache.
"""

import math
from typing import Protocol

import torch
from torch import Tensor


class Yarn(Protocol):
    """Numbers of YaRN (arXiv 2309.00071); factor 1 is plain rope."""

    @property
    def theta(self) -> float: ...

    @property
    def factor(self) -> float: ...

    @property
    def beta_fast(self) -> float: ...

    @property
    def beta_slow(self) -> float: ...

    @property
    def original_context(self) -> int: ...

    @property
    def truncate(self) -> bool: ...


def inverse_frequencies(rope: Yarn, head_width: int) -> Tensor:
    """[C / 2] fp64: plain frequencies blended with those divided by factor, by YaRN's ramp."""
    half = head_width // 2
    base = rope.theta ** (-torch.arange(half, dtype=torch.float64) / half)
    if rope.factor == 1.0:
        return base

    def edge(beta: float) -> float:
        turns = rope.original_context / (2 * math.pi * beta)
        return half * math.log(turns) / math.log(rope.theta)

    low, high = edge(rope.beta_fast), edge(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(half, dtype=torch.float64) - low) / width).clamp(0, 1)
    return base * (1 - ramp) + base / rope.factor * ramp


def rope_table(rope: Yarn, head_width: int, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, C / 2] fp32, both times YaRN's 0.1 ln(factor) + 1, on positions' device."""
    frequencies = inverse_frequencies(rope, head_width).to(positions_T.device)
    angles = positions_T.double()[:, None] * frequencies
    growth = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1.0 else 1.0
    return (angles.cos() * growth).float(), (angles.sin() * growth).float()


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q: Tensor,
) -> Tensor:
    """Same arguments and results as the kernel."""
    tokens, heads, width = q.shape
    kv_heads, slots, _ = k_cache.shape
    positions = int(position) + torch.arange(tokens, device=q.device)
    x_THC = qkv.float().view(tokens, heads + 2 * kv_heads, width)
    first, second = x_THC[:, : heads + kv_heads].chunk(2, dim=-1)
    c, s = cos[positions][:, None], sin[positions][:, None]
    rotated = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    q.copy_(rotated[:, :heads])
    k_cache[:, positions % slots] = rotated[:, heads:].transpose(0, 1).to(k_cache.dtype)
    v_cache[:, positions % slots] = x_THC[:, heads + kv_heads :].transpose(0, 1).to(v_cache.dtype)
    return q
