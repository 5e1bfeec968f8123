"""GPT-OSS: ModelConfig from the published config.json, or from the vendor's original/config.json.

The vendor's file leaves out what its code has as constants: activation alpha, norm epsilon, which
layers slide, the stop tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loaders.json_text import shown
from moe_runtime.config import (
    MAX_MODEL_SIZE,
    ConfigReader,
    ModelConfig,
    YarnRope,
    eos_ids,
    unsupported,
)

FAMILY = "gpt_oss"
_NORM_EPS = 1e-5
_SWIGLU_ALPHA = 1.702
_SWIGLU_LIMIT = 7.0
_BETA_FAST, _BETA_SLOW = 32.0, 1.0
_HARMONY_VOCAB = 201088
_HARMONY_STOPS = (200002, 199999, 200012)  # return, end of text, call
_LAYER_KINDS = {"sliding_attention": True, "full_attention": False}
_GROUP = 32  # columns that share one MXFP4 scale


def read_config(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], layout: str
) -> ModelConfig:
    """The model's facts, checked for themselves; the tensors are checked against them later.

    layout: "huggingface" or "original"
    Raises CheckpointError for what cannot be, UnsupportedModelError for what we cannot do.
    """
    if layout == "original":
        model = _read_original(ConfigReader(config, "original/config.json"))
    else:
        model = _read_huggingface(ConfigReader(config))
    stops = eos_ids(
        generation_config.get("eos_token_id"), model.vocab_size, "generation_config.json"
    )
    return replace(model, eos_token_ids=stops) if stops else model


def _read_huggingface(reader: ConfigReader) -> ModelConfig:
    _refuse_other_features(reader)
    sizes = _read_sizes(reader)
    max_context = reader.integer("max_position_embeddings", maximum=MAX_MODEL_SIZE["context"])
    layer_is_sliding = _read_layer_kinds(reader, sizes["num_layers"])
    return ModelConfig(
        family=FAMILY,
        **sizes,
        sliding_window=_read_window(reader, layer_is_sliding, max_context),
        layer_is_sliding=layer_is_sliding,
        norm_eps=reader.number("rms_norm_eps", maximum=1.0, default=_NORM_EPS),
        rope=_read_rope(reader, max_context),
        swiglu_limit=reader.number("swiglu_limit", maximum=1e6, default=_SWIGLU_LIMIT),
        swiglu_alpha=reader.number("swiglu_alpha", maximum=1e6, default=_SWIGLU_ALPHA),
        max_context=max_context,
        eos_token_ids=eos_ids(reader.values.get("eos_token_id"), sizes["vocab_size"], reader.file),
    )


def _read_original(reader: ConfigReader) -> ModelConfig:
    sizes = _read_sizes(reader)
    layer_is_sliding = _even_layers_slide(sizes["num_layers"])
    rope = YarnRope(
        theta=reader.number("rope_theta", above=1.0),
        factor=_read_factor(reader, "rope_scaling_factor"),
        beta_fast=reader.number("rope_ntk_beta", maximum=1e6, default=_BETA_FAST),
        beta_slow=reader.number("rope_ntk_alpha", maximum=1e6, default=_BETA_SLOW),
        original_context=reader.integer(
            "initial_context_length", maximum=MAX_MODEL_SIZE["context"]
        ),
        truncate=False,
    )
    max_context = min(int(rope.original_context * rope.factor), MAX_MODEL_SIZE["context"])
    return ModelConfig(
        family=FAMILY,
        **sizes,
        sliding_window=_read_window(reader, layer_is_sliding, max_context),
        layer_is_sliding=layer_is_sliding,
        norm_eps=_NORM_EPS,
        rope=rope,
        swiglu_limit=reader.number("swiglu_limit", maximum=1e6, default=_SWIGLU_LIMIT),
        swiglu_alpha=_SWIGLU_ALPHA,
        max_context=max_context,
        eos_token_ids=_HARMONY_STOPS if sizes["vocab_size"] == _HARMONY_VOCAB else (),
    )


def _refuse_other_features(reader: ConfigReader) -> None:
    activation = reader.text("hidden_act", default="silu")
    if activation != "silu":  # gpt_oss writes silu for its clamped SwiGLU
        raise unsupported(f"hidden_act {shown(activation)}", "'silu'")
    if not reader.boolean("attention_bias", default=True):
        raise unsupported("attention_bias false", "gpt_oss models with biases in the attention")
    if reader.boolean("tie_word_embeddings", default=False):
        raise unsupported("tie_word_embeddings true", "gpt_oss models with a head of their own")


def _read_sizes(reader: ConfigReader) -> dict[str, int]:
    """The sizes that both files have, by the names of ModelConfig's fields."""

    def size(field: str, *keys: str) -> int:
        return reader.integer(*keys, maximum=MAX_MODEL_SIZE[field])

    sizes = {
        "num_layers": size("num_layers", "num_hidden_layers"),
        "model_width": size("model_width", "hidden_size"),
        "num_heads": size("num_heads", "num_attention_heads"),
        "num_kv_heads": size("num_heads", "num_key_value_heads"),
        "head_width": size("head_width", "head_dim"),
        "num_experts": size("num_experts", "num_local_experts", "num_experts"),
        "experts_per_token": size("num_experts", "num_experts_per_tok", "experts_per_token"),
        "expert_width": size("expert_width", "intermediate_size"),
        "vocab_size": size("vocab_size", "vocab_size"),
    }
    _check_sizes(reader, sizes)
    return sizes


def _check_sizes(reader: ConfigReader, sizes: Mapping[str, int]) -> None:
    for field, key in (("model_width", "hidden_size"), ("expert_width", "intermediate_size")):
        if sizes[field] % _GROUP:
            raise reader.error(key, sizes[field], f"a multiple of {_GROUP}")
    if sizes["head_width"] % 2:
        raise reader.error("head_dim", sizes["head_width"], "an even number")
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        raise reader.error(
            "num_key_value_heads",
            sizes["num_kv_heads"],
            f"a divisor of num_attention_heads {sizes['num_heads']}",
        )
    chosen = sizes["experts_per_token"]
    if chosen > sizes["num_experts"]:
        raise reader.error(
            "num_experts_per_tok", chosen, f"at most the {sizes['num_experts']} experts there are"
        )
    other = reader.values.get("experts_per_token")
    if other is not None and other != chosen:
        raise reader.error("experts_per_token", other, f"{chosen} as num_experts_per_tok")


def _read_layer_kinds(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Which layers slide; without layer_types the even ones."""
    kinds = reader.values.get("layer_types")
    if kinds is None:
        return _even_layers_slide(num_layers)
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        found = len(kinds) if isinstance(kinds, list) else kinds
        raise reader.error("layer_types", found, f"a list of {num_layers} entries")
    for kind in kinds:
        if not isinstance(kind, str):
            raise reader.error("layer_types", kind, "names of layer kinds")
        if kind not in _LAYER_KINDS:
            raise unsupported(f"layer type {shown(kind)}", ", ".join(_LAYER_KINDS))
    return tuple(_LAYER_KINDS[kind] for kind in kinds)


def _even_layers_slide(num_layers: int) -> tuple[bool, ...]:
    return tuple(layer % 2 == 0 for layer in range(num_layers))


def _read_window(reader: ConfigReader, layer_is_sliding: tuple[bool, ...], max_context: int) -> int:
    """The window of sliding layers; a model without such layers need not state one."""
    default = None if any(layer_is_sliding) else max_context
    return reader.integer("sliding_window", maximum=MAX_MODEL_SIZE["context"], default=default)


def _read_rope(reader: ConfigReader, max_context: int) -> YarnRope:
    """From rope_parameters (transformers 5) or rope_scaling with rope_theta beside it."""
    key = "rope_parameters" if reader.values.get("rope_parameters") is not None else "rope_scaling"
    given = reader.values.get(key) is not None
    scaling = reader.mapping(key) if given else ConfigReader({}, f"{reader.file}: {key}")
    theta_reader = reader if scaling.values.get("rope_theta") is None else scaling
    theta = theta_reader.number("rope_theta", above=1.0)
    if any(isinstance(value, Mapping) for value in scaling.values.values()):
        raise unsupported(f"{key} for each kind of layer", "one rope for all layers")
    kind = scaling.text("rope_type", "type", default="default")
    if kind == "default":
        return YarnRope(theta, 1.0, _BETA_FAST, _BETA_SLOW, max_context, truncate=False)
    if kind != "yarn":
        raise unsupported(f"rope type {shown(kind)} in {key}", "'yarn' and 'default'")
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        if scaling.values.get(name) is not None:
            raise unsupported(f"{name} in {key}", "YaRN with its usual attention factor")
    if scaling.values.get("original_max_position_embeddings") is None:
        original = reader.integer("initial_context_length", maximum=MAX_MODEL_SIZE["context"])
    else:
        original = scaling.integer(
            "original_max_position_embeddings", maximum=MAX_MODEL_SIZE["context"]
        )
    return YarnRope(
        theta=theta,
        factor=_read_factor(scaling, "factor"),
        beta_fast=scaling.number("beta_fast", maximum=1e6, default=_BETA_FAST),
        beta_slow=scaling.number("beta_slow", maximum=1e6, default=_BETA_SLOW),
        original_context=original,
        truncate=scaling.boolean("truncate", default=True),
    )


def _read_factor(reader: ConfigReader, key: str) -> float:
    factor = reader.number(key, maximum=1e6)
    if factor < 1.0:
        raise reader.error(key, factor, "at least 1")
    return factor
