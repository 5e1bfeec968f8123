"""E4M3 (fn: no infinities), the eight-bit element and NVFP4's block scale.

code  s e e e e m m m    0x7F and 0xFF are NaN, 0x7E is 448, 0x01 is 2^-9
"""

import torch
from torch import Tensor

from quant.minifloat import E4M3, magnitude_codes_

E4M3_MAX = 448.0


def decode_e4m3(codes: Tensor) -> Tensor:
    """Codes of dtype float8_e4m3fn to fp32, exact; in new memory."""
    # From a table: the library's cast takes three times as long on a CPU.
    every = torch.arange(256, dtype=torch.uint8, device=codes.device).view(torch.float8_e4m3fn)
    places = codes.view(torch.uint8).reshape(-1).int()
    return every.float().index_select(0, places).view(codes.shape)


def nearest_e4m3(magnitudes: Tensor) -> Tensor:
    """fp32 >= 0 to dtype float8_e4m3fn: nearest, ties to even, saturating at 448."""
    return magnitude_codes_(magnitudes.clone(), E4M3).to(torch.uint8).view(torch.float8_e4m3fn)
