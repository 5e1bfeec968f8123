"""Memory: the plan adds up, the longest context that fits is found, a misfit says what would."""

import pytest
import torch

from moe_runtime.cache import KVCache
from moe_runtime.errors import DoesNotFitError
from moe_runtime.models.gpt_oss_config import read_config
from moe_runtime.plan import MemoryPlan, component_of, fit, weights_by_component
from tests.oracles.tiny_gpt_oss import hf_config

SIZES = hf_config(
    layers=4, d=64, f=64, heads=8, kv=8, hd=64, experts=8, topk=4, window=128, vocab=256
)
WEIGHTS = {"embedding": 10**9, "attention": 2 * 10**9, "experts": 10 * 10**9, "head": 10**9}


@pytest.fixture
def config():
    return read_config(SIZES, {}, "huggingface")


def test_components():
    names = {
        "embedding": "embedding", "head": "head", "final_norm": "norms",
        "layers.3.attention.norm": "norms", "layers.3.attention.qkv": "attention",
        "layers.11.attention.sinks": "attention", "layers.0.moe.norm": "norms",
        "layers.0.moe.router_bias": "router", "layers.0.moe.gate_up": "experts",
        "layers.0.moe.down_bias": "experts",
    }  # fmt: skip
    assert {name: component_of(name) for name in names} == names
    assert weights_by_component(dict.fromkeys(names, 2))["attention"] == 4


def test_the_cache_takes_what_is_planned(config):
    plan = MemoryPlan(config, WEIGHTS, 4096)
    cache = KVCache.allocate(config, 4096, torch.device("meta"), torch.bfloat16)
    assert sum(t.nbytes for t in cache.keys + cache.values) == plan.cache_bytes
    # two full layers of 4,096 positions, two rings of the window and a chunk; 2,048 bytes each
    assert plan.cache_bytes == (2 * 4096 + 2 * (128 + 2048)) * 2048


def test_bytes_of_a_token(config):
    plan = MemoryPlan(config, WEIGHTS, 4096)
    read = plan.decode_bytes(1000)
    assert read["experts"] == WEIGHTS["experts"] * config.experts_per_token // config.num_experts
    assert read["cache"] == (2 * 1000 + 2 * 128) * 2048
    assert read["embedding"] == 10**9 // config.vocab_size


def test_the_longest_context_that_fits(config):
    whole = MemoryPlan(config, WEIGHTS, config.max_context).total_bytes
    assert fit(config, WEIGHTS, max_context=None, free_bytes=whole, device="gpu").max_context == (
        config.max_context
    )
    tight = MemoryPlan(config, WEIGHTS, 40000).total_bytes
    found = fit(config, WEIGHTS, max_context=None, free_bytes=tight, device="gpu")
    assert 39000 <= found.max_context <= 40000
    assert found.total_bytes <= tight


def test_what_does_not_fit_says_what_would(config):
    tight = MemoryPlan(config, WEIGHTS, 8192).total_bytes
    with pytest.raises(DoesNotFitError, match=r"cuda:0: .* 131072 tokens needs .* are free") as e:
        fit(config, WEIGHTS, max_context=131072, free_bytes=tight, device="cuda:0")
    assert "a context of 8192 tokens fits" in e.value.hint
    with pytest.raises(DoesNotFitError) as e:
        fit(config, WEIGHTS, max_context=None, free_bytes=10**9, device="cuda:0")
    assert "weights alone take 14.00 GB" in e.value.hint
