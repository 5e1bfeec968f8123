"""Which number format a checkpoint's experts are in. Tensor names win over what the config claims.

A mirror of gpt-oss was seen whose quant_method had been edited; the names of the tensors cannot be
wrong without the checkpoint being unreadable for everybody.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.json_text import shown
from quant.formats import MXFP4, QuantFormat

_SUPPORTED = "supported: experts in MXFP4 as published (tensors *_blocks and *_scales)"

# Endings of expert tensors by which formats are known, most telling first.
_READABLE: Mapping[str, QuantFormat] = {
    r".*(experts\.\w+_blocks|mlp[12]_weight\.blocks)": MXFP4,
}
_UNREADABLE: Mapping[str, str] = {
    r".*experts\..*weight_packed": "compressed-tensors (packed) experts",
    r".*experts\..*(qweight|qzeros)": "GPTQ or AWQ experts",
    r".*experts\..*weight_scale_inv": "FP8 experts in blocks",
    r".*experts\..*(weight_scale|weight_scale_2|absmax)": "scaled or bitsandbytes experts",
    r".*(experts\.(\d+\.)?\w*proj(\.weight)?|mlp[12]_weight)": "experts without quantization",
}


def expert_format(config: Mapping[str, Any], names: Collection[str]) -> QuantFormat:
    """The format of the routed experts.

    names: of all tensors
    Raises UnsupportedModelError naming a format that we do not read.
    """
    for pattern, known in _READABLE.items():
        if _any_matches(pattern, names):
            return known
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, Mapping):
        raise CheckpointError(
            f"config.json: quantization_config: expected a JSON object, found {shown(quantization)}"
        )
    method = (quantization or {}).get("quant_method")
    if method not in (None, "mxfp4"):
        raise UnsupportedModelError(
            f"quantization {shown(method)} is not supported", hint=_SUPPORTED
        )
    for pattern, what in _UNREADABLE.items():
        if _any_matches(pattern, names):
            raise UnsupportedModelError(f"{what} are not supported", hint=_SUPPORTED)
    return MXFP4  # no experts at all: matching the names will say what is missing


def _any_matches(pattern: str, names: Collection[str]) -> bool:
    compiled = re.compile(pattern)
    return any(compiled.fullmatch(name) for name in names)
