"""What a plan reads from configs and names of families that we do not run, and what it cannot."""

from __future__ import annotations

import re

import pytest

from loaders.checkpoint import open_files
from loaders.errors import CheckpointError
from moe_runtime.machines import find_gpu
from moe_runtime.planning.components import component_of_tensor
from moe_runtime.planning.report import plan_checkpoint
from tests.oracles.published_headers import HeaderFiles

H100 = find_gpu("h100")


def small_model(config, *, tied=False, extra=()):
    """Two layers of 4 experts with heads of 16; `config` on top of a plain one."""
    d, tensors = 64, {"model.embed_tokens.weight": ("BF16", (1000, 64))}
    if not tied:
        tensors["lm_head.weight"] = ("BF16", (1000, d))
    for i in range(2):
        p = f"model.layers.{i}."
        for name, rows, columns in (("q", 64, d), ("k", 32, d), ("v", 32, d), ("o", d, 64)):
            tensors[f"{p}self_attn.{name}_proj.weight"] = ("BF16", (rows, columns))
        for e in range(4):
            for name in ("gate", "up", "down"):
                tensors[f"{p}mlp.experts.{e}.{name}_proj.weight"] = ("BF16", (d, d))
    tensors |= dict.fromkeys(extra, ("BF16", (100,)))
    plain = {
        "model_type": "unheard_of", "num_hidden_layers": 2, "hidden_size": d,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": d,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    given = {key: value for key, value in (plain | config).items() if value != "missing"}
    with open_files(HeaderFiles(given, tensors)) as checkpoint:
        return plan_checkpoint(checkpoint, H100, context=1000)


ROW = 2 * 2 * 16 * 2  # keys and values of a token, bf16


@pytest.mark.parametrize(
    ("config", "cache_read", "cache_kept"),
    [
        ({}, 2 * 1000 * ROW, 2 * 1000 * ROW),
        ({"sliding_window": 64, "use_sliding_window": False}, 2 * 1000 * ROW, 2 * 1000 * ROW),
        ({"sliding_window": 64}, 2 * 64 * ROW, 2 * 1000 * ROW),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
         1064 * ROW, 2 * 1000 * ROW),
        ({"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 100},
         1100 * ROW, 2 * 1000 * ROW),
        ({"kv_lora_rank": 48, "qk_rope_head_dim": 16}, 2 * 1000 * 128, 2 * 1000 * 128),
        ({"kv_lora_rank": 48, "qk_rope_head_dim": 16, "index_topk": 100, "index_head_dim": 32},
         2 * (100 * 128 + 1000 * 64), 2 * 1000 * (128 + 64)),
        ({"text_config": {"num_key_value_heads": 1}}, 1000 * ROW, 1000 * ROW),
    ],
)  # fmt: skip
def test_caches_of_other_families(config, cache_read, cache_kept):
    report = small_model(config)
    assert report.read_by_component["cache"] == cache_read
    row = next(row for row in report.contexts if row.context == 1000)
    assert row.cache_bytes == cache_kept
    assert report.backends == ()
    assert not [note for note in report.notes if note.startswith("not known")]


def test_linear_attention_keeps_a_state_that_is_read_and_written():
    config = {
        "full_attention_interval": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
    }  # fmt: skip
    state = 4 * 4 * 8 * 16 + 2 * (2 * 2 * 8 + 4 * 16) * 3
    report = small_model(config)
    assert report.read_by_component["state"] == 2 * state
    assert report.read_by_component["cache"] == 1000 * ROW
    assert next(r for r in report.contexts if r.context == 1000).cache_bytes == 1000 * ROW + state


def test_a_tied_head_is_read_though_it_is_not_stored():
    apart, tied = small_model({}), small_model({}, tied=True)
    assert tied.read_by_component == apart.read_by_component
    assert tied.what_if[0].weight_bytes == apart.what_if[0].weight_bytes - 2 * 1000 * 64


@pytest.mark.parametrize(
    ("config", "extra", "remark"),
    [
        ({"num_experts_per_tok": "missing"}, (), "experts of a token .*: all 4 counted"),
        ({"max_position_embeddings": "missing"}, (), "longest context .*: 131072 assumed"),
        ({"num_hidden_layers": "missing"}, (), "layers are not in config.json: 2 by the names"),
        ({"hidden_size": "missing"}, (), "model width .*: 64 by the embedding"),
        ({"num_attention_heads": "missing", "num_key_value_heads": "missing"}, (),
         "no cache is counted"),
        ({"layer_types": ["mamba", "full_attention"]}, (), "1 layers are mamba"),
        ({"num_experts": 8}, (), "config.json says 8 experts, the files have 4"),
        ({}, ("model.layers.1.wormhole",), "what 1 tensors are for.*: model.layers.1.wormhole"),
    ],
)  # fmt: skip
def test_what_could_not_be_known_is_said(config, extra, remark):
    notes = [note for note in small_model(config, extra=extra).notes if "not known" in note]
    assert len(notes) == 1
    assert re.search(remark, notes[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts_per_tok": 5}, "5 experts a token, but a layer has 4"),
        ({"num_experts_per_tok": "two"}, "num_experts_per_tok: expected a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: expected a whole number from 0"),
        ({"num_hidden_layers": 10**9}, "a whole number from 0 to 1024"),
        ({"compress_ratios": [4]}, "compress_ratios has 1 entries, expected at least 2"),
        ({"compress_ratios": [4, "x"]}, "compress_ratios: expected a list of whole numbers"),
    ],
)
def test_configs_that_cannot_be_are_errors(config, message):
    with pytest.raises(CheckpointError, match=message):
        small_model(config)


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("model.layers.3.mlp.experts.17.down_proj.weight", "experts"),
        ("model.layers.3.mlp.experts.gate_up_proj", "experts"),
        ("block.3.mlp.mlp1_weight", "experts"),
        ("model.layers.3.block_sparse_moe.experts.1.w2.weight", "experts"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "shared experts"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "shared experts"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.3.block_sparse_moe.e_score_correction_bias", "router"),
        ("block.3.mlp.gate.bias", "router"),
        ("layers.2.ffn.gate.tid2eid", "hash tables"),
        ("model.layers.3.mlp.gate_proj.weight", "mlp"),
        ("model.layers.3.self_attn.q_norm.weight", "norms"),
        ("model.layers.3.self_attn.indexer.k_norm.weight", "indexer"),
        ("layers.3.attn.indexer.compressor.wkv.weight", "indexer"),
        ("layers.3.attn.compressor.norm.weight", "compressor"),
        ("layers.3.hc_attn_fn", "hyper-connections"),
        ("hc_head_base", "hyper-connections"),
        ("model.layers.3.linear_attn.in_proj_qkvz.weight", "attention"),
        ("layers.3.attn.attn_sink", "attention"),
        ("model.layers.4.mlp.experts.17.down_proj.weight", "mtp"),
        ("mtp.0.ffn.experts.1.w1.weight", "mtp"),
        ("model.visual.blocks.3.attn.qkv.weight", "vision"),
        ("head.weight", "head"),
        ("unembedding.weight", "head"),
        ("embed.weight", "embedding"),
    ],
)
def test_components_by_name(name, component):
    assert component_of_tensor(name, num_layers=4) == component
