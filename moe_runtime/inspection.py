"""What a checkpoint is, read from its headers: for `moe-runtime inspect`, no weight is touched.

Works for checkpoints that this version cannot run too, so tensors are sorted into components by
what their names have in common across families. Figures of one token come from the runtime's own
memory plan, so only for models that run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from loaders.checkpoint import Checkpoint
from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.json_text import parse_json_object
from loaders.logical import logical_tensors
from loaders.safetensors_header import DTYPE_BITS, TensorInfo
from moe_runtime.config import DecoderConfig
from moe_runtime.models.registry import MODELS, OpenedModel, plan_model
from moe_runtime.plan import MemoryPlan, weights_by_component
from moe_runtime.planning.components import (
    NOT_LOADED,
    ORDER,
    by_component,
    component_of_tensor,
    summed_up,
)
from moe_runtime.support import ANY, FP8_CAPABILITY, SUPPORTED
from moe_runtime.tokenizer import load_tokenizer

_MXFP4_CODES = re.compile(r".*[._]blocks")
_MXFP4_SCALES = re.compile(r".*[._]scales")
_SIZES = (
    ("layers", "num_layers", "num_hidden_layers"),
    ("model_width", "model_width", "hidden_size"),
    ("heads", "num_heads", "num_attention_heads"),
    ("kv_heads", "num_kv_heads", "num_key_value_heads"),
    ("head_width", "head_width", "head_dim"),
    ("experts", "num_experts", "num_local_experts", "num_experts", "n_routed_experts"),
    ("experts_per_token", "experts_per_token", "num_experts_per_tok"),
    ("expert_width", "expert_width", "moe_intermediate_size", "intermediate_size"),
    ("vocabulary", "vocab_size", "vocab_size"),
    ("context", "max_context", "max_position_embeddings"),
    ("sliding_window", "sliding_window", "sliding_window"),
)  # our word, field of ModelConfig, keys of config.json
_REMOTE_TOKENIZER_BYTES = 2_000_000  # a larger tokenizer.json is not fetched to be looked at
_ANY_VOCABULARY = 2**31
_ANY_LAYER = 2**31


@dataclass(frozen=True)
class Component:
    """The tensors of one part of the model."""

    name: str
    tensors: int
    parameters: int  # numbers that the tensors stand for
    nbytes: int
    formats: dict[str, int]  # bytes by stored format


@dataclass(frozen=True)
class TokenizerSummary:
    """What is known of a tokenizer."""

    present: bool
    num_ids: int | None = None  # None: not read
    special_tokens: tuple[str, ...] = ()
    chat_template: bool = False
    chat_code: bool = False  # without a template, this version has code that renders chats
    problem: str | None = None


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect` tells."""

    architecture: str
    layout: str
    sizes: dict[str, int]
    quantization: str | None  # as config.json says
    components: tuple[Component, ...]
    files: int
    tokenizer: TokenizerSummary
    sound: bool  # whether tensors and configs belong together, as far as this version can tell
    problem: str | None  # why this version cannot run it
    hint: str | None
    backends: dict[str, str]  # name -> what it needs, and what to know of it
    bytes_per_token: dict[str, int] | None  # by component, at batch 1 with an empty cache
    active_parameters: int | None  # read for one token, without the embedding
    cache_bytes_per_token: int | None  # of the layers that keep everything
    memory_bytes: int | None  # on a GPU with the whole context, reserve included

    @property
    def num_tensors(self) -> int:
        """Tensors in all files."""
        return sum(component.tensors for component in self.components)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(component.nbytes for component in self.components)

    @property
    def parameters(self) -> int:
        """Numbers that the tensors stand for; scales of blocks are not counted."""
        return sum(component.parameters for component in self.components)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "supported": self.problem is None,
            **asdict(self),
            "num_tensors": self.num_tensors,
            "total_bytes": self.total_bytes,
            "parameters": self.parameters,
            "bytes_per_token_total": sum((self.bytes_per_token or {}).values()) or None,
        }


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Look at an opened checkpoint; headers and small files are enough.

    A model that this version does not run, or that is not sound, is described with the problem.
    """
    error: CheckpointError | UnsupportedModelError | None = None
    opened = None
    try:
        opened = plan_model(checkpoint)
    except (CheckpointError, UnsupportedModelError) as caught:
        error = caught
    config = opened.config if opened else None
    family = MODELS.get(str(checkpoint.config.get("model_type")))
    chat_code = family is not None and family.chat_code is not None
    tokenizer = replace(_tokenizer(checkpoint, config), chat_code=chat_code)
    if tokenizer.problem and error is None:
        error = CheckpointError(tokenizer.problem)
    components = sort_components(checkpoint)
    plan = _memory_plan(opened) if opened else None
    return Inspection(
        architecture=_architecture(checkpoint.config, config),
        layout=checkpoint.layout,
        sizes=_sizes(checkpoint.config, config),
        quantization=_quantization(checkpoint.config),
        components=components,
        files=len({info.file for info in checkpoint.tensors.values()}),
        tokenizer=tokenizer,
        sound=not isinstance(error, CheckpointError),
        problem=error.message if error else None,
        hint=error.hint if error else None,
        backends=_backends(config, components),
        bytes_per_token=_drop_empty(plan.decode_bytes(0)) if plan else None,
        active_parameters=_active_parameters(config, components) if config else None,
        cache_bytes_per_token=_cache_bytes_per_token(plan) if plan else None,
        memory_bytes=plan.total_bytes if plan else None,
    )


def sort_components(checkpoint: Checkpoint) -> tuple[Component, ...]:
    """Tensors summed up by component, in the order of a forward pass; empty ones left out."""
    found = checkpoint.config.get("num_hidden_layers")
    num_layers = found if isinstance(found, int) else _ANY_LAYER
    groups: dict[str, list[TensorInfo]] = {name: [] for name in ORDER}
    for info in checkpoint.tensors.values():
        groups[component_of_tensor(info.name, num_layers)].append(info)
    parameters = _parameters(checkpoint, num_layers)
    return tuple(
        _component(name, group, parameters.get(name)) for name, group in groups.items() if group
    )


def stored_format(info: TensorInfo) -> str:
    """What the bytes of a tensor are: "mxfp4", "e8m0" (its scales), or the dtype as bf16, f32."""
    if info.dtype == "U8" and _MXFP4_CODES.fullmatch(info.name):
        return "mxfp4"
    if info.dtype == "U8" and _MXFP4_SCALES.fullmatch(info.name):
        return "e8m0"
    return info.dtype.lower()


def _component(name: str, group: list[TensorInfo], parameters: int | None) -> Component:
    formats: Counter[str] = Counter()
    for info in group:
        formats[stored_format(info)] += info.nbytes
    return Component(
        name,
        tensors=len(group),
        parameters=sum(map(_elements, group)) if parameters is None else parameters,
        nbytes=sum(info.nbytes for info in group),
        formats=dict(formats.most_common()),
    )


def _parameters(checkpoint: Checkpoint, num_layers: int) -> dict[str, int]:
    """Numbers that each component stands for; empty if its formats cannot be read."""
    try:
        groups = by_component(logical_tensors(checkpoint), num_layers)
    except (CheckpointError, UnsupportedModelError):
        return {}
    return {component.name: component.parameters for component in summed_up(groups)}


def _elements(info: TensorInfo) -> int:
    return info.nbytes * 8 // DTYPE_BITS[info.dtype]


def _architecture(raw: Mapping[str, Any], config: DecoderConfig | None) -> str:
    named = raw.get("architectures")
    if isinstance(named, list) and named:
        return str(named[0])
    return str(raw.get("model_type") or (config.family if config else "unknown"))


def _sizes(raw: Mapping[str, Any], config: DecoderConfig | None) -> dict[str, int]:
    """Sizes by our words: checked ones of a model that runs, else what config.json says."""
    found: dict[str, int] = {}
    for word, field, *keys in _SIZES:
        values = [getattr(config, field, None)] if config else [raw.get(key) for key in keys]
        sizes = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
        if sizes:
            found[word] = sizes[0]
    return found


def _quantization(raw: Mapping[str, Any]) -> str | None:
    stated = raw.get("quantization_config")
    return str(stated.get("quant_method")) if isinstance(stated, Mapping) else None


def _memory_plan(opened: OpenedModel) -> MemoryPlan:
    weight_bytes = weights_by_component(opened.plan.nbytes)
    return MemoryPlan(opened.config, weight_bytes, opened.config.max_context)


def _drop_empty(read: dict[str, int]) -> dict[str, int]:
    return {component: nbytes for component, nbytes in read.items() if nbytes}


def _active_parameters(config: DecoderConfig, components: tuple[Component, ...]) -> int:
    by_name = {component.name: component.parameters for component in components}
    experts = by_name.pop("experts", 0) * config.experts_per_token // config.num_experts
    not_read = ("embedding", "hash tables", *NOT_LOADED)
    return sum(count for name, count in by_name.items() if name not in not_read) + experts


def _cache_bytes_per_token(plan: MemoryPlan) -> int:
    """Growth of the cache with each token once all windows are full."""
    parts = plan.config.cache_parts
    growing = (part for part in parts if part.window is None and part.state_rows is None)
    return round(sum(part.row_bytes / part.tokens_per_row for part in growing))


def _backends(config: DecoderConfig | None, components: tuple[Component, ...]) -> dict[str, str]:
    if config is None:
        return {}
    experts = next((c.formats for c in components if c.name == "experts"), {})
    dense = (c for c in components if c.name not in ("experts", *NOT_LOADED))
    dense_fp8 = any("f8_e4m3" in c.formats for c in dense)
    needs = {}
    for row in SUPPORTED:
        if row.family != config.family or row.experts not in (*experts, ANY):
            continue
        if row.least_capability is not None and dense_fp8:
            row = replace(row, least_capability=FP8_CAPABILITY)
        needs[row.backend] = row.needs
    return needs


def _tokenizer(checkpoint: Checkpoint, config: DecoderConfig | None) -> TokenizerSummary:
    vocab_size = config.vocab_size if config else checkpoint.config.get("vocab_size")
    try:
        if checkpoint.folder is None and not _is_small(checkpoint, "tokenizer.json"):
            return _tokenizer_from_config(checkpoint)
        known = vocab_size if isinstance(vocab_size, int) else _ANY_VOCABULARY
        tokenizer = load_tokenizer(checkpoint, known)
    except CheckpointError as error:
        return TokenizerSummary(True, problem=error.message)
    if tokenizer is None:
        return TokenizerSummary(False)
    ids = sorted(tokenizer.special_ids)
    special = tuple(tokenizer.decode([i], skip_special_tokens=False) for i in ids)
    return TokenizerSummary(True, tokenizer.num_ids, special, tokenizer.chat_template is not None)


def _is_small(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a remote file may be fetched just to be looked at; a missing one may."""
    try:
        checkpoint.files.text(name, max_bytes=_REMOTE_TOKENIZER_BYTES)
    except CheckpointError:
        return False
    return True


def _tokenizer_from_config(checkpoint: Checkpoint) -> TokenizerSummary:
    """What tokenizer_config.json tells, which is small."""
    raw = checkpoint.files.text("tokenizer_config.json")
    config = parse_json_object(raw, file="tokenizer_config.json") if raw else {}
    added = config.get("added_tokens_decoder")
    entries = added.values() if isinstance(added, dict) else ()
    special = tuple(
        str(entry.get("content"))
        for entry in entries
        if isinstance(entry, dict) and entry.get("special")
    )
    template = "chat_template.jinja" in checkpoint.files.names() or "chat_template" in config
    return TokenizerSummary(True, None, special, template)
