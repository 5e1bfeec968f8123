"""Plans from headers: bytes a token of published models, and the runtime's own allocation."""

from __future__ import annotations

import csv
import gc
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn.functional import pad

from kernels.persistent.formats import EXPERT_TILES
from kernels.persistent.pack import pack_dense
from kernels.persistent.sizes import router_blocks
from loaders.checkpoint import open_files, open_folder
from loaders.logical import logical_tensors
from loaders.weights import load_weights
from moe_runtime.bundled import BUNDLED
from moe_runtime.cache import KVCache
from moe_runtime.conversion.needs import disk_bytes, memory_bytes
from moe_runtime.conversion.options import ConversionOptions
from moe_runtime.conversion.planning import plan_conversion
from moe_runtime.gpu import persistent
from moe_runtime.machines import GPUS, find_gpu
from moe_runtime.models.registry import plan_model
from moe_runtime.plan import RESERVE_BYTES, MemoryPlan, weights_by_component
from moe_runtime.planning.components import by_component
from moe_runtime.planning.facts import count_experts, count_layers, planned_config
from moe_runtime.planning.report import plan_checkpoint
from moe_runtime.planning.speed import HIGH_SHARE, LOW_SHARE, predict
from moe_runtime.planning.variants import stored_bytes
from moe_runtime.tiles import more_bytes
from moe_runtime.triton_backend import TritonBackend
from quant import codecs
from quant.formats import FP8_BLOCK128, FP8_ROW, MXFP4, MXFP8, NVFP4
from tests.loaders.hub_server import ROOT
from tests.oracles.expert_formats import write_with_experts
from tests.oracles.published_headers import (
    deepseek_v3,
    deepseek_v4_flash,
    gpt_oss,
    qwen3_30b,
)
from tests.oracles.tiny_deepseek import Sizes, write_tiny_deepseek
from tests.oracles.tiny_deepseek_v4 import write_tiny_deepseek_v4
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
        report = plan_checkpoint(checkpoint, find_gpu("a100-80gb"), context=context)
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


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("format", ["demo", *EXPERT_TILES])
def test_tiles_take_what_is_planned_for_a_hopper_gpu(fp8, format, tmp_path):
    """To the byte: experts in tiles in place of their rows, dense weights in both."""
    folder = BUNDLED["demo"]
    if format != "demo":
        folder = tmp_path
        write_with_experts(folder, format, d=160, f=96, heads=8, kv=2, hd=64, experts=4)
    with open_folder(folder) as checkpoint:
        on_hopper = plan_checkpoint(checkpoint, H100, context=3000)
        elsewhere = plan_checkpoint(checkpoint, find_gpu("a100-80gb"), context=3000)
        opened = plan_model(checkpoint)
        config, cpu = opened.config, torch.device("cpu")
        stored = sum(opened.plan.nbytes[n] for n in opened.plan.nbytes if is_expert(n))
        weights = load_weights(checkpoint, opened.table, config.dims, config.num_layers, device=cpu)
    expert_format = weights["layers.0.moe.gate_up"].format
    relayout = persistent.relayout(config, expert_format, cpu)
    for names in relayout.groups:
        weights |= relayout.take({name: weights[name] for name in names})
    dense = [n for n in weights if n == "head" or n.endswith(("attention.qkv", "attention.out"))]
    # The output projection's rows are padded, and those that give experts' logits stand behind.
    more_rows = router_blocks(config.num_experts, fp8=fp8) * 128 + -config.model_width % 128
    packed = [
        pad(weights[name], (0, 0, 0, more_rows if name.endswith("out") else 0)) for name in dense
    ]
    if fp8:
        packed = [codecs.encode(weight, FP8_ROW).values for weight in packed]
    tiles = sum(pack_dense(weight).nbytes for weight in packed)
    tiles += sum(w.tiles.nbytes for n, w in weights.items() if n.endswith("moe.gate_up"))
    name = "dense fp8" if fp8 else "as published"
    row, plain = (
        next(row for row in report.what_if if row.name == name) for report in (on_hopper, elsewhere)
    )
    more = more_bytes(config, expert_format, fp8=fp8)
    assert tiles - stored == more.tiles
    besides = plain.total_bytes - plain.weight_bytes - RESERVE_BYTES
    grown = max(besides, more.packing) - besides
    assert row.total_bytes - plain.total_bytes == more.tiles + grown


def is_expert(name: str) -> bool:
    return name.endswith(("moe.gate_up", "moe.down"))


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_weights_of_deepseek_are_what_is_loaded(family, tmp_path):
    """To the byte, by component, as the runtime's own plan; layers of MTP are in neither."""
    if family == "deepseek_v4":
        write_tiny_deepseek_v4(tmp_path)
    else:
        whole_blocks = Sizes(family=family, d=256, w=256)  # others are decoded, on a CPU alone
        write_tiny_deepseek(tmp_path, whole_blocks, format="fp8")
    with open_folder(tmp_path) as checkpoint:
        report = plan_checkpoint(checkpoint, H100, context=1000)
        opened = plan_model(checkpoint)
        config = opened.config
        weights = load_weights(
            checkpoint, opened.table, config.dims, config.num_layers, device="cpu"
        )
    plan = MemoryPlan(config, weights_by_component(opened.plan.nbytes), 1000)
    assert report.what_if[0].weight_bytes == sum(weight.nbytes for weight in weights.values())
    assert report.read_by_component == {k: v for k, v in plan.decode_bytes(1000).items() if v}
    row = next(row for row in report.contexts if row.context == 1000)
    assert (row.cache_bytes, row.total_bytes) == (plan.cache_bytes, plan.total_bytes)


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


@pytest.mark.parametrize("model", ["gpt-oss-20b", "v4-flash"])
def test_a_config_tells_what_the_runtime_allocates(model):
    """The sizes read for families that we do not run are those of the families that we run."""
    with open_files(MODELS[model]()) as checkpoint:
        known = plan_model(checkpoint).config
        tensors = logical_tensors(checkpoint)
        layers = count_layers(checkpoint.config, tensors)
        groups = by_component(tensors, layers)
        guessed = planned_config(checkpoint.config, groups, layers, count_experts(tensors))
    assert guessed.cache_parts == known.cache_parts
    assert guessed.unknown == ()
    for name in ("num_layers", "model_width", "num_experts", "experts_per_token", "expert_width",
                 "vocab_size", "max_context"):  # fmt: skip
        assert getattr(guessed, name) == getattr(known, name), name
    ours, theirs = (MemoryPlan(config, {}, 5000) for config in (guessed, known))
    assert ours.workspace_bytes == theirs.workspace_bytes


@pytest.mark.parametrize("target", ["mxfp4", "nvfp4", "mxfp8", "fp8-block", "fp8-channel"])
def test_conversion_rows_are_what_convert_plans(target):
    with open_files(qwen3_30b(layers=2)) as checkpoint:
        report = plan_checkpoint(checkpoint, H100)
        planned = plan_conversion(checkpoint, ConversionOptions(target))
    row = next(row for row in report.conversions if row.target == target)
    assert row.output_bytes == planned.tensor_bytes
    assert row.converted == sum(output.converts for _, output in planned.outputs)
    outputs = [output for _, output in planned.outputs]
    held = report.total_bytes  # the source is one shard
    assert row.disk_bytes == disk_bytes(row.output_bytes, held)
    assert 0 < disk_bytes(planned.output_bytes, held) - row.disk_bytes < 1000 * len(outputs)
    assert row.memory_bytes == memory_bytes(outputs)
    assert row.problem is None


def test_another_form_is_work_for_plan_as_for_convert():
    """DeepSeek's FP8 blocks as compressed-tensors: the names of the scales change, no number."""
    with open_files(qwen3_30b(layers=2, fp8=True)) as checkpoint:
        report = plan_checkpoint(checkpoint, H100)
        planned = plan_conversion(checkpoint, ConversionOptions("fp8-block"))
    row = next(row for row in report.conversions if row.target == "fp8-block")
    assert (row.converted, row.problem) == (0, None)
    assert row.output_bytes == planned.tensor_bytes


def test_conversions_that_are_of_no_use_say_why():
    rows = {row.target: row for row in report_of("gpt-oss-20b").conversions}
    assert rows["mxfp4"].problem == "no routed experts that are not in mxfp4 already"
    assert "rounds rounded weights again" in rows["nvfp4"].problem
    assert rows["bf16"].problem is None
    assert rows["bf16"].output_bytes / 1e9 == pytest.approx(41.83, rel=1e-3)  # 20.91 B parameters


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (MXFP4, 2 * 200 * (160 // 2 + 160 // 32)),
        (MXFP8, 2 * 200 * (160 + 160 // 32)),
        (NVFP4, 2 * (200 * (160 // 2 + 160 // 16) + 4)),
        (FP8_BLOCK128, 2 * (200 * 160 + 4 * 2 * 2)),
        (FP8_ROW, 2 * 200 * (160 + 4)),
    ],
)
def test_bytes_in_a_format(format, expected):
    assert stored_bytes((2, 200, 160), format) == expected


def test_speed_is_a_share_of_the_bandwidth():
    band = predict(5_000_000_000, replace(H100, read_gbps=3000.0))
    assert band.bound == pytest.approx(600)
    assert (band.low, band.high) == pytest.approx((600 * LOW_SHARE, 600 * HIGH_SHARE))
    assert band.text() == "359 to 493"


def test_shares_are_rows_of_our_results():
    path = ROOT / "benchmarks" / "results" / "h100.csv"
    with path.open(newline="") as file:
        found = {row["value"] for row in csv.DictReader(file) if row["metric"] == "bandwidth_share"}
    assert {str(LOW_SHARE), str(HIGH_SHARE)} <= found


@pytest.mark.parametrize("name", ["h200", "H200", "NVIDIA H200"])
def test_gpus_are_found_by_key_and_name(name):
    assert find_gpu(name).read_gbps == 4490.0
    assert find_gpu(name).source == "measured on one before"


def test_gpus_that_were_not_measured_say_so():
    assert find_gpu("RTX 4090").read_gbps == pytest.approx(0.92 * 1008)
    assert find_gpu("rtx-4090").source == "92 % of the data sheet's 1008 GB/s, not measured"
    assert len({row.key for row in GPUS}) == len({row.name for row in GPUS}) == len(GPUS)
    with pytest.raises(ValueError, match="no GPU named 'voodoo2' in the table: expected one of b2"):
        find_gpu("voodoo2")


def test_what_fits_where():
    gpus = [find_gpu(name) for name in ("h100", "rtx-5090", "rtx-4090")]
    with open_files(MODELS["gpt-oss-20b"]()) as checkpoint:
        small = plan_checkpoint(checkpoint, H100, gpus)
    assert {row.longest_context for row in small.fits} == {131072}
    with open_files(MODELS["gpt-oss-120b"]()) as checkpoint:
        large = plan_checkpoint(checkpoint, H100, gpus)
    published = [row for row in large.fits if row.variant == "as published"]
    assert [row.gpus_needed for row in published] == [1, 2, 3]
    assert [row.longest_context for row in published] == [131072, 0, 0]
    assert [row.fits for row in large.contexts] == [True] * len(large.contexts)


def test_the_longest_context_is_where_memory_ends():
    with open_files(MODELS["qwen3-30b-fp8"]()) as checkpoint:
        report = plan_checkpoint(checkpoint, find_gpu("rtx-5090"), [find_gpu("rtx-5090")])
        longest = report.fits[0].longest_context
        at_limit = plan_checkpoint(checkpoint, find_gpu("rtx-5090"), context=longest)
        beyond = plan_checkpoint(checkpoint, find_gpu("rtx-5090"), context=longest + 256)
    assert 8192 < longest < 40960
    fits = [
        [row.fits for row in r.contexts if row.context == r.context] for r in (at_limit, beyond)
    ]
    assert fits == [[True], [False]]
