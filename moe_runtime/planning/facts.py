"""The sizes of a model of any family from config.json and the headers, as far as they tell.

For models that this version runs the runtime's own config is used; this is for all others. What
could not be known is listed in words, and what was assumed for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loaders.errors import CheckpointError
from loaders.logical import LogicalTensor
from moe_runtime.config import (
    CACHE_ITEM_BYTES,
    MAX_MODEL_SIZE,
    CachePart,
    ConfigReader,
    DecoderConfig,
)
from moe_runtime.planning.components import Groups, Kinds, expert_of, layer_of

# Our word -> keys of config.json in various families.
KEYS: Mapping[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "model_width": ("hidden_size", "d_model", "n_embd"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "head_width": ("head_dim",),
    "num_experts": ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    "experts_per_token": ("num_experts_per_tok", "experts_per_token", "num_experts_per_token",
                          "moe_topk", "moe_k", "top_k_experts", "num_selected_experts"),
    "expert_width": ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size"),
    "vocab_size": ("vocab_size",),
    "max_context": ("max_position_embeddings", "max_sequence_length", "seq_length", "n_positions"),
    "sliding_window": ("sliding_window", "attention_chunk_size"),
}  # fmt: skip
_NESTED = ("text_config", "llm_config", "language_config")  # where multimodal models keep theirs
_LIMITS = {"num_kv_heads": "num_heads", "max_context": "context", "sliding_window": "context"}
_LARGEST = 1 << 20  # of a size that has no limit of its own
_ASSUMED_CONTEXT = 131072
_INDEXED_RATIO = 4  # DeepSeek V4: layers of this ratio choose rows by an indexer
_STATE_ROWS = 9  # of fp32, kept of an unfinished window and the one before; without overlap a third
_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_KINDS = {
    "attention": _FULL,
    "chunked_attention": _SLIDING,
    "compressed_sparse_attention": _FULL,
    "heavily_compressed_attention": _FULL,
}


@dataclass(frozen=True)
class PlannedConfig(DecoderConfig):
    """A model whose family this version may not run: enough to plan its memory and traffic."""

    caches: tuple[CachePart, ...]
    projections: int
    positions: int
    state_bytes: int = 0  # recurrent state of linear attention, read and written for each token
    streams: int = 1  # residual streams, each of the model's width
    unknown: tuple[str, ...] = ()  # in words

    @property
    def residual_width(self) -> int:
        """See DecoderConfig."""
        return self.streams * self.model_width

    @property
    def projection_width(self) -> int:
        """See DecoderConfig."""
        return self.projections

    @property
    def position_width(self) -> int:
        """See DecoderConfig."""
        return self.positions

    @property
    def cache_parts(self) -> tuple[CachePart, ...]:
        """See DecoderConfig."""
        return self.caches


@dataclass(frozen=True)
class _Attention:
    """What the attention of all layers takes."""

    caches: tuple[CachePart, ...] = ()
    projections: int = 0
    positions: int = 0
    state_bytes: int = 0


class _Facts:
    """Reads of one config that remember what was missing."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        merged = dict(config)
        for key in _NESTED:
            if isinstance(config.get(key), Mapping):
                merged |= config[key]
        self.raw = merged
        self.reader = ConfigReader(merged)
        self.unknown: list[str] = []

    def known(self, word: str) -> int | None:
        """A size by our word; None if config.json has none. CheckpointError if it is no size."""
        keys = KEYS[word]
        if all(self.raw.get(key) is None for key in keys):
            return None
        limit = MAX_MODEL_SIZE.get(_LIMITS.get(word, word), _LARGEST)
        return self.reader.integer(*keys, minimum=0, maximum=limit)

    def size(self, word: str, otherwise: Callable[[], int], assumed: str) -> int:
        """A size by our word, or what `otherwise` finds and a remark with {} for it."""
        found = self.known(word)
        if found:
            return found
        value = otherwise()
        self.unknown.append(assumed.format(value))
        return value

    def whole(self, key: str) -> int:
        """One key's whole number; 0 when it is missing or null."""
        return self.reader.integer(key, minimum=0, maximum=_LARGEST, default=0)

    def numbers(self, key: str) -> list[int]:
        """A list of whole numbers; empty when the key is missing."""
        values = self.raw.get(key) or []
        if not isinstance(values, list) or not all(isinstance(v, int) for v in values):
            raise self.reader.error(key, values, "a list of whole numbers")
        return values


def count_layers(config: Mapping[str, Any], tensors: Sequence[LogicalTensor]) -> int:
    """Layers of the model proper; by the names where config.json does not say."""
    numbers = [layer for tensor in tensors if (layer := layer_of(tensor.name)) is not None]
    return _Facts(config).known("num_layers") or max(numbers, default=0) + 1


def count_experts(tensors: Sequence[LogicalTensor]) -> int:
    """Experts of a layer where each has tensors of its own; 0 where they are stacked."""
    numbers = (expert_of(tensor.name) for tensor in tensors)
    return max((number + 1 for number in numbers if number is not None), default=0)


def planned_config(
    config: Mapping[str, Any], groups: Groups, layers: int, experts_by_name: int
) -> PlannedConfig:
    """The sizes of a model from its config.json and its weights by component.

    layers, experts_by_name: of count_layers and count_experts

    Raises CheckpointError for values that cannot be.
    """
    facts = _Facts(config)
    if facts.known("num_layers") is None:
        facts.unknown.append(f"the layers are not in config.json: {layers} by the names")
    table = _embedding_shape(groups.get("embedding", ()))
    width = facts.size("model_width", lambda: table[1],
                       "the model width is not in config.json: {} by the embedding")  # fmt: skip
    experts, active = _experts(facts, groups.get("experts", ()), experts_by_name)
    context = facts.size("max_context", lambda: _ASSUMED_CONTEXT,
                         "the longest context is not in config.json: {} assumed")  # fmt: skip
    attention = _attention(facts, layers, width)
    return PlannedConfig(
        family=str(config.get("model_type", "unknown")),
        num_layers=layers,
        model_width=width,
        num_heads=facts.known("num_heads") or 1,
        num_experts=experts,
        experts_per_token=active,
        expert_width=facts.known("expert_width") or 0,
        vocab_size=facts.known("vocab_size") or table[0],
        norm_eps=0.0,
        max_context=context,
        eos_token_ids=(),
        caches=attention.caches,
        projections=attention.projections,
        positions=attention.positions,
        state_bytes=attention.state_bytes,
        streams=facts.whole("hc_mult") or 1,
        unknown=tuple(facts.unknown),
    )


def _experts(facts: _Facts, experts: Kinds, by_name: int) -> tuple[int, int]:
    """Experts of a layer and those of one token; (1, 1) when there are none."""
    in_files = by_name or max(
        (tensor.shape[0] for tensor, _ in experts if len(tensor.shape) > 1), default=0
    )
    if not experts or not in_files:
        return 1, 1
    stated = facts.known("num_experts")
    if stated and stated != in_files:
        facts.unknown.append(f"config.json says {stated} experts, the files have {in_files}")
    active = facts.size("experts_per_token", lambda: in_files,
                        "experts of a token are not in config.json: all {} counted")  # fmt: skip
    if active > in_files:
        raise CheckpointError(
            f"config.json: {active} experts a token, but a layer has {in_files}",
            hint="config.json and the weights are of different models",
        )
    return in_files, active


def _embedding_shape(tables: Kinds) -> tuple[int, int]:
    """[V, D] of the token embedding, (1, 1) if there is none."""
    shapes = [tensor.shape for tensor, _ in tables if len(tensor.shape) == 2 and min(tensor.shape)]
    return (shapes[0][0], shapes[0][1]) if shapes else (1, 1)


def _attention(facts: _Facts, layers: int, width: int) -> _Attention:
    if facts.raw.get("compress_ratios") is not None:
        return _compressed(facts, layers)
    if facts.whole("kv_lora_rank"):
        return _latent(facts, layers)
    heads, kv_heads = facts.known("num_heads"), facts.known("num_kv_heads")
    if not heads or not kv_heads:
        facts.unknown.append("how attention caches is not in config.json: no cache is counted")
        return _Attention()
    return _in_heads(facts, layers, heads, kv_heads, facts.known("head_width") or width // heads)


def _in_heads(facts: _Facts, layers: int, heads: int, kv_heads: int, head_width: int) -> _Attention:
    """Keys and values of each layer, sliding ones within their window; linear ones keep a state."""
    row_bytes = 2 * kv_heads * head_width * CACHE_ITEM_BYTES
    kinds = _layer_kinds(facts, layers)
    window = facts.known("sliding_window")
    if kinds.count(_SLIDING) and not window:
        facts.unknown.append("the sliding window is not in config.json: full attention counted")
    linear = kinds.count(_LINEAR)
    caches = tuple(
        CachePart(row_bytes, window if kind == _SLIDING and window else None)
        for kind in kinds
        if kind != _LINEAR
    )
    return _Attention(
        caches,
        projections=2 * (heads + kv_heads) * head_width,
        positions=head_width,
        state_bytes=linear * _linear_state(facts) if linear else 0,
    )


def _layer_kinds(facts: _Facts, layers: int) -> list[str]:
    """The kind of attention of each layer."""
    stated = facts.raw.get("layer_types")
    if isinstance(stated, list) and len(stated) >= layers:
        kinds = [_KINDS.get(str(kind), str(kind)) for kind in stated[:layers]]
        for kind, count in Counter(kinds).items():
            if kind not in (_FULL, _SLIDING, _LINEAR):
                facts.unknown.append(f"{count} layers are {kind}: counted as full attention")
        return kinds
    interval = facts.whole("full_attention_interval")
    if interval:
        return [_FULL if (i + 1) % interval == 0 else _LINEAR for i in range(layers)]
    lightning = facts.numbers("attn_type_list")[:layers].count(0)
    if lightning:
        facts.unknown.append(f"{lightning} layers of linear attention: counted as full attention")
    slides = facts.known("sliding_window") and facts.raw.get("use_sliding_window") is not False
    return [_SLIDING if slides else _FULL] * layers


def _linear_state(facts: _Facts) -> int:
    """Bytes of a gated DeltaNet layer's fp32 state and its convolution's tail."""
    heads, keys = facts.whole("linear_num_value_heads"), facts.whole("linear_key_head_dim")
    values = facts.whole("linear_value_head_dim")
    if not (heads and keys and values):
        facts.unknown.append("the state of linear attention is not in config.json: not counted")
        return 0
    channels = 2 * facts.whole("linear_num_key_heads") * keys + heads * values
    tail = max(0, facts.whole("linear_conv_kernel_dim") - 1)
    return 4 * heads * keys * values + CACHE_ITEM_BYTES * channels * tail


def _latent(facts: _Facts, layers: int) -> _Attention:
    """Multi-head latent attention: a latent and a rotary key a token; an indexer's keys if any."""
    rank, rope = facts.whole("kv_lora_rank"), facts.whole("qk_rope_head_dim")
    top_k = facts.whole("index_topk")
    parts = [CachePart(CACHE_ITEM_BYTES * (rank + rope), most_read=top_k or None)] * layers
    if top_k:
        kinds = facts.raw.get("indexer_types")
        own = layers if not isinstance(kinds, list) else kinds[:layers].count("full")
        parts += [CachePart(CACHE_ITEM_BYTES * facts.whole("index_head_dim"))] * own
    heads = facts.known("num_heads") or 1
    per_head = facts.whole("qk_nope_head_dim") + rope + facts.whole("v_head_dim")
    projections = heads * per_head + rank + rope + facts.whole("q_lora_rank")
    return _Attention(tuple(parts), projections, rope)


def _compressed(facts: _Facts, layers: int) -> _Attention:
    """DeepSeek V4: rows of the window, compressed rows, and keys of the indexer."""
    ratios = facts.numbers("compress_ratios")
    if len(ratios) < layers:
        raise CheckpointError(
            f"config.json: compress_ratios has {len(ratios)} entries, expected at least {layers}"
        )
    width, window = facts.known("head_width") or 0, facts.known("sliding_window")
    index_width = facts.whole("index_head_dim")
    row, key = CACHE_ITEM_BYTES * width, CACHE_ITEM_BYTES * index_width
    parts = []
    for ratio in ratios[:layers]:
        parts.append(CachePart(row, window=window))
        if ratio == _INDEXED_RATIO:
            parts.append(CachePart(row, None, ratio, facts.whole("index_topk") or None))
            parts.append(CachePart(key, None, ratio))
            for each in (width, index_width):
                parts.append(CachePart(4 * each, state_rows=_STATE_ROWS))
        elif ratio:
            parts.append(CachePart(row, None, ratio))
            parts.append(CachePart(4 * width, state_rows=_STATE_ROWS // 3))
    heads = facts.known("num_heads") or 1
    low_rank = facts.whole("q_lora_rank") + facts.whole("o_groups") * facts.whole("o_lora_rank")
    return _Attention(tuple(parts), 2 * heads * width + width + low_rank,
                      2 * facts.whole("qk_rope_head_dim"))  # fmt: skip
