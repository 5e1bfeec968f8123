"""How each producer of quantized checkpoints names and shapes the parts of one weight, as data.

A weight X is found from its scales: a tensor whose name ends in `scales`, beside one that ends in
`values` and holds codes. Which format the two make follows from their dtypes and shapes alone,
because several producers use the same names for different formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quant.formats import (
    FP8_BLOCK128,
    FP8_BLOCK128_E8M0,
    FP8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    QuantFormat,
)


@dataclass(frozen=True)
class Scheme:
    """Endings of the names that one producer gives to the parts of a weight."""

    producer: str
    values: str  # codes
    scales: str
    name: str  # of the weight as an unquantized checkpoint spells it
    tensor_scale: str | None = None  # of the formats that have one
    tensor_scale_divides: bool = False
    in_blocks: bool = False  # codes are [.., rows, blocks, bytes of a block]


# Where two fit, the first one is meant.
SCHEMES = (
    Scheme("gpt_oss", "_blocks", "_scales", "", "_tensor_scale", in_blocks=True),
    Scheme("gpt_oss", ".blocks", ".scales", "", in_blocks=True),
    Scheme(
        "compressed-tensors",
        ".weight_packed",
        ".weight_scale",
        ".weight",
        ".weight_global_scale",
        tensor_scale_divides=True,
    ),
    # "inverse" in the name, a multiplier in fact; stacked experts have no ".weight"
    Scheme("deepseek", "", "_scale_inv", ""),
    Scheme("deepseek_v4", ".weight", ".scale", ".weight"),
    # FP8 and MXFP8 of compressed-tensors, FP8 and NVFP4 of ModelOpt
    Scheme("scaled", "", "_scale", "", "_scale_2"),
)

_FLOATS = ("F32", "BF16", "F16")
_BYTES = ("U8", "F8_E8M0")


@dataclass(frozen=True)
class StoredFormat:
    """The dtypes by which a format is known, beside its block."""

    format: QuantFormat
    values: tuple[str, ...]
    scales: tuple[str, ...]


STORED_FORMATS = (
    StoredFormat(MXFP4, ("U8", "I8"), _BYTES),
    StoredFormat(NVFP4, ("U8",), ("F8_E4M3",)),
    StoredFormat(MXFP8, ("F8_E4M3",), _BYTES),
    StoredFormat(FP8_BLOCK128_E8M0, ("F8_E4M3",), _BYTES),
    StoredFormat(FP8_BLOCK128, ("F8_E4M3",), _FLOATS),
    StoredFormat(FP8_ROW, ("F8_E4M3",), _FLOATS),
)
CODE_DTYPES = ("U8", "I8", "F8_E4M3")

# Endings of tensors of formats that are not read -> what they are.
UNREADABLE: Mapping[str, str] = {
    ".qweight": "GPTQ or AWQ weights",
    ".qzeros": "GPTQ or AWQ weights",
    ".weight_zero_point": "weights with zero points",
    ".weight_g_idx": "weights in reordered groups",
    ".absmax": "bitsandbytes weights",
    ".weight_shape": "integer weights (pack-quantized)",
}


def scale_shape(format: QuantFormat, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a weight of logical shape [.., rows, columns]; edges are partial."""
    assert format.block is not None
    *leading, rows, columns = shape
    block_rows, block_columns = format.block
    return (*leading, -(-rows // block_rows), -(-columns // (block_columns or columns or 1)))
