"""What holds no weights in the result: config, tokenizer and the index, in that order."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loaders.files import CheckpointFiles
from loaders.safetensors_index import INDEX
from moe_runtime.conversion.planning import ConversionPlan
from moe_runtime.conversion.quant_configs import quantization_config
from moe_runtime.deepseek_v4_chat import ENCODING_FILE

# Files of the source that go with the weights whatever their format.
_COPIED = re.compile(
    r"generation_config\.json|tokenizer\.(json|model)|tokenizer_config\.json|vocab\.(json|txt)"
    r"|merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)"
    r"|(preprocessor|processor|video_preprocessor|image_processor)_config\.json"
    r"|[\w.-]+\.tiktoken|(LICENSE|NOTICE|USE_POLICY)[\w.-]*|(configuration|modeling)_\w+\.py"
)
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def result_config(plan: ConversionPlan) -> dict[str, Any]:
    """config.json of the result."""
    config = {k: v for k, v in plan.config.items() if k not in _QUANTIZATION_KEYS}
    # V4 says here that its experts are FP4, and readers believe it.
    config.pop("expert_dtype", None)
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config["text_config"] = {k: v for k, v in text.items() if k not in _QUANTIZATION_KEYS}
    found = quantization_config(plan)
    if found is not None:
        config["quantization_config"] = found
    return config


def write_side_files(folder: Path, plan: ConversionPlan, files: CheckpointFiles) -> list[str]:
    """Write config.json and copy tokenizer, generation and licence files; names of the copies."""
    write_json(folder / "config.json", result_config(plan))
    copied = []
    for name in (*filter(_COPIED.fullmatch, sorted(files.names())), ENCODING_FILE):
        if (raw := files.text(name)) is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(raw)
            copied.append(name)
    return copied


def write_index(folder: Path, plan: ConversionPlan) -> None:
    """The index: without it nobody opens the folder, so it comes last."""
    weight_map = {part.name: shard.file for shard in plan.shards for part in shard.parts}
    index = {
        "metadata": {"total_size": plan.tensor_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(folder / INDEX, index)


def write_json(path: Path, value: Any) -> None:
    """A JSON file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
