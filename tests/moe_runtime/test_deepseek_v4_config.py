"""DeepSeek V4: facts of the published models, bad configs and damaged weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loaders.checkpoint import open_files, open_folder
from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.weights import load_weights
from moe_runtime.models.deepseek_v4 import DeepseekV4Reference
from moe_runtime.models.deepseek_v4_config import read_config
from moe_runtime.models.registry import plan_model
from moe_runtime.plan import MemoryPlan, weights_by_component
from tests.oracles.published_headers import deepseek_v4_flash
from tests.oracles.tiny_deepseek_v4 import (
    Sizes,
    published_config,
    sizes_with,
    write_tiny_deepseek_v4,
)

SMALL = sizes_with(
    ratios=(0, 4, 16), d=64, heads=2, experts=4, experts_per_token=2, hash_layers=1, index_heads=2
)
EXPERT = "layers.1.ffn.experts.2.w1"
DENSE = "layers.1.attn.wq_b"


@pytest.fixture(scope="module")
def flash():
    return plan_model(open_files(deepseek_v4_flash()))


def test_flash_has_the_published_bytes(flash):
    """156,015,698,140 bytes without MTP, and the 11.22 GB of a token that its tensors add up to."""
    assert flash.plan.total_bytes == 156_015_698_140
    plan = MemoryPlan(flash.config, weights_by_component(flash.plan.nbytes), 131072)
    assert sum(plan.decode_bytes(0).values()) == pytest.approx(11.22e9, rel=1e-3)
    assert plan.decode_bytes(131072)["cache"] == pytest.approx(214e6, rel=2e-3)


def test_facts_of_flash(flash):
    c = flash.config
    assert c.compress_ratios == (0, 0, *(4, 128) * 20, 4)
    assert (c.num_hash_layers, c.index_top_k, c.streams, c.rotary_width) == (3, 512, 4, 64)
    assert (c.window_rope.theta, c.window_rope.factor) == (10000.0, 1.0)
    assert (c.compressed_rope.theta, c.compressed_rope.factor) == (160000.0, 16.0)
    assert c.rope_of(0) == c.window_rope and c.rope_of(2) == c.compressed_rope
    assert c.eos_token_ids == (1,)
    assert set(flash.plan.skipped.values()) == {"multi-token prediction is not used"}


def read(**changes):
    """The config of a tiny model with some keys changed; a value of None removes the key."""
    config = published_config(Sizes(), "fp4") | changes
    config = {key: value for key, value in config.items() if value is not None}
    return read_config(config, {}, "huggingface")


def test_stop_tokens_of_the_generation_config_come_first():
    config = published_config(Sizes(), "fp4")
    model = read_config(config, {"eos_token_id": [1, 7]}, "huggingface")
    assert model.eos_token_ids == (1, 7)


@pytest.mark.parametrize("tail", [[], [0], [0, 0, 0]])
def test_ratios_of_mtp_blocks_are_cut_off(tail):
    assert read(compress_ratios=[0, 0, 4, 16, 4, 16, 4, *tail]) == read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_ratios": [0, 0, 4, 16, 4, 16]}, "compress_ratios: expected a list of 7"),
        ({"compress_ratios": [0] * 16}, "compress_ratios: expected a list of 7"),
        ({"compress_ratios": [0, 0, 4, 16, 4, 16, 4, 4]}, "compress_ratios: expected 0 after"),
        ({"compress_ratios": [0, 0, 4, 16, 4, -1, 4]}, "compress_ratios: expected 0 or"),
        ({"compress_ratios": [0, 0, 4, 16, 4, True, 4]}, "compress_ratios: expected 0 or"),
        ({"compress_ratios": 4}, "compress_ratios: expected a list of 7"),
        ({"compress_ratios": None}, "layer_types: expected a list of 7"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: expected at most the 8"),
        ({"o_groups": 3}, "num_attention_heads: expected a multiple of 3"),
        ({"qk_rope_head_dim": 33}, "qk_rope_head_dim"),
        ({"qk_rope_head_dim": 34}, "qk_rope_head_dim: expected at most 32"),
        ({"hc_sinkhorn_iters": 0}, "hc_sinkhorn_iters"),
        ({"swiglu_limit": None}, "swiglu_limit is missing"),
        ({"num_hash_layers": -1}, "num_hash_layers"),
        ({"eos_token_id": 256}, "eos_token_id: 256 is outside"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor: expected at least 1"),
    ],
)
def test_a_config_that_cannot_be(changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ({"n_shared_experts": 2}, "n_shared_experts 2"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"norm_topk_prob": False}, "norm_topk_prob false"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "yarn", "mscale": 1.0}}, "mscale"),
        ({"text_config": {"hidden_size": 5120}}, r"V4\.1"),
        ({"compress_ratios": None, "layer_types": ["full_attention"] * 7}, "layer_types"),
    ],
)
def test_a_feature_that_we_lack(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read(**changes)


@pytest.fixture
def folder(tmp_path):
    """A tiny checkpoint in one file."""
    write_tiny_deepseek_v4(tmp_path, SMALL, shards=1)
    return tmp_path


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_v41_is_refused_by_name(folder):
    edit_config(folder, model_type="deepseek_v41", architectures=["DeepseekV41ForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"DeepSeek V4\.1.*deepseek_v41.*not supported"):
        plan_model(open_folder(folder))


def cut(tensors, name):
    tensors[name] = tensors[name][:, :-1].contiguous()


DAMAGES = {
    "FP4 codes of odd length": (
        lambda t: cut(t, f"{EXPERT}.weight"), f"{EXPERT}.scale.*fit",
    ),
    "FP4 scales too few": (lambda t: cut(t, f"{EXPERT}.scale"), f"{EXPERT}.scale.*fit"),
    "FP4 scales missing": (lambda t: t.pop(f"{EXPERT}.scale"), f"{EXPERT}.weight"),
    "FP8 scales missing": (lambda t: t.pop(f"{DENSE}.scale"), f"{DENSE}.weight.*without scales"),
    "FP8 codes missing": (lambda t: t.pop(f"{DENSE}.weight"), f"{DENSE}.scale.*without the codes"),
    "FP8 scales of 64x64 blocks": (
        lambda t: t.update({f"{DENSE}.scale": t[f"{DENSE}.scale"].repeat(2, 2)}),
        f"{DENSE}.scale.*fit",
    ),
    "scales of a plain weight": (
        lambda t: t.update({"layers.1.attn.q_norm.scale": t[f"{DENSE}.scale"].clone()}),
        "layers.1.attn.q_norm.scale",
    ),
    "a layer's table missing": (
        lambda t: t.pop("layers.0.ffn.gate.tid2eid"), "missing: layers.0.ffn.gate.tid2eid",
    ),
    "an indexer too many": (
        lambda t: t.update({"layers.2.attn.indexer.weights_proj.weight": torch.zeros(2, 64)}),
        "not part of this model: layers.2.attn.indexer",
    ),
    "an expert missing": (lambda t: t.pop("layers.2.ffn.experts.3.w2.weight"), "experts.3.w2"),
    "a compressor of another ratio": (
        lambda t: t.update({"layers.2.attn.compressor.ape": torch.zeros(8, 32)}),
        "layers.2.attn.compressor.ape: expected shape",
    ),
    "a table of floats": (
        lambda t: t.update({"layers.0.ffn.gate.tid2eid": torch.zeros(256, 2)}),
        "tid2eid: expected dtype I64 or I32, found F32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_headers_that_do_not_fit(folder, damage):
    change, message = DAMAGES[damage]
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        plan_model(open_folder(folder))


def load(folder):
    checkpoint = open_folder(folder)
    opened = plan_model(checkpoint)
    c = opened.config
    weights = load_weights(
        checkpoint, opened.table, c.dims, c.num_layers, device="cpu", progress=False
    )
    return DeepseekV4Reference(c, weights, torch.device("cpu"))


def test_an_undamaged_one_loads(folder):
    model = load(folder)
    assert model.head(model.forward(torch.tensor([3, 4, 5]))).isfinite().all()


@pytest.mark.parametrize("expert", [-1, 4])
def test_a_table_that_names_an_expert_there_is_not(folder, expert):
    edit_tensors(folder, lambda t: t["layers.0.ffn.gate.tid2eid"][9].fill_(expert))
    with pytest.raises(CheckpointError, match=rf"tid2eid.*from 0 to 3, found {expert} for token 9"):
        load(folder)


def test_a_scale_that_is_nan(folder):
    edit_tensors(folder, lambda t: t[f"{EXPERT}.scale"].view(torch.uint8)[5].fill_(255))
    with pytest.raises(CheckpointError, match=rf"{EXPERT}.scale: found scale byte 255"):
        load(folder)


def test_an_fp8_code_that_is_nan(folder):
    edit_tensors(folder, lambda t: t[f"{DENSE}.weight"].view(torch.uint8)[5].fill_(127))
    with pytest.raises(CheckpointError, match=rf"{DENSE}.weight: found an FP8 NaN"):
        load(folder)
