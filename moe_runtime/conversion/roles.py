"""What a tensor is for, by what names have in common across families. No model code is needed.

A role decides whether a weight is converted: routed experts are, `dense` matrices if asked, all
others stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loaders.errors import CheckpointError
from loaders.json_text import shown
from loaders.logical import LogicalTensor

EXPERTS = "experts"
DENSE_ROLES = ("attention", "shared experts", "mlp")

# Role of a tensor: the first pattern found in its name.
_ROLES: tuple[tuple[str, str], ...] = (
    ("mtp", r"(^|\.)(mtp|nextn\w*|mtp_layers)\."),
    ("vision and audio", r"(^|\.)(visual|vision\w*|audio\w*|image\w*|multi_modal\w*|mm_\w+)\."),
    ("indexer", r"(^|\.)(indexer|compressor)\."),
    ("embedding", r"(^|\.)(embed\w*|wte|word_embeddings|engram\w*)(\.|$)"),
    ("head", r"(^|\.)(lm_head|head|unembedding|output_layer)\."),
    ("router", r"(^|\.)(router|gate|shared_expert_gate|moe_gate|shared_gate)(\.|$)"),
    ("norm", r"norm|(^|\.)ln_\w+\."),
    ("bias", r"[._]bias$"),
    ("shared experts", r"(^|\.)shared_experts?\."),
    (EXPERTS, r"(^|\.)experts\."),
    ("attention", r"(^|\.)(self_attn|attn|attention|linear_attn|self_attention|mixer)\."),
    ("mlp", r"(^|\.)(mlp|ffn|feed_forward|block_sparse_moe)\."),
)
_COMPILED = tuple((role, re.compile(pattern)) for role, pattern in _ROLES)
_PLAIN_NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|block)\.(\d+)\.")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(.+)$")
_NO_MATRIX = re.compile(r"conv1d|A_log|dt_bias|sinks?$|tid2eid")


def role_of(tensor: LogicalTensor, config: Mapping[str, Any]) -> str:
    """The role of a weight; "other" for what no pattern knows and what is no matrix.

    config: of the checkpoint; layers past its num_hidden_layers are for multi-token prediction
    """
    layer = layer_of(tensor.name)
    promised = num_layers(config)
    if layer is not None and promised is not None and layer >= promised:
        return "mtp"
    for role, pattern in _COMPILED:
        if pattern.search(tensor.name):
            matrix = (role == EXPERTS and len(tensor.shape) in (2, 3)) or len(tensor.shape) == 2
            if role in (EXPERTS, *DENSE_ROLES) and (not matrix or _NO_MATRIX.search(tensor.name)):
                return "other"
            return role
    return "other"


def layer_of(name: str) -> int | None:
    """The layer's number in a name."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def expert_of(name: str) -> tuple[str, int, str] | None:
    """(prefix up to "experts", expert, rest) of a weight of one expert; None for stacked ones."""
    match = _EXPERT.match(name)
    return (match[1], int(match[2]), match[3]) if match else None


def source_format(weight: LogicalTensor) -> str:
    """The stored format of a weight, by name."""
    return weight.format.name if weight.format else plain_format(weight)


def plain_format(weight: LogicalTensor) -> str:
    """The name of the numbers that a weight's values are stored as."""
    return _PLAIN_NAMES.get(weight.dtype, weight.dtype.lower())


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def num_layers(config: Mapping[str, Any]) -> int | None:
    """Layers of the model itself, as config.json says."""
    return _size(config, "num_hidden_layers")


def num_experts(config: Mapping[str, Any]) -> int | None:
    """Routed experts of a layer, as config.json says."""
    keys = ("num_experts", "n_routed_experts", "num_local_experts")
    return next((found for key in keys if (found := _size(config, key)) is not None), None)


def hidden_size(config: Mapping[str, Any]) -> int | None:
    """The model's width, as config.json says."""
    return _size(config, "hidden_size")


def _size(config: Mapping[str, Any], key: str) -> int | None:
    """A size that config.json may have; CheckpointError for one that is no whole number."""
    found = text_config(config).get(key)
    if isinstance(found, list):  # one a layer
        return None
    if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
        raise CheckpointError(
            f"config.json: {key}: expected a whole number, found {shown(found)}",
            hint="the file is damaged: download the checkpoint again",
        )
    return found
