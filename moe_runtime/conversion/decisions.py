"""Whether a weight is converted, stays as it is, or is left out; and the reason in words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loaders.logical import LogicalTensor
from moe_runtime.conversion.errors import ConversionError, refused
from moe_runtime.conversion.options import ConversionOptions
from moe_runtime.conversion.roles import DENSE_ROLES, EXPERTS
from quant.formats import BF16, FP8_BLOCK128, FP8_BLOCK128_E8M0, TARGETS, QuantFormat

_FLOATS = ("BF16", "F16", "F32")
_SKIPPED = (
    (r"\.(input_scale|input_global_scale|output_scale)$", "scale of quantized activations"),
    (r"\.(k_scale|v_scale|q_scale|prob_scale|kv_scale|k_global_scale)$", "scale of a KV cache"),
)
_KEPT_ROLES = {
    "mtp": "multi-token prediction stays as it is",
    "vision and audio": "vision and audio weights stay as they are",
    "indexer": "the indexer stays as it is",
    "embedding": "the embedding stays as it is",
    "head": "the head stays as it is",
    "router": "the router stays as it is",
    "norm": "norms stay as they are",
    "bias": "biases stay as they are",
    "other": "not a matrix of a linear layer",
}


@dataclass(frozen=True)
class Decision:
    """What a weight is written as."""

    format: QuantFormat | None  # None: plain, byte for byte
    converts: bool  # whether its numbers are rounded again
    reason: str = ""  # why it is not converted


def skip_reason(weight: LogicalTensor) -> str | None:
    """Why a tensor of the source has no place in the result; None when it has."""
    return next((why for pattern, why in _SKIPPED if re.search(pattern, weight.name)), None)


def decide(weight: LogicalTensor, role: str, options: ConversionOptions) -> Decision:
    """The decision for one weight.

    Raises ConversionError for a shape that the format does not take, and for a named refusal.
    """
    wanted = _wanted_format(weight, role, options)
    if isinstance(wanted, str):
        return Decision(weight.format, False, wanted)
    # Scales that are powers of two are written as floats: exact.
    if weight.format is wanted or (wanted, weight.format) == (FP8_BLOCK128, FP8_BLOCK128_E8M0):
        return Decision(weight.format, False, f"in {wanted.name} already")
    _require_fit(weight, wanted)
    from_4_bits = weight.format is not None and weight.format.value_bits == 4
    if from_4_bits and wanted is not BF16 and "requantize" not in options.allow:
        assert weight.format is not None
        raise refused(
            "requantize",
            f"{weight.name} is in {weight.format.name}: converting it to {wanted.name} rounds "
            "rounded weights again; convert from the original instead",
        )
    return Decision(wanted, True)


def _wanted_format(
    weight: LogicalTensor, role: str, options: ConversionOptions
) -> QuantFormat | str:
    """The format that a weight should have, or the reason why it stays as it is."""
    if options.target == "bf16" and weight.format is not None:
        return BF16
    if weight.format is None and weight.dtype not in _FLOATS:
        return f"{weight.dtype} numbers"
    if options.keeps(weight.name):
        return "kept: --keep"
    if role == EXPERTS:
        target = TARGETS[options.target]
        if target is BF16 and weight.dtype == "BF16":
            return "in bf16 already"
        return FP8_BLOCK128_E8M0 if options.power_of_two_scales else target
    if role not in DENSE_ROLES:
        return _KEPT_ROLES[role]
    if options.target == "bf16":
        return "in bf16 already" if weight.dtype == "BF16" else BF16
    if options.dense == "keep":
        return f"{role} stays as it is: --dense keep"
    if weight.format is not None:
        return "quantized already"
    return FP8_BLOCK128_E8M0 if options.power_of_two_scales else FP8_BLOCK128


def _require_fit(weight: LogicalTensor, format: QuantFormat) -> None:
    width = format.block[1] if format.block and format.block[0] == 1 else 0
    columns = weight.shape[-1]
    if width and columns % width:
        raise ConversionError(
            f"{weight.name}: {format.name} takes columns in multiples of {width}, "
            f"this weight of shape {weight.shape} has {columns}",
            hint="keep such weights as they are with --keep, or choose another format",
        )
