"""Whether a checkpoint's number formats can be read. Its tensors win over what the config claims.

A mirror of gpt-oss was seen whose quant_method had been edited; names and dtypes of the tensors
cannot be wrong without the checkpoint being unreadable for everybody.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.json_text import shown
from loaders.logical import LogicalTensor

_READ_METHODS = (None, "mxfp4", "compressed-tensors", "modelopt", "fp8")
_SUPPORTED = "supported: experts in bf16, mxfp4, mxfp8, nvfp4 and fp8"
_EXPERT = re.compile(r".*\bexperts\b.*|.*\bmlp[12]_weight")


def check_quantization(config: Mapping[str, Any], tensors: Iterable[LogicalTensor]) -> None:
    """Refuse what a config says of its experts and the tensors do not contradict.

    tensors: loaders.logical.logical_tensors, which has refused the formats that it cannot read
    Raises UnsupportedModelError, or CheckpointError for a config that makes no sense.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, Mapping):
        raise CheckpointError(
            f"config.json: quantization_config: expected a JSON object, found {shown(quantization)}"
        )
    method = quantization.get("quant_method")
    if method in _READ_METHODS:
        return
    if not any(t.format is not None and _EXPERT.fullmatch(t.name) for t in tensors):
        raise UnsupportedModelError(
            f"quantization {shown(method)} is not supported", hint=_SUPPORTED
        )
