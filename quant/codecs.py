"""The codec of each format: FORMATS name -> encode and decode, in plain torch (the oracle)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant import fp8, mxfp4, mxfp8, nvfp4
from quant.formats import (
    BF16,
    FP8_BLOCK128,
    FP8_BLOCK128_E8M0,
    FP8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
)
from quant.tensor import QuantTensor


@dataclass(frozen=True)
class Codec:
    """Both directions of one format: fp32 [..., rows, columns] <-> QuantTensor."""

    encode: Callable[[Tensor], QuantTensor]
    decode: Callable[[QuantTensor], Tensor]


def encode_bf16(weight: Tensor) -> QuantTensor:
    """fp32 to bf16, nearest even."""
    return QuantTensor(weight.to(torch.bfloat16), None, BF16, tuple(weight.shape))


def decode_bf16(tensor: QuantTensor) -> Tensor:
    """bf16 to fp32, exact."""
    return tensor.values.float()


CODECS: dict[str, Codec] = {
    BF16.name: Codec(encode_bf16, decode_bf16),
    MXFP4.name: Codec(mxfp4.encode, mxfp4.decode),
    MXFP8.name: Codec(mxfp8.encode, mxfp8.decode),
    NVFP4.name: Codec(nvfp4.encode, nvfp4.decode),
    FP8_BLOCK128.name: Codec(fp8.encode_block128, fp8.decode_block128),
    FP8_BLOCK128_E8M0.name: Codec(fp8.encode_block128_e8m0, fp8.decode_block128_e8m0),
    FP8_ROW.name: Codec(fp8.encode_row, fp8.decode_row),
}


def decode(tensor: QuantTensor) -> Tensor:
    """fp32 weights of any QuantTensor."""
    return CODECS[tensor.format.name].decode(tensor)
