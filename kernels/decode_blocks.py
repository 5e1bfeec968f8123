"""Weights in FP8 blocks of 128x128 written out as plain floats: for torch's matrix products.

N rows and K columns, of which 128 by 128 share a scale.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.weight_formats import decode_scale, scale_bytes, scales_of
from quant.tensor import QuantTensor

_ROWS = 16  # of a program, in one block
_COLUMNS = 512


# Grid: N / BLOCK_N, K / BLOCK_K.
@triton.jit
def _decode_blocks_kernel(
    values_ptr,  # [N, K] E4M3
    scales_ptr,  # [N / 128, K / 128] fp32 or E8M0 bytes
    out_ptr,  # [N, K]
    N: tl.constexpr,
    K: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = b[:, None] * 128 + tl.arange(0, 128)[None, :]
    place = n.to(tl.int64)[:, None, None] * K + k[None, :, :]
    mask = (n < N)[:, None, None] & (k < K)[None, :, :]
    values = tl.load(values_ptr + place, mask=mask, other=0.0).to(tl.float32)
    across: tl.constexpr = (K + 127) // 128
    stored = tl.load(
        scales_ptr + tl.program_id(0) * BLOCK_N // 128 * across + b, mask=b < across, other=0
    )
    values *= decode_scale(stored, SCALES)[None, :, None]
    tl.store(out_ptr + place, values.to(out_ptr.dtype.element_ty), mask=mask)


def decode_blocks(weight: QuantTensor, out: Tensor) -> Tensor:
    """Codes times scales, rounded once.

    weight:  [N, K] in FP8_BLOCK128 or FP8_BLOCK128_E8M0
    out:     [N, K] any float dtype, written and returned

    Moves 3 bytes a weight if out is bf16.
    """
    rows, columns = weight.shape
    assert weight.format.block == (128, 128) and weight.values.is_contiguous()
    _decode_blocks_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))](
        weight.values,
        scale_bytes(weight),
        out,
        N=rows,
        K=columns,
        SCALES=scales_of(weight.format),
        BLOCK_N=_ROWS,
        BLOCK_B=_COLUMNS // 128,
        num_warps=4,
    )
    return out
