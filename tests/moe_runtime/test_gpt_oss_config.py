"""GPT-OSS configs: the published ones to known facts, and every bad value to one clear line."""

import json
from dataclasses import replace

import pytest

from loaders.errors import CheckpointError, UnsupportedModelError
from moe_runtime.config import YarnRope
from moe_runtime.models.gpt_oss_config import read_config
from moe_runtime.models.registry import MODELS, find_family
from tests.oracles.tiny_gpt_oss import hf_config, original_config, write_tiny_gpt_oss

# Sizes of gpt-oss-20b.
SIZES = {
    "layers": 24, "d": 2880, "f": 2880, "heads": 64, "kv": 8, "hd": 64, "experts": 32, "topk": 4,
    "window": 128, "vocab": 201088,
}  # fmt: skip
YARN = YarnRope(150000.0, 32.0, 32.0, 1.0, 4096, truncate=False)
STOPS = [200002, 199999, 200012]


@pytest.fixture
def config():
    """The published config.json of gpt-oss-20b."""
    return hf_config(**SIZES)


@pytest.fixture
def original():
    """The vendor's original/config.json of gpt-oss-20b."""
    return original_config(**SIZES)


def read(config, generation_config=None, layout="huggingface"):
    return read_config(config, generation_config or {}, layout)


def test_gpt_oss_20b(config):
    model = read(config, {"eos_token_id": STOPS})
    assert (model.num_layers, model.model_width, model.expert_width) == (24, 2880, 2880)
    assert (model.num_heads, model.num_kv_heads, model.head_width) == (64, 8, 64)
    assert (model.num_experts, model.experts_per_token, model.vocab_size) == (32, 4, 201088)
    assert (model.qkv_width, model.attention_width) == (5120, 4096)
    assert model.dims == {
        "D": 2880, "H": 64, "Q": 4096, "KV": 512, "QKV": 5120, "E": 32, "F": 2880, "2F": 5760,
        "V": 201088,
    }  # fmt: skip
    assert model.layer_is_sliding == (True, False) * 12 and model.sliding_window == 128
    assert (model.norm_eps, model.swiglu_limit, model.swiglu_alpha) == (1e-5, 7.0, 1.702)
    assert (model.rope, model.max_context) == (YARN, 131072)
    assert model.eos_token_ids == tuple(STOPS)


def test_the_original_config_says_the_same(config, original):
    assert read(original, layout="original") == read(config, {"eos_token_id": STOPS})


def test_the_original_config_of_another_vocabulary_has_no_stops(original):
    small = read({**original, "vocab_size": 4096}, layout="original")
    assert small.eos_token_ids == ()


def test_stops_come_from_the_generation_config_first(config):
    assert read({**config, "eos_token_id": 7}).eos_token_ids == (7,)
    assert read({**config, "eos_token_id": [7, 8]}).eos_token_ids == (7, 8)
    assert read({**config, "eos_token_id": None}).eos_token_ids == ()
    assert read({**config, "eos_token_id": 7}, {"eos_token_id": 9}).eos_token_ids == (9,)


def test_rope_parameters_of_transformers_5(config):
    scaling = config.pop("rope_scaling")
    theta = config.pop("rope_theta")
    config["rope_parameters"] = {**scaling, "rope_theta": theta}
    assert read(config).rope == YARN


def test_rope_type_by_its_old_name(config):
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    assert read(config).rope == YARN


def test_yarn_defaults_are_those_of_transformers(config):
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 32.0}
    assert read(config).rope == replace(YARN, truncate=True)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}])
def test_plain_rope_is_factor_one(config, scaling):
    rope = read({**config, "rope_scaling": scaling}).rope
    assert (rope.theta, rope.factor) == (150000.0, 1.0)


def test_defaults_of_what_the_published_file_may_lack(config):
    expected = read(config)
    for key in ("layer_types", "experts_per_token", "hidden_act", "attention_bias", "swiglu_limit",
                "tie_word_embeddings", "rms_norm_eps"):  # fmt: skip
        del config[key]
    assert read(config) == expected


def test_layer_types_are_as_stated(config):
    config["layer_types"] = ["full_attention"] * 23 + ["sliding_attention"]
    assert read(config).layer_is_sliding == (False,) * 23 + (True,)


def test_no_window_is_needed_where_no_layer_slides(config):
    config |= {"layer_types": ["full_attention"] * 24, "sliding_window": None}
    assert not any(read(config).layer_is_sliding)


SIZE_KEYS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "num_local_experts", "num_experts_per_tok", "intermediate_size", "vocab_size",
    "sliding_window", "max_position_embeddings",
)  # fmt: skip


@pytest.mark.parametrize("key", SIZE_KEYS)
@pytest.mark.parametrize("value", [0, -1, 1 << 40, 10**90, 2.5, "8", True, [8], float("nan")])
def test_a_bad_size_is_named(config, key, value):
    with pytest.raises(CheckpointError, match=f"config.json: {key}: expected a whole number"):
        read({**config, key: value})


@pytest.mark.parametrize("key", SIZE_KEYS[:-2])
def test_a_bad_size_in_the_original_config_is_named(original, key):
    key = {"num_local_experts": "num_experts", "num_experts_per_tok": "experts_per_token"}.get(
        key, key
    )
    with pytest.raises(CheckpointError, match=f"original/config.json: {key}: expected a whole num"):
        read({**original, key: -1}, layout="original")


@pytest.mark.parametrize("key", SIZE_KEYS)
def test_a_missing_size_is_named(config, key):
    del config[key]
    config.pop("experts_per_token")
    with pytest.raises(CheckpointError, match=f"config.json: {key} is missing\n.*incomplete"):
        read(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 2888}, "hidden_size: expected a multiple of 32, found 2888"),
        ({"intermediate_size": 48}, "intermediate_size: expected a multiple of 32, found 48"),
        ({"head_dim": 63}, "head_dim: expected an even number, found 63"),
        ({"num_key_value_heads": 7}, "expected a divisor of num_attention_heads 64, found 7"),
        ({"num_experts_per_tok": 33}, "expected at most the 32 experts there are, found 33"),
        ({"experts_per_token": 2}, "experts_per_token: expected 4 as num_experts_per_tok, found 2"),
        ({"layer_types": ["full_attention"]}, "expected a list of 24 entries, found 1"),
        ({"layer_types": "full_attention"}, "expected a list of 24 entries, found 'full_att"),
        ({"layer_types": [1] * 24}, "layer_types: expected names of layer kinds, found 1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: expected a number above 0, at most 1, found 0.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number above 0"),
        ({"swiglu_limit": -7.0}, "swiglu_limit: expected a number above 0"),
        ({"rope_theta": 1}, "rope_theta: expected a number above 1"),
        ({"rope_theta": "150000"}, "rope_theta: expected a number, found '150000'"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope_scaling": 3}, "rope_scaling: expected a JSON object, found 3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor: expected at least 1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": float("inf")}}, "factor: expected a num"),
        ({"attention_bias": "yes"}, "attention_bias: expected true or false, found 'yes'"),
        ({"hidden_act": 3}, "hidden_act: expected a text, found 3"),
        ({"eos_token_id": 201088}, "eos_token_id: 201088 is outside the vocabulary of 201088"),
        ({"eos_token_id": "x"}, "eos_token_id: expected whole numbers, found 'x'"),
    ],
)
def test_what_cannot_be(config, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read({**config, **change})
    assert "config.json" in caught.value.message and "\n" not in caught.value.message


def test_stops_outside_the_vocabulary_in_the_generation_config(config):
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id: -1 is outs"):
        read(config, {"eos_token_id": [-1]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": False}, "attention_bias false"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings true"),
        ({"layer_types": ["linear_attention"] * 24}, "layer type 'linear_attention'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type 'llama3' in .*"),
        (
            {"rope_scaling": {"full_attention": {"rope_type": "yarn"}}},
            "rope_scaling for each kind of layer",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7}},
            "mscale in rope_scaling",
        ),
    ],
)
def test_what_we_do_not_do(config, change, message):
    with pytest.raises(UnsupportedModelError, match=f"not supported: {message}\nsupported: "):
        read({**config, **change})


def test_families():
    assert find_family({"model_type": "gpt_oss"}, "huggingface") is MODELS["gpt_oss"]
    assert find_family({"num_experts": 32}, "original") is MODELS["gpt_oss"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
            r"model_type 'qwen3_moe' \('Qwen3MoeForCausalLM'\) is not supported",
        ),
        ({"model_type": "gpt_oss", "architectures": ["Other"]}, r"'gpt_oss' \('Other'\) is not"),
    ],
)
def test_an_unknown_architecture_lists_the_known_ones(config, message):
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        find_family(config, "huggingface")
    assert "gpt_oss (GptOssForCausalLM)" in caught.value.hint


@pytest.mark.parametrize("model_type", [None, 3, ["gpt_oss"]])
def test_a_model_type_that_is_no_name(model_type):
    with pytest.raises(CheckpointError, match=r"config.json: model_type is"):
        find_family({"model_type": model_type}, "huggingface")


def test_the_tiny_checkpoint_is_in_the_published_format(tmp_path, config):
    """The fixture and what is written have the same keys."""
    write_tiny_gpt_oss(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).keys() == config.keys()
