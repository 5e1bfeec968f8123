"""The model families that this version has. A new family is one row here, its files and tests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from loaders.checkpoint import Checkpoint
from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.json_text import shown
from loaders.logical import logical_tensors
from loaders.names import deepseek_v2 as deepseek_v2_names
from loaders.names import deepseek_v3 as deepseek_v3_names
from loaders.names import deepseek_v4 as deepseek_v4_names
from loaders.names import deepseek_v32 as deepseek_v32_names
from loaders.names import gpt_oss as gpt_oss_names
from loaders.names.table import LoadPlan, NameTable, match_names
from loaders.quant_config import check_quantization
from moe_runtime.config import DecoderConfig
from moe_runtime.deepseek_v4_chat import ENCODING_FILE, DeepseekV4Chat
from moe_runtime.deepseek_v32_chat import DeepseekV32Chat
from moe_runtime.models import deepseek_config, deepseek_v4_config, gpt_oss_config
from moe_runtime.models.deepseek_config import DeepseekConfig
from moe_runtime.models.deepseek_v2 import DeepseekV2Reference
from moe_runtime.models.deepseek_v3 import DeepseekV3Reference
from moe_runtime.models.deepseek_v4 import DeepseekV4Reference
from moe_runtime.models.deepseek_v4_config import DeepseekV4Config
from moe_runtime.models.deepseek_v32 import DeepseekV32Reference
from moe_runtime.models.gpt_oss import GptOssReference
from moe_runtime.models.reference_model import ReferenceModel
from moe_runtime.tokenizer import ChatRenderer


@dataclass(frozen=True)
class ModelFamily:
    """What is needed to read a checkpoint of one architecture."""

    model_type: str  # as in config.json
    architectures: tuple[str, ...]
    # config.json, generation_config.json ({} if there is none), layout -> the model's facts
    read_config: Callable[[Mapping[str, Any], Mapping[str, Any], str], DecoderConfig]
    # by layout; the table can depend on the config, which is one of this family, and on how the
    # tensors are called
    name_tables: Mapping[str, Callable[[Any, Collection[str]], NameTable]]
    reference: type[ReferenceModel]
    # for checkpoints without a chat template: what renders their chats
    chat_code: Callable[[Checkpoint], ChatRenderer] | None = None


def _always(table: NameTable, config: DecoderConfig, names: Collection[str]) -> NameTable:
    return table


def _deepseek_table(
    make: Callable[..., NameTable], config: DeepseekConfig, names: Collection[str]
) -> NameTable:
    return make(
        num_layers=config.num_layers,
        num_dense_layers=config.num_dense_layers,
        has_query_rank=config.query_rank is not None,
        num_mtp_layers=config.num_mtp_layers,
    )


def _deepseek_v4_table(config: DeepseekV4Config, names: Collection[str]) -> NameTable:
    return deepseek_v4_names.name_table(names, config.compress_ratios, config.num_hash_layers)


def _deepseek_v4_chat(checkpoint: Checkpoint) -> ChatRenderer:
    return DeepseekV4Chat.of_checkpoint(checkpoint.file_text(ENCODING_FILE))


_DEEPSEEK_V3 = ModelFamily(
    "deepseek_v3",
    ("DeepseekV3ForCausalLM",),
    deepseek_config.read_v3,
    {"huggingface": partial(_deepseek_table, deepseek_v3_names.name_table)},
    DeepseekV3Reference,
)
MODELS: dict[str, ModelFamily] = {
    "gpt_oss": ModelFamily(
        "gpt_oss",
        ("GptOssForCausalLM",),
        gpt_oss_config.read_config,
        {layout: partial(_always, table) for layout, table in gpt_oss_names.TABLES.items()},
        GptOssReference,
    ),
    "deepseek_v2": ModelFamily(
        "deepseek_v2",
        ("DeepseekV2ForCausalLM",),
        deepseek_config.read_v2,
        {"huggingface": partial(_deepseek_table, deepseek_v2_names.name_table)},
        DeepseekV2Reference,
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": replace(_DEEPSEEK_V3, model_type="kimi_k2"),
    "deepseek_v32": ModelFamily(
        "deepseek_v32",
        ("DeepseekV32ForCausalLM",),
        deepseek_config.read_v32,
        {"huggingface": partial(_deepseek_table, deepseek_v32_names.name_table)},
        DeepseekV32Reference,
        lambda checkpoint: DeepseekV32Chat(),
    ),
    "deepseek_v4": ModelFamily(
        "deepseek_v4",
        ("DeepseekV4ForCausalLM",),
        deepseek_v4_config.read_config,
        {"huggingface": _deepseek_v4_table},
        DeepseekV4Reference,
        _deepseek_v4_chat,
    ),
}
# Relatives whose names look as if they were here.
_OTHER_MODELS = {
    "deepseek_v41": "DeepSeek V4.1",
    "deepseek_v41_text": "DeepSeek V4.1",
}
_ORIGINAL_LAYOUT = "gpt_oss"  # the one family whose vendor publishes a layout of its own


def find_family(config: Mapping[str, Any], layout: str) -> ModelFamily:
    """The family of a checkpoint; UnsupportedModelError, with the known ones, if it is not here."""
    model_type = config.get("model_type")
    if model_type is None and layout == "original":
        model_type = _ORIGINAL_LAYOUT
    if not isinstance(model_type, str):
        found = "is missing" if model_type is None else f"is not a name: {shown(model_type)}"
        raise CheckpointError(
            f"config.json: model_type {found}", hint="download the checkpoint again"
        )
    family = MODELS.get(model_type)
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    if family is None or (named is not None and named not in family.architectures):
        what = f"model_type {shown(model_type)}" + (f" ({shown(named)})" if named else "")
        if model_type in _OTHER_MODELS:
            what = f"{_OTHER_MODELS[model_type]}, {what},"
        known = ", ".join(f"{f.model_type} ({f.architectures[0]})" for f in MODELS.values())
        raise UnsupportedModelError(f"{what} is not supported", hint=f"supported: {known}")
    if layout not in family.name_tables:
        raise UnsupportedModelError(
            f"the {layout} layout of {model_type} is not supported",
            hint=f"supported: {', '.join(family.name_tables)}",
        )
    return family


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint understood from its headers: family, facts, and where each weight is."""

    family: ModelFamily
    config: DecoderConfig
    table: NameTable
    plan: LoadPlan


def plan_model(checkpoint: Checkpoint) -> OpenedModel:
    """Everything that can be checked before a tensor is read.

    Raises CheckpointError or UnsupportedModelError.
    """
    family = find_family(checkpoint.config, checkpoint.layout)
    tensors = logical_tensors(checkpoint)
    check_quantization(checkpoint.config, tensors)
    config = family.read_config(checkpoint.config, checkpoint.generation_config, checkpoint.layout)
    names = {tensor.name for tensor in tensors}
    table = family.name_tables[checkpoint.layout](config, names)
    plan = match_names(tensors, table, config.dims, config.num_layers)
    return OpenedModel(family, config, table, plan)
