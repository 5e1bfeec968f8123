"""Plans from headers: bytes a token of published models, and the runtime's own allocation."""

from __future__ import annotations

import csv
import gc
import json
from dataclasses import replace
from functools import cache

import pytest
import torch

from loaders.checkpoint import open_files, open_folder
from loaders.errors import CheckpointError
from loaders.logical import logical_tensors
from loaders.weights import load_weights
from moe_runtime.bundled import BUNDLED
from moe_runtime.cache import KVCache
from moe_runtime.conversion.options import ConversionOptions
from moe_runtime.conversion.planning import plan_conversion
from moe_runtime.machines import GPUS, find_gpu
from moe_runtime.models.registry import plan_model
from moe_runtime.plan import RESERVE_BYTES, MemoryPlan, weights_by_component
from moe_runtime.planning.components import by_component, component_of_tensor
from moe_runtime.planning.facts import count_layers, planned_config
from moe_runtime.planning.report import plan_checkpoint
from moe_runtime.planning.speed import HIGH_SHARE, LOW_SHARE, predict
from moe_runtime.planning.variants import stored_bytes
from moe_runtime.triton_backend import TritonBackend
from quant.formats import FP8_BLOCK128, FP8_ROW, MXFP4, MXFP8, NVFP4
from tests.loaders.hub_server import ROOT
from tests.oracles.published_headers import (
    HeaderFiles,
    deepseek_v3,
    deepseek_v4_flash,
    gpt_oss,
    qwen3_30b,
)
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss

H100 = find_gpu("h100")
MODELS = {
    "gpt-oss-20b": lambda: gpt_oss(layers=24, experts=32),
    "gpt-oss-120b": lambda: gpt_oss(layers=36, experts=128),
    "v3": deepseek_v3,
    "v3.2 of 5 layers": lambda: deepseek_v3(v32=True, layers=5),
    "v4-flash": deepseek_v4_flash,
    "qwen3-30b": qwen3_30b,
    "qwen3-30b-fp8": lambda: qwen3_30b(fp8=True),
}


@cache
def report_of(model):
    """The plan for one H100 and a cache of one token: the weights' bytes alone, to 1e-4."""
    with open_files(MODELS[model]()) as checkpoint:
        return plan_checkpoint(checkpoint, H100, [H100], context=1)


def what_if(report, name):
    return next(row for row in report.what_if if row.name == name)


@pytest.mark.parametrize(
    ("model", "gb", "loaded_bytes"),
    [
        ("gpt-oss-20b", 3.708, 13_761_264_768),
        ("gpt-oss-120b", 5.003, 65_248_815_744),
        ("v3", 37.67, 673_150_611_808),
        ("v4-flash", 11.22, 156_015_698_140),
        ("qwen3-30b", 6.08, 61_064_245_248),
        ("qwen3-30b-fp8", 3.37, None),
    ],
)
def test_bytes_of_a_token_of_published_models(model, gb, loaded_bytes):
    """Against figures worked out by hand from the published tensor lists."""
    report = report_of(model)
    assert report.token_bytes / 1e9 == pytest.approx(gb, rel=2e-3)
    assert report.what_if[0].token_bytes == report.token_bytes
    if loaded_bytes:
        assert report.what_if[0].weight_bytes == loaded_bytes


@pytest.mark.parametrize(
    ("model", "variant", "gb"),
    [
        ("gpt-oss-20b", "dense fp8", 2.492),
        ("gpt-oss-120b", "dense fp8", 3.468),
        ("qwen3-30b-fp8", "dense fp8", 3.06),
        ("qwen3-30b", "dense fp8, experts mxfp4, kv fp8", 2.21),
    ],
)
def test_what_if_bytes(model, variant, gb):
    assert what_if(report_of(model), variant).token_bytes / 1e9 == pytest.approx(gb, rel=3e-3)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            "v4-flash",
            {
                "experts": 3.45, "shared experts": 1.08, "attention": 4.60, "router": 0.09,
                "hyper-connections": 0.14, "head": 1.06, "compressor+indexer": 0.80,
                "hash tables": 0.0,
            },
        ),
        (
            "v3",
            {
                "experts": 20.44, "shared experts": 2.56, "mlp": 1.19, "attention": 11.42,
                "router": 0.21, "head": 1.85, "mtp": 0.0,
            },
        ),
        (
            "v3.2 of 5 layers",
            {"indexer": 5 * 0.01443, "attention": 5 * 0.1872, "mlp": 1.19, "experts": 2 * 0.3524},
        ),
    ],
)  # fmt: skip
def test_bytes_of_a_token_by_component(model, expected):
    read = dict(report_of(model).read_by_component)
    read["compressor+indexer"] = read.get("compressor", 0) + read.get("indexer", 0)
    found = {name: read.get(name, 0) / 1e9 for name in expected}
    assert found == pytest.approx(expected, abs=0.0061)  # they are given to 0.01


@pytest.mark.parametrize(
    ("model", "context", "read_mb", "kept_mb"),
    [
        ("v3", 131072, 9210, 9210),
        ("v4-flash", 131072, 214, 907 + 43 * 2.097),  # the rings hold one chunk of prefill more
        ("gpt-oss-120b", 8192, 302 + 4.7, 302 + 18 * 4.456),
        ("qwen3-30b", 32768, 3221, 3221),
    ],
)
def test_cache_by_context(model, context, read_mb, kept_mb):
    first, *rows = report_of(model).contexts
    row = next(row for row in rows if row.context == context)
    assert (row.token_bytes - first.token_bytes) / 1e6 == pytest.approx(read_mb, rel=5e-3)
    assert row.cache_bytes / 1e6 == pytest.approx(kept_mb, rel=5e-3)


def test_the_whole_of_a_checkpoint_is_accounted_for():
    report = report_of("v4-flash")
    assert report.total_bytes == 159_609_485_896
    assert {part.name for part in report.components} >= {"mtp", "hash tables"}
    assert not any(part.name == "other" for part in report.components)
    assert "mtp (3.59 GB) is not loaded and not counted" in report.notes
    assert report.active_parameters / 1e9 == pytest.approx(13.27, rel=1e-2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_gpt_oss(folder, window=128)
    return folder


@pytest.mark.parametrize("which", ["tiny", "demo"])
def test_prediction_is_allocation(which, tiny):
    """Weights and cache to the byte; everything else that a backend holds within the buffers."""
    context = 3000  # longer than window and chunk together
    with open_folder(tiny if which == "tiny" else BUNDLED["demo"]) as checkpoint:
        report = plan_checkpoint(checkpoint, H100, context=context)
        opened = plan_model(checkpoint)
        config = opened.config
        weights = load_weights(
            checkpoint, opened.table, config.dims, config.num_layers, device="cpu"
        )
    row = next(row for row in report.contexts if row.context == context)
    loaded = sum(weight.nbytes for weight in weights.values())
    assert report.what_if[0].weight_bytes == loaded
    cache = KVCache.allocate(config, context, torch.device("meta"), torch.bfloat16)
    cache_bytes = sum(t.nbytes for t in cache.keys + cache.values)
    assert row.cache_bytes == cache_bytes
    plan = MemoryPlan(config, weights_by_component(opened.plan.nbytes), context)
    assert row.total_bytes == plan.total_bytes
    backend = TritonBackend(config, weights, plan, torch.device("cpu"))
    buffers = storage_bytes(backend) - loaded - cache_bytes
    assert 0 < buffers <= row.workspace_bytes
    assert row.total_bytes == loaded + cache_bytes + row.workspace_bytes + RESERVE_BYTES


def storage_bytes(root) -> int:
    """Bytes of all tensors that can be reached from an object, shared memory counted once."""
    seen, sizes, todo = set(), {}, [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            sizes[thing.untyped_storage().data_ptr(), thing.data_ptr()] = thing.nbytes
        elif isinstance(thing, (dict, list, tuple)) or hasattr(thing, "__dict__"):
            todo += [
                held for held in gc.get_referents(thing)
                if isinstance(held, (dict, list, tuple, torch.Tensor))
                or type(held).__module__.startswith(("moe_runtime", "kernels", "quant"))
            ]  # fmt: skip
    return sum(sizes.values())
