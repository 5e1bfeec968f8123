"""DeepSeek V4: its config from config.json, as published or as transformers writes it.

compress_ratios has an entry a layer, then one for each MTP block: 0 is a window alone, 4 overlaps
and has an indexer, anything else (128 as published) neither. transformers writes layer_types with
compress_rates in its place, and one rope_parameters for each kind of rope. The format of the
experts (expert_dtype) and the spelling of tensor names are taken from the files.

D model width, H heads, C head width, R query rank, G output groups, O output rank, P rotary width,
Y = H * C / G, I index heads, J index width, N streams, M = N * (N + 2), E experts,
K experts a token, F expert width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loaders.json_text import shown
from moe_runtime.config import (
    CACHE_ITEM_BYTES,
    MAX_MODEL_SIZE,
    CachePart,
    ConfigReader,
    DecoderConfig,
    YarnRope,
    eos_ids,
    unsupported,
)

FAMILY = "deepseek_v4"
INDEXED_RATIO = 4  # of the layers whose windows overlap and that have an indexer
# Of a compressor: maximum, sum and weighted sum of a running softmax, for each part of a window.
STATE_ROWS = 3
_LAYER_KINDS = {
    "sliding_attention": None,
    "compressed_sparse_attention": INDEXED_RATIO,
    "heavily_compressed_attention": 128,
}
_HASH_KINDS = {"hash_moe": True, "moe": False}
_MOST_MTP_BLOCKS = 8
_MAX_RANK = 65536


@dataclass(frozen=True)
class DeepseekV4Config(DecoderConfig):
    """Sizes and constants of a DeepSeek V4 model."""

    head_width: int  # C, of a row that is key and value at once
    rotary_width: int  # P, the last columns of a row
    query_rank: int  # R
    output_groups: int  # G
    output_rank: int  # O, of one group
    compress_ratios: tuple[int, ...]  # of each layer; 0 is a window alone
    sliding_window: int  # W, the query counted
    index_heads: int  # I
    index_width: int  # J
    index_top_k: int  # compressed rows that a query sees on an indexed layer
    num_hash_layers: int  # the first ones, whose experts follow from the token's id
    routed_scale: float
    swiglu_limit: float
    streams: int  # N
    sinkhorn_iterations: int
    hyper_eps: float
    window_rope: YarnRope  # of layers with ratio 0
    compressed_rope: YarnRope  # of the others

    @property
    def dims(self) -> dict[str, int]:
        """See DecoderConfig.dims."""
        mixing = self.streams * (2 + self.streams)
        return {
            "D": self.model_width,
            "H": self.num_heads,
            "C": self.head_width,
            "2C": 2 * self.head_width,
            "HC": self.num_heads * self.head_width,
            "Y": self.num_heads * self.head_width // self.output_groups,
            "R": self.query_rank,
            "GO": self.output_groups * self.output_rank,
            "I": self.index_heads,
            "J": self.index_width,
            "2J": 2 * self.index_width,
            "IJ": self.index_heads * self.index_width,
            "N": self.streams,
            "ND": self.streams * self.model_width,
            "M": mixing,
            "E": self.num_experts,
            "K": self.experts_per_token,
            "F": self.expert_width,
            "2F": 2 * self.expert_width,
            "V": self.vocab_size,
        }

    @property
    def projection_width(self) -> int:
        """Queries, the shared row, the heads' output and the groups'."""
        heads = self.num_heads * self.head_width
        groups = self.output_groups * self.output_rank
        return self.query_rank + 2 * heads + self.head_width + groups

    @property
    def residual_width(self) -> int:
        """All streams."""
        return self.streams * self.model_width

    @property
    def position_width(self) -> int:
        """cos and sin of both ropes."""
        return 2 * self.rotary_width

    @property
    def cache_parts(self) -> tuple[CachePart, ...]:
        """Window rows of each layer, its compressed rows, and the indexer's."""
        row_bytes = self.head_width * CACHE_ITEM_BYTES
        parts = []
        for ratio in self.compress_ratios:
            parts.append(CachePart(row_bytes, self.sliding_window))
            if ratio == INDEXED_RATIO:
                index_bytes = self.index_width * CACHE_ITEM_BYTES
                parts.append(CachePart(row_bytes, None, ratio, self.index_top_k))
                parts.append(CachePart(index_bytes, None, ratio))
                for width in (self.head_width, self.index_width):
                    parts.append(CachePart(4 * width, state_rows=3 * STATE_ROWS))
            elif ratio:
                parts.append(CachePart(row_bytes, None, ratio))
                parts.append(CachePart(4 * self.head_width, state_rows=STATE_ROWS))
        return tuple(parts)

    def rope_of(self, layer: int) -> YarnRope:
        """The rope of a layer's queries, rows and compressed rows."""
        return self.compressed_rope if self.compress_ratios[layer] else self.window_rope


def read_config(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], layout: str
) -> DeepseekV4Config:
    """The model's facts, checked for themselves; the tensors are checked against them later.

    Raises CheckpointError for what cannot be, UnsupportedModelError for what we cannot do.
    """
    reader = ConfigReader(config)
    _refuse_other_features(reader)
    num_layers = reader.integer("num_hidden_layers", maximum=MAX_MODEL_SIZE["num_layers"])
    max_context = reader.integer("max_position_embeddings", maximum=MAX_MODEL_SIZE["context"])
    vocab_size = reader.integer("vocab_size", maximum=MAX_MODEL_SIZE["vocab_size"])
    stops = generation_config.get("eos_token_id")
    source = "generation_config.json" if stops is not None else reader.file
    stops = reader.values.get("eos_token_id") if stops is None else stops
    window_rope, compressed_rope = _read_ropes(reader, max_context)
    model = DeepseekV4Config(
        family=FAMILY,
        num_layers=num_layers,
        model_width=reader.integer("hidden_size", maximum=MAX_MODEL_SIZE["model_width"]),
        num_heads=reader.integer("num_attention_heads", maximum=MAX_MODEL_SIZE["num_heads"]),
        num_experts=reader.integer("n_routed_experts", maximum=MAX_MODEL_SIZE["num_experts"]),
        experts_per_token=reader.integer(
            "num_experts_per_tok", maximum=MAX_MODEL_SIZE["num_experts"]
        ),
        expert_width=reader.integer(
            "moe_intermediate_size", maximum=MAX_MODEL_SIZE["expert_width"]
        ),
        vocab_size=vocab_size,
        norm_eps=reader.number("rms_norm_eps", maximum=1.0),
        max_context=max_context,
        eos_token_ids=eos_ids(stops, vocab_size, source),
        head_width=reader.integer("head_dim", maximum=MAX_MODEL_SIZE["head_width"]),
        rotary_width=_read_rotary_width(reader),
        query_rank=reader.integer("q_lora_rank", maximum=_MAX_RANK),
        output_groups=reader.integer("o_groups", maximum=MAX_MODEL_SIZE["num_heads"]),
        output_rank=reader.integer("o_lora_rank", maximum=_MAX_RANK),
        compress_ratios=_read_ratios(reader, num_layers),
        sliding_window=reader.integer("sliding_window", maximum=MAX_MODEL_SIZE["context"]),
        index_heads=reader.integer("index_n_heads", maximum=MAX_MODEL_SIZE["num_heads"]),
        index_width=reader.integer("index_head_dim", maximum=MAX_MODEL_SIZE["head_width"]),
        index_top_k=reader.integer("index_topk", maximum=MAX_MODEL_SIZE["context"]),
        num_hash_layers=_read_hash_layers(reader, num_layers),
        routed_scale=reader.number("routed_scaling_factor", maximum=1e6),
        swiglu_limit=reader.number("swiglu_limit", maximum=1e6),
        streams=reader.integer("hc_mult", maximum=64),
        sinkhorn_iterations=reader.integer("hc_sinkhorn_iters", maximum=1000),
        hyper_eps=reader.number("hc_eps", maximum=1.0),
        window_rope=window_rope,
        compressed_rope=compressed_rope,
    )
    _check_sizes(reader, model)
    return model


def _refuse_other_features(reader: ConfigReader) -> None:
    if isinstance(reader.values.get("text_config"), Mapping):
        raise unsupported("a nested text_config (DeepSeek V4.1)", "DeepSeek V4 as published")
    for key, expected in (("hidden_act", "silu"), ("scoring_func", "sqrtsoftplus")):
        found = reader.text(key, default=expected)
        if found != expected:
            raise unsupported(f"{key} {shown(found)}", repr(expected))
    method = reader.text("topk_method", default="noaux_tc")
    if method != "noaux_tc":
        raise unsupported(f"topk_method {shown(method)}", "'noaux_tc'")
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if reader.boolean(key, default=False):
            raise unsupported(f"{key} true", "deepseek_v4 models without it")
    if not reader.boolean("norm_topk_prob", default=True):
        raise unsupported("norm_topk_prob false", "router weights that are divided by their sum")
    for key in ("n_shared_experts", "num_key_value_heads"):
        count = reader.integer(key, default=1)
        if count != 1:
            raise unsupported(f"{key} {count}", "one shared expert and one key and value head")


def _check_sizes(reader: ConfigReader, model: DeepseekV4Config) -> None:
    for key, size, multiple in (
        ("num_attention_heads", model.num_heads, model.output_groups),
        ("qk_rope_head_dim", model.rotary_width, 2),
    ):
        if size % multiple:
            raise reader.error(key, size, f"a multiple of {multiple}")
    narrowest = min(model.head_width, model.index_width)
    if model.rotary_width > narrowest:
        raise reader.error("qk_rope_head_dim", model.rotary_width, f"at most {narrowest}")
    if model.experts_per_token > model.num_experts:
        raise reader.error(
            "num_experts_per_tok",
            model.experts_per_token,
            f"at most the {model.num_experts} experts there are",
        )


def _read_rotary_width(reader: ConfigReader) -> int:
    """qk_rope_head_dim, or in transformers' files the share of a head that is rotated."""
    if reader.values.get("qk_rope_head_dim") is None:
        share = reader.number("partial_rotary_factor", maximum=1.0)
        return int(share * reader.integer("head_dim", maximum=MAX_MODEL_SIZE["head_width"]))
    return reader.integer("qk_rope_head_dim", maximum=MAX_MODEL_SIZE["head_width"])


def _read_ratios(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """The ratio of each layer, from compress_ratios or from layer_types."""
    key = "compress_ratios"
    ratios = reader.values.get(key)
    if ratios is None:
        return _ratios_of_kinds(reader, num_layers)
    most = num_layers + _MOST_MTP_BLOCKS
    if not isinstance(ratios, list) or not num_layers <= len(ratios) <= most:
        found = f"{len(ratios)} entries" if isinstance(ratios, list) else ratios
        raise reader.error(key, found, f"a list of {num_layers} entries and one for each MTP block")
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 0 or ratio == 1:
            raise reader.error(key, ratio, "0 or a whole number from 2")
    if any(ratios[num_layers:]):
        raise reader.error(
            key, ratios[num_layers:], f"0 after the first {num_layers} entries (MTP blocks)"
        )
    return tuple(ratios[:num_layers])


def _ratios_of_kinds(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    rates = reader.mapping("compress_rates") if reader.values.get("compress_rates") else None
    ratios = []
    for kind in _kinds(reader, "layer_types", _LAYER_KINDS, num_layers):
        usual = _LAYER_KINDS[kind]
        given = rates is not None and usual is not None
        ratio = rates.integer(kind, minimum=2, default=usual) if given and rates else usual
        if kind == "compressed_sparse_attention" and ratio != INDEXED_RATIO:
            raise unsupported(f"compress_rates {ratio} with an indexer", str(INDEXED_RATIO))
        ratios.append(ratio or 0)
    return tuple(ratios)


def _read_hash_layers(reader: ConfigReader, num_layers: int) -> int:
    """How many of the first layers choose experts by the token's id."""
    if reader.values.get("mlp_layer_types") is None:
        count = reader.integer("num_hash_layers", minimum=0, maximum=MAX_MODEL_SIZE["num_layers"])
        return min(count, num_layers)
    kinds = [_HASH_KINDS[k] for k in _kinds(reader, "mlp_layer_types", _HASH_KINDS, num_layers)]
    if kinds != sorted(kinds, reverse=True):
        raise unsupported("hash_moe after moe in mlp_layer_types", "hash_moe in the first layers")
    return sum(kinds)


def _kinds(reader: ConfigReader, key: str, known: Mapping[str, Any], num_layers: int) -> list[str]:
    """A list with one name a layer."""
    kinds = reader.values.get(key)
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        found = f"{len(kinds)} entries" if isinstance(kinds, list) else kinds
        raise reader.error(key, found, f"a list of {num_layers} entries")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            raise unsupported(f"{key} {shown(kind)}", ", ".join(known))
    return kinds


def _read_ropes(reader: ConfigReader, max_context: int) -> tuple[YarnRope, YarnRope]:
    """The rope of layers with a window alone, and that of the others."""
    key = "rope_parameters" if reader.values.get("rope_parameters") is not None else "rope_scaling"
    given = reader.values.get(key) is not None
    scaling = reader.mapping(key) if given else ConfigReader({}, f"{reader.file}: {key}")
    if isinstance(scaling.values.get("main"), Mapping):
        main, compress = scaling.mapping("main"), scaling.mapping("compress")
        return _read_rope(main, main, "rope_theta", max_context), _read_rope(
            compress, compress, "rope_theta", max_context
        )
    plain = ConfigReader({}, scaling.file)
    return (
        _read_rope(reader, plain, "rope_theta", max_context),
        _read_rope(reader, scaling, "compress_rope_theta", max_context),
    )


def _read_rope(
    reader: ConfigReader, scaling: ConfigReader, theta_key: str, max_context: int
) -> YarnRope:
    """YaRN without its growth of cos and sin; factor 1 where there is no scaling."""
    theta = reader.number(theta_key, above=1.0)
    kind = scaling.text("rope_type", "type", default="default")
    if kind == "default":
        return YarnRope(theta, 1.0, 32.0, 1.0, max_context, truncate=True)
    if kind != "yarn":
        raise unsupported(f"rope type {shown(kind)}", "'yarn' and 'default'")
    for name in ("mscale", "mscale_all_dim"):
        if scaling.values.get(name) is not None:
            raise unsupported(f"{name} in {scaling.file}", "YaRN without mscale")
    growth = scaling.number("attention_factor", default=1.0)
    if growth != 1.0:
        raise unsupported(f"attention_factor {growth:g}", "1")
    factor = scaling.number("factor", maximum=1e6)
    if factor < 1.0:
        raise scaling.error("factor", factor, "at least 1")
    return YarnRope(
        theta=theta,
        factor=factor,
        beta_fast=scaling.number("beta_fast", maximum=1e6, default=32.0),
        beta_slow=scaling.number("beta_slow", maximum=1e6, default=1.0),
        original_context=scaling.integer(
            "original_max_position_embeddings", maximum=MAX_MODEL_SIZE["context"]
        ),
        truncate=scaling.boolean("truncate", default=True),
    )
