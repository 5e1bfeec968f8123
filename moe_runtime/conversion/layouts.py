"""How a format is written: names, dtypes and shapes of the parts of one weight, as data.

compressed-tensors is what vLLM, SGLang and transformers open for every family but GPT-OSS, whose
experts have a form of their own. GPT-OSS experts in other formats than MXFP4 and bf16 keep their
stacked names; nobody but this project reads those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loaders.errors import UnsupportedModelError
from loaders.logical_schemes import scale_shape
from quant.formats import (
    FP8_BLOCK128,
    FP8_BLOCK128_E8M0,
    FP8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    QuantFormat,
)

COMPRESSED_TENSORS = "compressed-tensors"
GPT_OSS = "gpt_oss"
DEEPSEEK = "deepseek"
_VALUE_BYTES = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "F8_E8M0": 1}


@dataclass(frozen=True)
class Part:
    """One tensor of the output."""

    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class WrittenFormat:
    """Endings and dtypes of one format in one layout."""

    values: str
    values_dtype: str
    scales: str
    scales_dtype: str
    tensor_scale: str = ""
    tensor_scale_divides: bool = False


_FP8 = "F8_E4M3"
WRITTEN: Mapping[str, Mapping[str, WrittenFormat]] = {
    COMPRESSED_TENSORS: {
        MXFP4.name: WrittenFormat("weight_packed", "U8", "weight_scale", "U8"),
        NVFP4.name: WrittenFormat(
            "weight_packed", "U8", "weight_scale", _FP8, "weight_global_scale", True
        ),
        MXFP8.name: WrittenFormat("weight", _FP8, "weight_scale", "U8"),
        FP8_BLOCK128.name: WrittenFormat("weight", _FP8, "weight_scale", "F32"),
        # compressed-tensors has block scales in floats only: powers of two, then
        FP8_BLOCK128_E8M0.name: WrittenFormat("weight", _FP8, "weight_scale", "F32"),
        FP8_ROW.name: WrittenFormat("weight", _FP8, "weight_scale", "F32"),
    },
    DEEPSEEK: {
        FP8_BLOCK128.name: WrittenFormat("weight", _FP8, "weight_scale_inv", "F32"),
        FP8_BLOCK128_E8M0.name: WrittenFormat("weight", _FP8, "weight_scale_inv", "F32"),
    },
    GPT_OSS: {
        MXFP4.name: WrittenFormat("_blocks", "U8", "_scales", "U8"),
        NVFP4.name: WrittenFormat("_blocks", "U8", "_scales", _FP8, "_tensor_scale"),
        MXFP8.name: WrittenFormat("_blocks", _FP8, "_scales", "U8"),
        FP8_BLOCK128.name: WrittenFormat("_blocks", _FP8, "_scales", "F32"),
        FP8_BLOCK128_E8M0.name: WrittenFormat("_blocks", _FP8, "_scales", "F32"),
        FP8_ROW.name: WrittenFormat("_blocks", _FP8, "_scales", "F32"),
    },
}


def written_parts(
    layout: str, name: str, shape: tuple[int, ...], format: QuantFormat
) -> dict[str, Part]:
    """The tensors "values", "scales" and "tensor_scale" of a weight in a format with scales."""
    written = WRITTEN[layout].get(format.name)
    if written is None:
        raise UnsupportedModelError(
            f"{name}: the {layout} layout has no form for {format.name}",
            hint="leave --layout out",
        )
    base = name if layout == GPT_OSS else name.removesuffix("weight")
    *leading, columns = shape
    packed = (*leading, columns // format.values_per_byte)
    assert format.block is not None
    width = format.block[1]
    if layout == GPT_OSS and format.block[0] == 1 and width:
        # in blocks: the last axis holds the bytes of one block
        packed = (*leading, columns // width, width // format.values_per_byte)
    parts = {
        "values": part(base + written.values, written.values_dtype, packed),
        "scales": part(base + written.scales, written.scales_dtype, scale_shape(format, shape)),
    }
    if format.tensor_scale:
        one = () if layout == GPT_OSS else (1,)
        parts["tensor_scale"] = part(base + written.tensor_scale, "F32", one)
    return parts


def part(name: str, dtype: str, shape: tuple[int, ...]) -> Part:
    """One output tensor, its bytes counted."""
    count = _VALUE_BYTES[dtype]
    for size in shape:
        count *= size
    return Part(name, dtype, shape, count)
