"""E2M1, the four-bit element of MXFP4 and NVFP4.

code  s e e m      value  0 0.5 1 1.5 2 3 4 6, then the negatives (8 is -0)
byte  hhhh llll    low nibble: even column, high nibble: odd column
"""

import torch
from torch import Tensor

E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Halfway points between neighbours; a tie goes to the even code, so odd upper codes need "greater".
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def decode_codes(packed: Tensor) -> Tensor:
    """Bytes [..., n] to E2M1 values [..., 2n] in fp32, low nibble first."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=packed.device)
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    return table[codes.long()]


def encode_codes(scaled: Tensor) -> Tensor:
    """E2M1 codes (uint8, 0 to 15) of fp32 values: nearest, ties to even, saturating at 6."""
    magnitude = scaled.abs()
    code = torch.zeros_like(scaled, dtype=torch.uint8)
    for upper, midpoint in enumerate(_MIDPOINTS, start=1):
        over = magnitude > midpoint if upper % 2 else magnitude >= midpoint
        code += over.to(torch.uint8)
    return code | (torch.signbit(scaled).to(torch.uint8) << 3)


def pack(codes: Tensor) -> Tensor:
    """Codes [..., 2n] to bytes [..., n], low nibble first."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
