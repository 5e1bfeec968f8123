"""E2M1, the four-bit element of MXFP4 and NVFP4.

code  s e e m      value  0 0.5 1 1.5 2 3 4 6, then the negatives (8 is -0)
byte  hhhh llll    low nibble: even column, high nibble: odd column
"""

from functools import lru_cache

import torch
from torch import Tensor

E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_ALL_VALUES = E2M1_VALUES + tuple(-value for value in E2M1_VALUES)


def decode_codes(packed: Tensor) -> Tensor:
    """Bytes [..., n] to E2M1 values [..., 2n] in fp32, low nibble first."""
    found = _pairs(packed.device).index_select(0, packed.reshape(-1).int()).view(torch.float32)
    return found.view(*packed.shape[:-1], 2 * packed.shape[-1])


def pack(codes: Tensor) -> Tensor:
    """Contiguous codes [..., 2n] to bytes [..., n], low nibble first."""
    pairs = codes.view(torch.int16)  # the odd column's code in the high byte
    return (pairs | pairs >> 4).bitwise_and_(0xFF).to(torch.uint8)


@lru_cache
def _pairs(device: torch.device) -> Tensor:
    """Both fp32 values of each byte, as one int64."""
    with torch.inference_mode(False):  # it outlives the mode of whoever asks first
        pairs = [[low, high] for high in _ALL_VALUES for low in _ALL_VALUES]
        return torch.tensor(pairs, dtype=torch.float32, device=device).view(torch.int64)[:, 0]
