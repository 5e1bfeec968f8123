"""DeepSeek V2, V3 and V3.2, and Kimi-K2: one config for models with multi-head latent attention.

D model width, H heads, R query rank, L latent width, P rotary width, N width of a head's part
without rope, U width of a head's values, E experts, K experts a token, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
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

_MAX_RANK = 65536
_MAX_MTP_LAYERS = 8
# What each family's config.json must say for the router that it has.
_ROUTERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "deepseek_v2": {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
    },
    "deepseek_v3": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    "deepseek_v32": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
}


@dataclass(frozen=True)
class Indexer:
    """V3.2's choice of the tokens that the attention sees."""

    heads: int
    width: int
    top_k: int


@dataclass(frozen=True)
class DeepseekConfig(DecoderConfig):
    """Sizes and constants of a DeepSeek model before V4."""

    query_rank: int | None  # R; None: queries are projected in one step
    latent_width: int  # L
    rotary_width: int  # P
    nope_width: int  # N
    value_width: int  # U
    num_dense_layers: int  # the first ones, without experts
    dense_width: int
    shared_width: int  # of all shared experts together
    num_expert_groups: int
    num_limited_groups: int  # from which a token's experts are chosen
    normalized: bool  # whether a token's router weights are divided by their sum
    routed_scale: float
    rope: YarnRope
    rope_growth: float  # factor on cos and sin
    attention_scale: float  # of scores before the softmax
    num_mtp_layers: int  # in the files, not used
    power_of_two_scales: bool  # of activations in the vendor's code
    indexer: Indexer | None

    @property
    def dims(self) -> dict[str, int]:
        """See DecoderConfig.dims."""
        index = self.indexer or Indexer(0, 0, 0)
        return {
            "D": self.model_width,
            "R": self.query_rank or 0,
            "Q": self.num_heads * (self.nope_width + self.rotary_width),
            "L": self.latent_width,
            "LP": self.latent_width + self.rotary_width,
            "KV": self.num_heads * (self.nope_width + self.value_width),
            "O": self.num_heads * self.value_width,
            "W": self.dense_width,
            "S": self.shared_width,
            "E": self.num_experts,
            "F": self.expert_width,
            "2F": 2 * self.expert_width,
            "V": self.vocab_size,
            "I": index.heads,
            "J": index.width,
            "IJ": index.heads * index.width,
        }

    @property
    def projection_width(self) -> int:
        """Queries, latents, absorbed queries and outputs of the heads, index queries."""
        d = self.dims
        absorbed = 2 * self.num_heads * self.latent_width
        return d["R"] + d["Q"] + d["LP"] + absorbed + d["O"] + d["IJ"] + d["J"]

    @property
    def position_width(self) -> int:
        """cos and sin of the rotary part."""
        return self.rotary_width

    @property
    def cache_parts(self) -> tuple[CachePart, ...]:
        """A latent and a rotated key of each layer; with an indexer its keys too."""
        latent_bytes = (self.latent_width + self.rotary_width) * CACHE_ITEM_BYTES
        if self.indexer is None:
            return (CachePart(latent_bytes),) * self.num_layers
        latents = CachePart(latent_bytes, most_read=self.indexer.top_k)
        keys = CachePart(self.indexer.width * CACHE_ITEM_BYTES)
        return (latents, keys) * self.num_layers


def read_config(
    family: str, config: Mapping[str, Any], generation_config: Mapping[str, Any], layout: str
) -> DeepseekConfig:
    """The model's facts, checked for themselves; the tensors are checked against them later.

    family: deepseek_v2, deepseek_v3 or deepseek_v32
    layout: not looked at, there is one
    Raises CheckpointError for what cannot be, UnsupportedModelError for what we cannot do.
    """
    reader = ConfigReader(config)
    _refuse_other_features(reader, family)

    def size(field: str, key: str, minimum: int = 1) -> int:
        return reader.integer(key, minimum=minimum, maximum=MAX_MODEL_SIZE[field])

    num_layers = size("num_layers", "num_hidden_layers")
    vocab_size = size("vocab_size", "vocab_size")
    expert_width = size("expert_width", "moe_intermediate_size")
    max_context = size("context", "max_position_embeddings")
    head_widths = {
        "rotary_width": size("head_width", "qk_rope_head_dim"),
        "nope_width": size("head_width", "qk_nope_head_dim"),
        "value_width": size("head_width", "v_head_dim"),
    }
    grouped = family != "deepseek_v2" or reader.values.get("topk_method") == "group_limited_greedy"
    rope, growth, softmax_growth = _read_rope(reader, max_context)
    model = DeepseekConfig(
        family=family,
        num_layers=num_layers,
        model_width=size("model_width", "hidden_size"),
        num_heads=size("num_heads", "num_attention_heads"),
        num_experts=size("num_experts", "n_routed_experts"),
        experts_per_token=size("num_experts", "num_experts_per_tok"),
        expert_width=expert_width,
        vocab_size=vocab_size,
        norm_eps=reader.number("rms_norm_eps", maximum=1.0, default=1e-6),
        max_context=max_context,
        eos_token_ids=_read_stops(reader, generation_config, vocab_size),
        query_rank=_read_query_rank(reader, family),
        latent_width=reader.integer("kv_lora_rank", maximum=_MAX_RANK),
        **head_widths,
        num_dense_layers=min(size("num_layers", "first_k_dense_replace", 0), num_layers),
        dense_width=size("expert_width", "intermediate_size"),
        shared_width=expert_width * size("num_experts", "n_shared_experts"),
        num_expert_groups=reader.integer("n_group", default=1) if grouped else 1,
        num_limited_groups=reader.integer("topk_group", default=1) if grouped else 1,
        normalized=reader.boolean("norm_topk_prob", default=family != "deepseek_v2"),
        routed_scale=reader.number("routed_scaling_factor", maximum=1e6, default=1.0),
        rope=rope,
        rope_growth=growth,
        attention_scale=softmax_growth**2
        * (head_widths["nope_width"] + head_widths["rotary_width"]) ** -0.5,
        num_mtp_layers=_read_mtp_layers(reader, family),
        power_of_two_scales=_read_scale_format(reader) == "ue8m0",
        indexer=_read_indexer(reader) if family == "deepseek_v32" else None,
    )
    _check_sizes(reader, model)
    return model


def _refuse_other_features(reader: ConfigReader, family: str) -> None:
    for key, allowed in _ROUTERS[family].items():
        found = reader.text(key, default=allowed[0])
        if found not in allowed:
            raise unsupported(f"{key} {shown(found)} in {family}", " and ".join(map(repr, allowed)))
    activation = reader.text("hidden_act", default="silu")
    if activation != "silu":
        raise unsupported(f"hidden_act {shown(activation)}", "'silu'")
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if reader.boolean(key, default=False):
            raise unsupported(f"{key} true", f"{family} models without it")
    if not reader.boolean("rope_interleave", default=True):
        raise unsupported("rope_interleave false", "rope that turns neighbouring columns")
    if family == "deepseek_v2" and reader.boolean("norm_topk_prob", default=False):
        raise unsupported("norm_topk_prob true in deepseek_v2", "router weights as they are")
    if reader.integer("moe_layer_freq", default=1) != 1:
        raise unsupported("moe_layer_freq above 1", "experts in every layer after the dense ones")


def _read_stops(
    reader: ConfigReader, generation_config: Mapping[str, Any], vocab_size: int
) -> tuple[int, ...]:
    file = "generation_config.json"
    stops = eos_ids(generation_config.get("eos_token_id"), vocab_size, file)
    return stops or eos_ids(reader.values.get("eos_token_id"), vocab_size, reader.file)


def _read_query_rank(reader: ConfigReader, family: str) -> int | None:
    if reader.values.get("q_lora_rank") is None and family != "deepseek_v32":
        return None
    return reader.integer("q_lora_rank", maximum=_MAX_RANK)


def _read_mtp_layers(reader: ConfigReader, family: str) -> int:
    if family == "deepseek_v2":
        return 0
    return reader.integer("num_nextn_predict_layers", minimum=0, maximum=_MAX_MTP_LAYERS, default=0)


def _read_scale_format(reader: ConfigReader) -> str:
    if reader.values.get("quantization_config") is None:
        return ""
    return reader.mapping("quantization_config").text("scale_fmt", default="")


def _read_indexer(reader: ConfigReader) -> Indexer:
    return Indexer(
        heads=reader.integer("index_n_heads", maximum=MAX_MODEL_SIZE["num_heads"]),
        width=reader.integer("index_head_dim", maximum=MAX_MODEL_SIZE["head_width"]),
        top_k=reader.integer("index_topk", maximum=MAX_MODEL_SIZE["context"]),
    )


def _check_sizes(reader: ConfigReader, model: DeepseekConfig) -> None:
    if model.rotary_width % 2:
        raise reader.error("qk_rope_head_dim", model.rotary_width, "an even number")
    if model.indexer is not None and model.indexer.width < model.rotary_width:
        raise reader.error(
            "index_head_dim", model.indexer.width, f"at least qk_rope_head_dim {model.rotary_width}"
        )
    groups, limited = model.num_expert_groups, model.num_limited_groups
    if model.num_experts % groups:
        raise reader.error("n_group", groups, f"a divisor of {model.num_experts} experts")
    if limited > groups:
        raise reader.error("topk_group", limited, f"at most n_group {groups}")
    choices = model.num_experts // groups * limited
    if model.experts_per_token > choices:
        raise reader.error(
            "num_experts_per_tok",
            model.experts_per_token,
            f"at most the {choices} experts that a token can choose from",
        )
    kv_heads = reader.integer("num_key_value_heads", default=model.num_heads)
    if kv_heads != model.num_heads:
        raise reader.error(
            "num_key_value_heads", kv_heads, f"{model.num_heads} as num_attention_heads"
        )


def _read_rope(reader: ConfigReader, max_context: int) -> tuple[YarnRope, float, float]:
    """The rope, what multiplies cos and sin, and what multiplies q and k before the softmax.

    From rope_parameters (transformers 5) or rope_scaling with rope_theta beside it.
    """
    key = "rope_parameters" if reader.values.get("rope_parameters") is not None else "rope_scaling"
    given = reader.values.get(key) is not None
    scaling = reader.mapping(key) if given else ConfigReader({}, f"{reader.file}: {key}")
    theta_reader = reader if scaling.values.get("rope_theta") is None else scaling
    theta = theta_reader.number("rope_theta", above=1.0, default=10000.0)
    kind = scaling.text("rope_type", "type", default="default")
    if kind == "default":
        return YarnRope(theta, 1.0, 32.0, 1.0, max_context, truncate=True), 1.0, 1.0
    if kind != "yarn":
        raise unsupported(f"rope type {shown(kind)}", "'yarn' and 'default'")
    if scaling.values.get("attention_factor") is not None:
        raise unsupported(f"attention_factor in {key}", "mscale and mscale_all_dim")
    factor = scaling.number("factor", maximum=1e6)
    if factor < 1.0:
        raise scaling.error("factor", factor, "at least 1")
    rope = YarnRope(
        theta=theta,
        factor=factor,
        beta_fast=scaling.number("beta_fast", maximum=1e6, default=32.0),
        beta_slow=scaling.number("beta_slow", maximum=1e6, default=1.0),
        original_context=scaling.integer(
            "original_max_position_embeddings", maximum=MAX_MODEL_SIZE["context"]
        ),
        truncate=scaling.boolean("truncate", default=True),
    )
    on_rope = _growth(factor, scaling.number("mscale", above=-1.0, default=1.0))
    on_all = _growth(factor, scaling.number("mscale_all_dim", above=-1.0, default=0.0))
    return rope, on_rope / on_all, on_all


def _growth(factor: float, mscale: float) -> float:
    """YaRN's growth of the attention's scores with the context, as one factor of q or k."""
    return 0.1 * mscale * math.log(factor) + 1.0


read_v2, read_v3, read_v32 = (partial(read_config, family) for family in _ROUTERS)
