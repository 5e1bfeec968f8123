"""A token's vector as the expert kernels read it: one of two forms, by the weights' format.

Planes, for weights of 8 and 16 bits: fp16 numbers in the order of the codes of a word.
Digits, for weights of 4 bits: groups of 32 as integers of a common scale, a power of two that
brings the largest to [2^13, 2^14]; each integer is 256 * high + low, both from -128 to 127. Tensor
cores multiply them exactly; a group's error is that of fp16 or less.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.formats import QuantFormat

GROUP = 32  # numbers that share a scale in digits
BASE = 256
_BITS = 13  # the largest of a group is brought to two to this power or up to twice that
_SPARE = 128  # bytes of zeros behind the digits, for lanes of a tile that hold no column


@dataclass(frozen=True)
class PackedVectors:
    """Vectors of one width, packed.

    values:   planes [n, 4, width / 8, 2] fp16 or digits [n, 2, width] int8
    unscale:  fp32; what integers or planes are multiplied with: [n, width / 32] or [1]
    """

    values: Tensor
    unscale: Tensor

    @property
    def digits(self) -> bool:
        """Whether the form is digits."""
        return self.values.dtype == torch.int8


def takes_digits(format: QuantFormat) -> bool:
    """Whether weights of a format are multiplied with digits."""
    return format.value_bits == 4


def packed_vectors(
    format: QuantFormat, count: int, width: int, device: torch.device, unscale: float = 1.0
) -> PackedVectors:
    """Buffers of zeros, in the form that weights of this format are multiplied with.

    unscale: of planes, where no kernel writes it
    """
    if not takes_digits(format):
        planes = torch.zeros((count, 4, width // 8, 2), dtype=torch.float16, device=device)
        return PackedVectors(planes, torch.full((1,), unscale, device=device))
    store = torch.zeros(count * 2 * width + _SPARE, dtype=torch.int8, device=device)
    digits = store[: count * 2 * width].view(count, 2, width)
    return PackedVectors(digits, torch.zeros((count, width // GROUP), device=device))


def store_vector(packed: PackedVectors, index: int, x: Tensor, unscale: float = 1.0) -> None:
    """Pack x [width] as the vector of this index; unscale is the caller's choice for planes."""
    if not packed.digits:
        packed.unscale.fill_(unscale)
        packed.values[index] = pack_planes(x / unscale)
        return
    groups = x.float().unflatten(-1, (-1, GROUP))
    exponent = torch.frexp(groups.abs().amax(-1).clamp(min=1e-30)).exponent - 1 - _BITS
    packed.unscale[index] = torch.ldexp(torch.ones_like(groups[..., 0]), exponent)
    integers = torch.round(groups / packed.unscale[index][..., None])
    high = torch.floor((integers + BASE // 2) / BASE)
    packed.values[index, 0] = high.flatten().to(torch.int8)
    packed.values[index, 1] = (integers - BASE * high).flatten().to(torch.int8)


def unpack_vectors(packed: PackedVectors) -> Tensor:
    """fp32 [n, width]."""
    if not packed.digits:
        return packed.values.float().movedim(-3, -1).flatten(-3) * packed.unscale
    high, low = packed.values.float().unbind(1)
    integers = (BASE * high + low).unflatten(-1, (-1, GROUP))
    return (integers * packed.unscale[..., None]).flatten(-2)


def pack_planes(x: Tensor) -> Tensor:
    """[..., n] to [..., 4, n / 8, 2] fp16: element (i, w, h) is x[8 w + 4 h + i]."""
    return x.unflatten(-1, (-1, 2, 4)).movedim(-1, -3).to(torch.float16).contiguous()


def activation_scale(limit: float | None) -> float:
    """Power of two that planes of a SwiGLU's outputs are stored with.

    limit * (limit + 1) fits if it clamps; else 16,000 does, and what is larger becomes infinite.
    """
    if limit is None:
        return 4.0
    return 2.0 ** math.floor(math.log2(60000.0 / (limit * (limit + 1.0))))


@triton.jit
def _power_of_two(x, BITS: tl.constexpr):
    """The power of two that brings x >= 1e-30 to [2^BITS, 2^(BITS + 1)), and its inverse."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) - 127
    scale = ((BITS - exponent + 127) << 23).to(tl.float32, bitcast=True)
    return scale, ((exponent - BITS + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def digits_of(x):
    """Groups [N, 32] fp32 as high and low digits [N, 32], in fp32, and their unscale [N]."""
    scale, unscale = _power_of_two(tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30), 13)
    integers = tl.floor(x * scale[:, None] + 0.5)
    high = tl.floor((integers + 128.0) * (1.0 / 256))
    # What is not finite shows in the scale.
    return high, integers - 256.0 * high, unscale + tl.sum(x * 0.0, axis=1)


@triton.jit
def store_packed(
    x,  # [BLOCK_D] fp32; zeros from D on
    values_ptr,
    unscale_ptr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """Pack one vector."""
    if DIGITS:
        high, low, unscale = digits_of(tl.reshape(x, (BLOCK_D // 32, 32)))
        group = tl.arange(0, BLOCK_D // 32)
        d = group[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(values_ptr + d, high.to(tl.int8), mask=d < D)
        tl.store(values_ptr + D + d, low.to(tl.int8), mask=d < D)
        tl.store(unscale_ptr + group, unscale, mask=group < D // 32)
    else:
        # The largest magnitude goes to [2^14, 2^15): products with codes, scaled as
        # kernels/packed_dot.py says, and sums of four stay in fp16's normal range.
        scale, unscale = _power_of_two(tl.maximum(tl.max(tl.abs(x)), 1e-30), 14)
        d = tl.arange(0, BLOCK_D)
        place = ((d & 3) * (D // 8) + (d >> 3)) * 2 + ((d >> 2) & 1)
        tl.store(values_ptr + place, (x * scale).to(tl.float16), mask=d < D)
        tl.store(unscale_ptr, unscale)
