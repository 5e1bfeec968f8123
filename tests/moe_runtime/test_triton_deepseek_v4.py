"""DeepSeek V4 in the triton backend against the reference, in Triton's interpreter.

See triton_pairs.py for what is not as published. Sequences pass the window many times, finish
compressed rows, and leave the indexer more of them than it may choose.
"""

from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from kernels.reference import hyper_connections as hyper_twin
from loaders.checkpoint import open_folder
from loaders.errors import CheckpointError
from moe_runtime.gpu import compressed_cache, deepseek_v4, deepseek_v4_prefill
from moe_runtime.gpu.compressed_cache import CompressedCache
from moe_runtime.gpu.deepseek_v4_weights import V4Weights
from moe_runtime.gpu.families import GPU_FAMILIES
from moe_runtime.models.registry import plan_model
from moe_runtime.plan import MemoryPlan
from moe_runtime.reference_backend import sampling_settings
from moe_runtime.roofline import COMPONENTS
from moe_runtime.sampling import SamplingParams
from quant.formats import FP8_BLOCK128_E8M0, MXFP4
from tests.moe_runtime.triton_pairs import (
    CPU,
    check_components_of_launches,
    flat,
    form,
    load,
    make_pair,
)
from tests.oracles.tiny_deepseek import Sizes as DeepseekSizes
from tests.oracles.tiny_deepseek import write_tiny_deepseek
from tests.oracles.tiny_deepseek_v4 import sizes_with, write_tiny_deepseek_v4
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs the interpreter; tests/gpu covers machines with a GPU"
)
GREEDY = SamplingParams(temperature=0.0)
# Sinkhorn's iterations are slow in the interpreter; tests/kernels has all 20.
SMALL = {
    "d": 32, "heads": 4, "width": 16, "rotary": 8, "query_rank": 16, "groups": 2, "output_rank": 8,
    "window": 5, "index_heads": 32, "index_width": 8, "top_k": 2, "experts": 4,
    "experts_per_token": 2, "f": 32, "hash_layers": 1, "vocab": 40, "sinkhorn_iterations": 2,
}  # fmt: skip
INDEXED = sizes_with(**SMALL | {"ratios": (0, 4)})
# Blocks of scales line up, as they do in the published models.
LINED_UP = sizes_with(
    **SMALL | {"ratios": (4, 16, 0, 4), "hash_layers": 2, "query_rank": 128, "width": 32,
               "groups": 1, "output_rank": 128, "d": 128, "f": 128}
)  # fmt: skip
IDS = torch.randint(0, 40, (17,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPT = 14  # ends within a window of 4
CHUNK = 7


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """With chunks of CHUNK tokens, so that the ring of recent rows wraps too."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_deepseek_v4(folder, INDEXED, shards=1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (deepseek_v4, compressed_cache):
            patch.setattr(module, "PREFILL_CHUNK", CHUNK)
        return make_pair(folder)


@pytest.fixture(scope="module")
def expected(pair):
    return pair[0].logits(IDS)


def test_prefill(pair, expected):
    """In chunks that end within windows; the ring holds one of them and the window."""
    _, triton = pair
    assert triton._prefill.chunk == CHUNK and triton._step.cache.slots == CHUNK + 5 < len(IDS)
    ours = triton.logits(IDS)
    assert_close(ours, expected, "model_fp32")
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(ours * 1.01, expected, "model_fp32")


def test_steps(pair):
    """Tokens, logits, and what is cached then, against a prompt of the same tokens."""
    reference, triton = pair
    runs = [list(b.decode(IDS[:PROMPT], GREEDY, max_new_tokens=3, num_logprobs=2)) for b in pair]
    assert [t.token_id for t in runs[0]] == [t.token_id for t in runs[1]]
    for ours, wanted in zip(runs[1], runs[0], strict=True):
        assert ours.logprob == pytest.approx(wanted.logprob, abs=5e-3)
    ids = [*IDS[:PROMPT], *(t.token_id for t in runs[1][:2])]
    last = triton._step.logits.clone()  # of the token that ends a window
    stepped = cached(triton, len(ids))
    assert_close(last, reference.logits(ids)[-1], "moe_gemv_mxfp4")
    assert_close(triton.logits(ids)[-1], last, "moe_gemv_mxfp4")
    whole = cached(triton, len(ids))
    assert len(whole) == 1 + 5
    for ours, wanted in zip(stepped, whole, strict=True):
        assert_close(ours, wanted, "moe_gemv_mxfp4")


def cached(triton, length):
    """Copies of what both layers keep of a sequence: the second one has compressors."""
    step, found = triton._step, []
    for layer in step.cache.layers:
        found.append(layer.rows[: step.cache.slots])
        if layer.state is not None:
            found += [layer.rows[step.cache.slots :][: length // 4], layer.state]
            found += [layer.index_keys[: length // 4], layer.index_state]
    return [part.clone() for part in found]


def test_the_real_ratio(tmp_path, monkeypatch):
    """128 tokens a row: the first one ends in the prompt, a later token's step sees it."""
    # Slow in the interpreter, and the same in every layer of the other tests.
    for name in ("hyper_read", "hyper_write"):
        monkeypatch.setattr(deepseek_v4_prefill, name, getattr(hyper_twin, name))
    sizes = sizes_with(**SMALL | {"ratios": (128,), "hash_layers": 0, "heads": 2})
    write_tiny_deepseek_v4(tmp_path, sizes, shards=1)
    reference, triton = make_pair(tmp_path, context=160)
    ids = (IDS * 8)[:130]
    wanted = reference.logits(ids)
    assert_close(triton.logits(ids[:-1]), wanted[:-1], "model_fp32")
    triton._step.state.settings.copy_(sampling_settings(GREEDY))
    triton._step.state.position.fill_(129)
    triton._step.state.token.fill_(ids[-1])
    triton._step.step(filtered=False)
    assert_close(triton._step.logits, wanted[-1], "moe_gemv_mxfp4")


@pytest.mark.parametrize("name", ["sinks", "compressor.position_bias"])
def test_an_error_of_one_percent_in_one_weight_shows(pair, expected, name):
    _, triton = pair
    weight = triton._step.weights.layers[1].attention
    for part in name.split("."):
        weight = getattr(weight, part)
    weight *= 1.01
    try:
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close(triton.logits(IDS[:8]), expected[:8], "model_fp32")
    finally:
        weight /= 1.01


def test_joined_weights_keep_their_forms(tmp_path):
    """The published blocks line up: nothing is decoded, nothing is left."""
    write_tiny_deepseek_v4(tmp_path, LINED_UP)
    opened, weights = load(tmp_path)
    model = V4Weights.from_named(weights, opened.config)
    assert not weights  # all taken
    for layer, ratio in zip(model.layers, LINED_UP.ratios, strict=True):
        a = layer.attention
        assert [m.shape for m in a.inputs] == [(128 + 32, 128)]
        assert a.inputs[0].format is a.queries[0].format is a.out_a.format is FP8_BLOCK128_E8M0
        assert layer.routed.gate_up.format is MXFP4
        assert layer.always.gate_up.format is FP8_BLOCK128_E8M0
        wide = {0: [], 4: [4 * 32 + 4 * 8 + 32], 16: [2 * 32]}[ratio]
        assert [m.shape[0] for m in a.compressed] == wide
        rows = 4 * 32 + (32 * 8 if ratio == 4 else 0)
        assert [m.shape for m in a.queries] == [(rows, 128)]
    assert [layer.hash_ids is not None for layer in model.layers] == [True, True, False, False]


def test_zeros_to_compile_with_are_laid_out_like_the_weights(tmp_path, monkeypatch):
    write_tiny_deepseek_v4(tmp_path, LINED_UP)
    opened, weights = load(tmp_path)
    kinds = deepseek_v4.layer_kinds(opened.plan)
    made = []
    monkeypatch.setattr(deepseek_v4, "run_once", lambda *arguments: made.append(arguments))
    deepseek_v4.compile_kernels(opened.config, 64, CPU, kinds)
    step, real = made[0][0], V4Weights.from_named(weights, opened.config)
    assert step.config.compress_ratios == LINED_UP.ratios and step.config.num_hash_layers == 2
    for zeros, layer in zip(step.weights.layers, real.layers, strict=True):
        assert [form(w) for w in flat(zeros)] == [form(w) for w in flat(layer)]


@pytest.mark.parametrize("context", [60, 3000])
def test_the_cache_takes_what_is_planned(tmp_path, context):
    write_tiny_deepseek_v4(tmp_path, LINED_UP)
    config = plan_model(open_folder(tmp_path)).config
    cache = CompressedCache.allocate(config, context, torch.device("meta"), torch.bfloat16)
    planned = MemoryPlan(config, {}, context).cache_bytes
    assert sum(layer.nbytes for layer in cache.layers) == planned


def test_a_wrong_table_of_experts_is_refused(tmp_path):
    write_tiny_deepseek_v4(tmp_path, INDEXED)
    opened, weights = load(tmp_path)
    weights["layers.0.moe.hash_ids"][7, 1] = 4
    with pytest.raises(CheckpointError, match="found 4 for token 7"):
        deepseek_v4.assemble(opened.config, weights, 64, CPU, torch.float32)


def test_a_step_is_divided_into_the_bytes_of_its_plan(pair):
    _, triton = pair
    parts = GPU_FAMILIES["deepseek_v4"].parts
    plan = triton.plan.decode_bytes(40)
    read = parts.read_bytes(plan, triton.step, 40)
    assert sum(read.values()) == sum(plan.values())
    named = set(parts.components(triton.step).values())
    assert named | {"embedding", "norms"} >= {name for name, size in read.items() if size}
    assert named <= set(COMPONENTS)


def test_each_launch_has_one_component(pair, monkeypatch):
    check_components_of_launches(pair[1].step, monkeypatch)


@pytest.mark.parametrize("family", ["deepseek_v4", "deepseek_v32", "deepseek_v2"])
def test_nothing_waits_for_the_device(tmp_path, monkeypatch, family):
    """Steps and prompts on tensors without data: a look at a value from the host would raise."""
    launched = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **k: launched.append(self.fn))
    if family == "deepseek_v4":
        write_tiny_deepseek_v4(tmp_path, LINED_UP)
    else:
        write_tiny_deepseek(
            tmp_path, replace(DeepseekSizes(), family=family, heads=16), format="bf16"
        )
    opened = plan_model(open_folder(tmp_path))
    run = GPU_FAMILIES[family]
    run.compile(opened.config, 64, torch.device("meta"), run.formats(opened.plan), None)
    assert len(set(launched)) > 15
