"""RMS norm of many tokens. T tokens, D model width."""

import torch
import triton
import triton.language as tl
from torch import Tensor


# A program normalises one token. Grid: T.
@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, D: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row + d, mask=d < D, other=0.0)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x) / D + EPS) * weight
    tl.store(out_ptr + row + d, y.to(out_ptr.dtype.element_ty), mask=d < D)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight, multiplied in fp32 and cast once.

    x_TD:      [T, D] fp32
    weight_D:  [D] any float dtype
    returns    [T, D] of dtype

    Reads 4 * T * D bytes.
    """
    out_TD = torch.empty_like(x_TD, dtype=dtype)
    tokens, width = x_TD.shape
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(tokens,)](
        x_TD, weight_D, out_TD, D=width, EPS=eps, BLOCK_D=block, num_warps=8
    )
    return out_TD
