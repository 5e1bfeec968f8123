"""DeepSeek V2 and V3 in the triton backend against the reference, in Triton's interpreter.

The interpreter gets bf16 arithmetic wrong, so plain weights and the cache are fp32 here. Experts
are bf16, which kernels decode themselves, because its FP8 is slow; tests/kernels has stacks in FP8.
On a GPU tests/gpu runs models as they are published.
"""

from dataclasses import replace

import pytest
import torch

from loaders.checkpoint import open_folder
from loaders.errors import UnsupportedModelError
from moe_runtime.gpu import deepseek
from moe_runtime.gpu.deepseek_weights import ModelWeights
from moe_runtime.gpu.families import GPU_FAMILIES
from moe_runtime.gpu.latent_cache import LatentCache
from moe_runtime.models.registry import plan_model
from moe_runtime.plan import MemoryPlan
from moe_runtime.roofline import COMPONENTS
from moe_runtime.sampling import SamplingParams
from moe_runtime.support import SUPPORTED
from quant.formats import BF16, FP8_BLOCK128
from tests.moe_runtime.triton_pairs import (
    check_components_of_launches,
    flat,
    form,
    load,
    make_pair,
)
from tests.oracles.tiny_deepseek import V2_LITE, Sizes, write_tiny_deepseek
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs the interpreter; tests/gpu covers machines with a GPU"
)
CPU = torch.device("cpu")
CONTEXT = 64
IDS = [5, 39, 3, 32, 17, 8, 24, 1, 2, 37, 31]
SMALL = {"layers": 2, "d": 16, "heads": 2, "vocab": 40, "experts": 8, "experts_per_token": 2}
V3 = replace(Sizes(), **SMALL, w=16, f=16)
# As published: a head's 128 rows for keys are one row of blocks.
V3_BLOCKS = replace(V3, layers=1, dense_layers=0, nope=128, value=128, latent=160, query_rank=128)
LITE = replace(V2_LITE, **SMALL | {"layers": 1}, dense_layers=0, f=16)
# Widths that are multiples of 128 where experts' blocks must line up.
LINED_UP = replace(V3_BLOCKS, layers=2, dense_layers=1, d=128, w=208, f=128, query_rank=256)
# The indexer chooses 6 of the 12 tokens, and is scored by many heads, so that none tie.
V32 = replace(
    V3_BLOCKS, family="deepseek_v32", heads=16, nope=8, value=16, latent=48, query_rank=48,
    index_width=16, index_topk=6,
)  # fmt: skip
CASES = {
    "v3-fp8": (V3, "fp8"),
    "v32-fp8_e8m0": (V32, "fp8_e8m0"),
    "v2-bf16": (LITE, "bf16"),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    sizes, format = CASES[request.param]
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_deepseek(folder, sizes, format=format)
    return make_pair(folder)


def test_prefill(pair):
    reference, triton = pair
    expected = reference.logits(IDS)
    ours = triton.logits(IDS)
    assert_close(ours, expected, "moe_gemv_mxfp4")
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(ours * 1.01, expected, "moe_gemv_mxfp4")
    triton._prefill.chunk, full = 6, triton._prefill.chunk
    try:
        assert_close(triton.logits(IDS), expected, "moe_gemv_mxfp4")
    finally:
        triton._prefill.chunk = full


def test_steps(pair):
    reference, triton = pair
    greedy = SamplingParams(temperature=0.0)
    runs = [list(b.decode(IDS[:7], greedy, max_new_tokens=2, num_logprobs=2)) for b in pair]
    assert [t.token_id for t in runs[0]] == [t.token_id for t in runs[1]]
    for ours, expected in zip(runs[1], runs[0], strict=True):
        assert ours.logprob == pytest.approx(expected.logprob, abs=5e-3)
    # the last step's logits, all of them
    ids = [*IDS[:7], *(t.token_id for t in runs[1][:1])]
    assert_close(triton._step.logits, reference.logits(ids)[-1], "moe_gemv_mxfp4")


def test_an_error_of_one_percent_in_one_weight_shows(tmp_path):
    write_tiny_deepseek(tmp_path, V3, format="fp8")
    reference, triton = make_pair(tmp_path)
    expected = reference.logits(IDS)
    layer = triton._step.weights.layers[1]
    layer.attention.out.scales.mul_(1.01)
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(triton.logits(IDS), expected, "moe_gemv_mxfp4")


def test_joined_weights_keep_their_forms(tmp_path):
    """V3's published blocks line up: nothing is decoded."""
    sizes = LINED_UP
    write_tiny_deepseek(tmp_path, sizes, format="fp8")
    opened, weights = load(tmp_path)
    model = ModelWeights.from_named(weights, opened.config)
    for layer in model.layers:
        attention = layer.attention
        assert len(attention.inputs) == 1
        assert attention.inputs[0].shape == (256 + 160 + sizes.rotary, sizes.d)
        assert attention.inputs[0].scales.shape == (4, 1)
        for matrix in (*attention.inputs, attention.projection, layer.always.gate_up):
            assert matrix.format is FP8_BLOCK128
    # a width of 208 is filled to 256, so that up's blocks begin with its rows
    assert model.layers[0].always.gate_up.shape == (1, 512, sizes.d)
    assert model.layers[0].always.down.shape == (1, sizes.d, 256)
    assert not weights  # all taken


def test_shared_experts_are_divided(tmp_path):
    write_tiny_deepseek(tmp_path, LITE, format="bf16")
    opened, weights = load(tmp_path)
    wanted = [weights[f"layers.0.moe.shared_{part}"] for part in ("gate", "up", "down")]
    shared = ModelWeights.from_named(weights, opened.config).layers[0].always
    f = LITE.f
    assert shared.gate_up.shape == (2, 2 * f, LITE.d) and shared.gate_up.format is BF16
    assert torch.equal(shared.gate_up.values[1, :f], wanted[0][f:])
    assert torch.equal(shared.gate_up.values[1, f:], wanted[1][f:])
    assert torch.equal(shared.down.values[1], wanted[2][:, f:])


def test_zeros_to_compile_with_are_laid_out_like_the_weights(tmp_path, monkeypatch):
    write_tiny_deepseek(tmp_path, replace(LINED_UP, layers=4, dense_layers=2), format="fp8")
    opened, weights = load(tmp_path)
    kinds = deepseek.layer_kinds(opened.plan)
    assert len(kinds) == 3  # outside, a dense layer, one with experts
    made = []
    monkeypatch.setattr(deepseek, "run_once", lambda *arguments: made.append(arguments))
    deepseek.compile_kernels(opened.config, CONTEXT, CPU, kinds)
    zeros, real = made[0][0].weights, ModelWeights.from_named(weights, opened.config)
    assert [form(w) for w in flat(zeros.layers[0])] == [form(w) for w in flat(real.layers[0])]
    assert [form(w) for w in flat(zeros.layers[1])] == [form(w) for w in flat(real.layers[2])]


@pytest.mark.parametrize("sizes", [V3, V32], ids=lambda sizes: sizes.family)
def test_the_cache_takes_what_is_planned(tmp_path, sizes):
    write_tiny_deepseek(tmp_path, sizes, format="bf16")
    config = plan_model(open_folder(tmp_path)).config
    cache = LatentCache.allocate(config, 3000, torch.device("meta"), torch.bfloat16)
    assert (
        sum(part.nbytes for part in cache.latents + cache.index_keys)
        == MemoryPlan(config, {}, 3000).cache_bytes
    )


def test_formats_without_kernels_are_named(tmp_path):
    write_tiny_deepseek(tmp_path, LITE, format="fp8")  # experts of 16 rows in blocks of 128
    with pytest.raises(UnsupportedModelError, match="there are no GPU kernels for it in") as no:
        deepseek.layer_kinds(plan_model(open_folder(tmp_path)).plan)
    assert "moe.gate_up" in no.value.message and "reference" in no.value.hint


def test_families_with_kernels_are_those_of_the_table():
    rows = {row.family for row in SUPPORTED if row.backend == "triton"}
    assert rows == set(GPU_FAMILIES)


def test_a_step_is_divided_into_the_bytes_of_its_plan(pair):
    _, triton = pair
    parts = GPU_FAMILIES[triton.step.config.family].parts
    plan = triton.plan.decode_bytes(40)
    read = parts.read_bytes(plan, triton.step, 40)
    assert sum(read.values()) == sum(plan.values())
    named = set(parts.components(triton.step).values())
    assert named | {"embedding", "norms"} >= {name for name, size in read.items() if size}
    assert named <= set(COMPONENTS)


def test_each_launch_has_one_component(pair, monkeypatch):
    check_components_of_launches(pair[1].step, monkeypatch)
