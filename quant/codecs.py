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
    QuantFormat,
)
from quant.tensor import QuantTensor


@dataclass(frozen=True)
class Codec:
    """Both directions of one format: [..., rows, columns] <-> QuantTensor."""

    encode: Callable[..., QuantTensor]
    decode: Callable[[QuantTensor], Tensor]
    options: frozenset[str] = frozenset()  # keywords of encode besides the weight


def encode_bf16(weight: Tensor) -> QuantTensor:
    """fp32 to bf16, nearest even."""
    return QuantTensor(weight.to(torch.bfloat16), None, BF16, tuple(weight.shape))


def decode_bf16(tensor: QuantTensor) -> Tensor:
    """bf16 to fp32, exact."""
    return tensor.values.float()


_MX_OPTIONS = frozenset({"scale_rule", "scale_search"})

CODECS: dict[str, Codec] = {
    BF16.name: Codec(encode_bf16, decode_bf16),
    MXFP4.name: Codec(mxfp4.encode, mxfp4.decode, _MX_OPTIONS),
    MXFP8.name: Codec(mxfp8.encode, mxfp8.decode, _MX_OPTIONS),
    NVFP4.name: Codec(nvfp4.encode, nvfp4.decode, frozenset({"tensor_scale", "scale_search"})),
    FP8_BLOCK128.name: Codec(fp8.encode_block128, fp8.decode_block128),
    FP8_BLOCK128_E8M0.name: Codec(fp8.encode_block128_e8m0, fp8.decode_block128_e8m0),
    FP8_ROW.name: Codec(fp8.encode_row, fp8.decode_row),
}


def encode(
    weight: Tensor,
    format: QuantFormat,
    *,
    scale_rule: str | None = None,
    scale_search: str | None = None,
    tensor_scale: Tensor | None = None,
) -> QuantTensor:
    """Encode a weight [..., rows, columns] of any floating dtype, where it is: CPU or CUDA.

    scale_rule:   "floor", "even" or "rceil"; MXFP4 and MXFP8, default "even"
    scale_search: "mse" chooses among neighbouring scales; MXFP4, MXFP8 and NVFP4
    tensor_scale: fp32 []; NVFP4, default that of this weight alone (see nvfp4.tensor_scale_for)

    The bytes are the same on every device. Raises ValueError for NaN or infinity, columns that do
    not divide into blocks, and an option that the format does not have.
    """
    given = {"scale_rule": scale_rule, "scale_search": scale_search, "tensor_scale": tensor_scale}
    options = {name: value for name, value in given.items() if value is not None}
    codec = CODECS[format.name]
    foreign = sorted(options.keys() - codec.options)
    if foreign:
        raise ValueError(f"{format.name} has no {foreign[0].replace('_', ' ')}")
    return codec.encode(weight, **options)


def decode(tensor: QuantTensor) -> Tensor:
    """fp32 weights of any QuantTensor."""
    return CODECS[tensor.format.name].decode(tensor)
