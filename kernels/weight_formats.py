"""What the expert kernels need to know of a number format, read from its descriptor.

    codes   bits of one weight              a 16-byte vector holds
    e2m1    4: s e e m                      32 weights, 8 in a 32-bit word
    e4m3    8: s e e e e m m m              16 weights, 8 in a 64-bit word
    bf16    16                               8 weights, 4 in a 64-bit word

Scales are E8M0 bytes, E4M3 bytes, fp32 or none; each is shared by a block of rows and columns.
A new format that is made of these needs its row in quant/formats.py and nothing here.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.formats import QuantFormat
from quant.tensor import QuantTensor


@dataclass(frozen=True)
class Codes:
    """How the weights of a format lie in words."""

    name: str
    word: torch.dtype
    columns: int  # weights in a word
    unscale: float  # moe_gemv decodes a code as its value divided by this


CODES = {
    4: Codes("e2m1", torch.int32, 8, 2.0**14),
    8: Codes("e4m3", torch.int64, 8, 2.0**12),
    16: Codes("bf16", torch.int64, 4, 1.0),
}
_SCALES = {None: "none", torch.uint8: "e8m0", torch.float8_e4m3fn: "e4m3", torch.float32: "fp32"}


def codes_of(format: QuantFormat) -> Codes:
    """How a format's weights lie in words."""
    return CODES[format.value_bits]


def scales_of(format: QuantFormat) -> str:
    """What a format's scales are: "e8m0", "e4m3", "fp32" or "none"."""
    return _SCALES[format.scale_dtype]


def scale_block(weight: QuantTensor) -> tuple[int, int]:
    """Rows and columns of a weight that share a scale; the whole of it if it has none."""
    rows, columns = weight.shape[-2:]
    block = weight.format.block or (rows, columns)
    return block[0] or rows, block[1] or columns


def as_words(weight: QuantTensor) -> Tensor:
    """The values as the words that the kernels load."""
    assert weight.values.is_contiguous(), "expert weights must lie in rows"
    return weight.values.view(codes_of(weight.format).word)


def scale_bytes(weight: QuantTensor) -> Tensor | None:
    """The scales as the kernels load them: E4M3 as bytes, because Ampere has no such type."""
    if weight.scales is None:
        return None
    assert weight.scales.is_contiguous()
    return weight.scales.view(torch.uint8) if weight.scales.element_size() == 1 else weight.scales


@triton.jit
def decode_scale(stored, SCALES: tl.constexpr):
    """fp32 scales, exact, of E8M0 or E4M3 bytes or of fp32."""
    if SCALES == "e8m0":
        byte = stored.to(tl.int32)
        # The byte is the exponent; byte 0 stands for 2^-127, a subnormal.
        return tl.where(byte == 0, 1 << 22, byte << 23).to(tl.float32, bitcast=True)
    elif SCALES == "e4m3":
        byte = stored.to(tl.int32)
        bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
        return bits.to(tl.float32, bitcast=True) * 2.0**120
    else:
        tl.static_assert(SCALES == "fp32")
        return stored
