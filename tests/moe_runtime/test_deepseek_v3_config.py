"""DeepSeek V2, V3, V3.2 and Kimi-K2: facts of the published models, bad input, what is refused."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from loaders.checkpoint import open_files, open_folder
from loaders.errors import CheckpointError, UnsupportedModelError
from moe_runtime import backends, host_memory
from moe_runtime.errors import DoesNotFitError
from moe_runtime.models.registry import MODELS, plan_model
from moe_runtime.plan import MemoryPlan, fit, weights_by_component
from tests.oracles import published_headers
from tests.oracles.tiny_deepseek import V2_LITE, Sizes, published_config, write_tiny_deepseek

YARN = {
    "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
}  # fmt: skip
LITE_MSCALE = {"mscale": 0.707, "mscale_all_dim": 0.707}
REAL_HEAD = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_scaling": YARN}
SMALL = Sizes(layers=2, d=32, heads=2, latent=16, rotary=8, experts=8, f=32, w=32, query_rank=16)
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
SCALE = EXPERT + "_scale_inv"


def read(family="deepseek_v3", **changes):
    """The config of a tiny model with some keys changed; a value of None removes the key."""
    sizes = V2_LITE if family == "deepseek_v2" else Sizes(family)
    config = published_config(sizes, "fp8") | changes
    config = {key: value for key, value in config.items() if value is not None}
    return MODELS[family].read_config(config, {}, "huggingface")


@pytest.mark.parametrize(
    ("family", "changes", "scale"),
    [
        ("deepseek_v3", {}, 0.13523),
        (
            "deepseek_v2",
            {"rope_scaling": YARN | LITE_MSCALE},
            0.11472,
        ),
        ("deepseek_v3", {"rope_scaling": YARN | {"factor": 32}}, 192**-0.5 * 1.8132),
        ("deepseek_v3", {"rope_scaling": YARN | {"factor": 64}}, 192**-0.5 * 2.0047),
        ("deepseek_v3", {"rope_scaling": None}, 192**-0.5),
    ],
    ids=["V3", "V2-Lite", "K2", "K2-Thinking", "no YaRN"],
)
def test_scale_of_the_softmax(family, changes, scale):
    config = read(family, **(REAL_HEAD | changes))
    assert config.attention_scale == pytest.approx(scale, rel=1e-4)
    assert config.rope_growth == 1.0


def test_mscale_without_mscale_all_dim_goes_to_cos_and_sin():
    config = read(**REAL_HEAD, rope_parameters={**YARN, "mscale_all_dim": 0, "rope_theta": 5e4})
    assert config.attention_scale == pytest.approx(192**-0.5)
    assert config.rope_growth == pytest.approx(1.368888)
    assert config.rope.theta == 5e4


def test_kimi_k2_is_a_deepseek_v3():
    config = published_config(Sizes(), "fp8") | {"model_type": "kimi_k2"}
    assert MODELS["kimi_k2"].read_config(config, {}, "huggingface").family == "deepseek_v3"
    assert MODELS["kimi_k2"].architectures == ("DeepseekV3ForCausalLM",)


@cache
def published(v32):
    return plan_model(open_files(published_headers.deepseek_v3(v32=v32)))


@pytest.mark.parametrize("v32", [False, True], ids=["V3", "V3.2"])
def test_published_headers_are_understood_to_the_byte(v32):
    opened = published(v32)
    by_component = weights_by_component(opened.plan.nbytes)
    plan = MemoryPlan(opened.config, by_component, 32768)
    assert set(opened.plan.skipped.values()) == {"multi-token prediction is not used"}
    if v32:
        assert by_component["indexer"] == 61 * 14_422_240
        assert round(sum(plan.decode_bytes(0).values()) / 1e9, 2) == 38.55
        read_at_once = 61 * (2048 * 1152 + 32768 * 256)  # latents of the chosen, all index keys
        assert plan.decode_bytes(32768)["cache"] == read_at_once
    else:
        assert sum(by_component.values()) == 673_150_611_808
        assert round(sum(plan.decode_bytes(0).values()) / 1e9, 2) == 37.67
        assert plan.cache_bytes == 70_272 * 32768


def test_heads_and_experts_are_divided_among_devices():
    opened = published(v32=False)
    weights = weights_by_component(opened.plan.nbytes)
    fit_on = {"max_context": 4096, "free_bytes": 141 * 10**9, "device": "cuda"}
    plan = fit(opened.config, weights, world_size=8, **fit_on)
    shared = weights["embedding"] + weights["head"] + weights["norms"] + weights["router"]
    assert plan.total_weight_bytes == shared + (sum(weights.values()) - shared) // 8
    with pytest.raises(ValueError, match="world_size must divide the model's 128 heads, got 6"):
        fit(opened.config, weights, world_size=6, **fit_on)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax' in deepseek_v3"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' in deepseek_v2"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob true in deepseek_v2"),
        ("deepseek_v3", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias true"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave false"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq above 1"),
        ("deepseek_v3", {"rope_scaling": YARN | {"type": "llama3"}}, "rope type 'llama3'"),
    ],
)
def test_features_that_are_not_there(family, changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read(family, **changes)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ("deepseek_v3", {"n_group": 5}, "n_group: expected a divisor of 16 experts, found 5"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group: expected at most n_group 4, found 5"),
        ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 5},
         "num_experts_per_tok: expected at most the 4 experts that a token can choose from"),
        ("deepseek_v3", {"qk_rope_head_dim": 15}, "qk_rope_head_dim: expected an even number"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads: expected 4 as"),
        ("deepseek_v3", {"rope_scaling": YARN | {"factor": 0.5}}, "factor: expected at least 1"),
        ("deepseek_v3", {"num_nextn_predict_layers": 99}, "from 0 to 8"),
        ("deepseek_v3", {"eos_token_id": 256}, "256 is outside the vocabulary of 256"),
        ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank is missing"),
        ("deepseek_v32", {"index_topk": 0}, "index_topk: expected a whole number from 1"),
        ("deepseek_v32", {"index_head_dim": 8}, "index_head_dim: expected at least"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(family, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(family, **changes)


def damaged(folder, change):
    """A tiny checkpoint in one file after `change` of its tensors."""
    write_tiny_deepseek(folder, SMALL, shards=1)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_folder(folder)


def widen(tensors):
    tensors[SCALE] = torch.ones(2, 2)


def add(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(SCALE), rf"{EXPERT}: F8_E4M3 codes without scales"),
        (lambda t: t.pop(EXPERT), rf"{SCALE}: scales without the codes"),
        (add("model.norm.weight_scale_inv", torch.ones(1)), r"norm\.weight_scale_inv: scales with"),
        (widen, rf"{SCALE}: F32 of shape \(2, 2\) does not fit {EXPERT}"),
        (add("model.layers.1.mlp.gate.bias", torch.ones(8)), "1 tensors are not part of this"),
        (add("model.layers.3.norm.weight", torch.ones(8)), "1 tensors are not part of this model"),
        (add("lm_head.weight", torch.ones(256, 31)), r"lm_head.weight: expected \(?.*\(256, 32\)"),
        (lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"),
         r"1 of \d+ tensors are missing: model.layers.1.mlp.gate.e_score_correction_bias"),
    ],
    ids=["no scales", "no codes", "surplus scales", "other block", "surplus", "third layer",
         "other shape", "no router bias"],
)  # fmt: skip
def test_tensors_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        plan_model(damaged(tmp_path, change))


def test_an_fp8_nan_is_named(tmp_path):
    def spoil(tensors):
        tensors[EXPERT].view(torch.uint8)[2, 5] = 0x7F

    checkpoint = damaged(tmp_path, spoil)
    with pytest.raises(CheckpointError, match=rf"{EXPERT}: found an FP8 NaN at \(2, 5\)"):
        backends.create_backend(checkpoint, plan_model(checkpoint), device="cpu", progress=False)


def test_the_mtp_layer_is_counted_aloud(tmp_path, capsys):
    write_tiny_deepseek(tmp_path, SMALL)
    checkpoint = open_folder(tmp_path)
    opened = plan_model(checkpoint)
    assert all(name.startswith("model.layers.2.") for name in opened.plan.skipped)
    assert "model.layers.2.eh_proj.weight" in opened.plan.skipped
    backends.create_backend(checkpoint, opened, device="cpu")
    count = len(opened.plan.skipped)
    assert f"{count} weights are left out: multi-token prediction" in capsys.readouterr().err


def test_a_family_without_gpu_kernels(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backends, "has_kernels", lambda family: False)
    write_tiny_deepseek(tmp_path, SMALL)
    checkpoint = open_folder(tmp_path)
    opened = plan_model(checkpoint)
    with pytest.raises(UnsupportedModelError, match="no kernels for deepseek_v3") as error:
        backends.create_backend(checkpoint, opened, backend="triton", progress=False)
    assert "backend='reference'" in error.value.hint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    made = backends.create_backend(checkpoint, opened, progress=False)
    assert made.name == "reference" and made.device.type == "cpu"
    said = capsys.readouterr().err
    assert said == "running on the CPU, slowly: there are no GPU kernels for deepseek_v3 models\n"


@pytest.mark.parametrize("f", [128, 32])
def test_experts_need_room_in_memory(tmp_path, monkeypatch, f):
    """They are put together from tensors of their own; where blocks do not line up, decoded."""
    write_tiny_deepseek(tmp_path, replace(SMALL, f=f))
    checkpoint = open_folder(tmp_path)
    opened = plan_model(checkpoint)
    gate_up, down = 8 * 2 * f * 32, 8 * 32 * f
    needed = 4 * down + (gate_up + 8 * 2 * 4 if f == 128 else 4 * gate_up)
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda: needed)
    backends.create_backend(checkpoint, opened, device="cpu", progress=False)
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda: needed - 1)
    with pytest.raises(DoesNotFitError, match="cpu: experts are put together in memory"):
        backends.create_backend(checkpoint, opened, device="cpu", progress=False)


def test_config_json_without_its_architecture_still_opens(tmp_path):
    write_tiny_deepseek(tmp_path, SMALL, format="bf16")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan_model(open_folder(tmp_path)).config.num_mtp_layers == 1
