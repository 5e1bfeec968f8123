"""Number formats of stored weights, as frozen descriptors.

Every property of a stored weight comes from its QuantFormat, never from a dtype alone. To add a
format: one descriptor here, one codec module beside this file, one row in quant/codecs.py.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantFormat:
    """One number format of a weight matrix [..., rows, columns]."""

    name: str  # as users and file names spell it
    value_dtype: torch.dtype  # storage; uint8 holds two FP4 codes, low nibble first
    value_bits: int  # bits of one code
    block: tuple[int, int] | None  # (rows, columns) that share one scale; 0 means the whole axis
    scale_dtype: torch.dtype | None  # storage; uint8 holds E8M0
    max_value: float  # largest finite code value
    tensor_scale: bool = False  # whether one more fp32 scale covers the whole tensor

    @property
    def values_per_byte(self) -> int:
        """Codes in one stored byte: 2 for FP4, 1 for FP8."""
        return max(1, 8 // self.value_bits)


BF16 = QuantFormat("bf16", torch.bfloat16, 16, None, None, 3.3895313892515355e38)
MXFP4 = QuantFormat("mxfp4", torch.uint8, 4, (1, 32), torch.uint8, 6.0)
FP8_BLOCK128 = QuantFormat("fp8_block128", torch.float8_e4m3fn, 8, (128, 128), torch.float32, 448.0)
FP8_ROW = QuantFormat("fp8_row", torch.float8_e4m3fn, 8, (1, 0), torch.float32, 448.0)

FP8_BLOCK128_E8M0 = QuantFormat(
    "fp8_block128_e8m0", torch.float8_e4m3fn, 8, (128, 128), torch.uint8, 448.0
)
MXFP8 = QuantFormat("mxfp8", torch.float8_e4m3fn, 8, (1, 32), torch.uint8, 448.0)
NVFP4 = QuantFormat("nvfp4", torch.uint8, 4, (1, 16), torch.float8_e4m3fn, 6.0, tensor_scale=True)

FORMATS: dict[str, QuantFormat] = {
    f.name: f for f in (BF16, MXFP4, MXFP8, NVFP4, FP8_BLOCK128, FP8_BLOCK128_E8M0, FP8_ROW)
}

# What `--to` calls the formats that a checkpoint can be converted to.
TARGETS: dict[str, QuantFormat] = {
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "mxfp8": MXFP8,
    "fp8-block": FP8_BLOCK128,
    "fp8-channel": FP8_ROW,
    "bf16": BF16,
}
