"""DeepSeek V2 to V4 on a GPU: tiny models as they are published, against the reference backend.

Heads, latents and blocks have the published widths, so that the kernels are those of the published
models. Random weights magnify the rounding of bf16, so there is a comparison in fp32 too.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import triton

from loaders.checkpoint import open_folder
from loaders.weights import load_weights
from moe_runtime import MoeModel
from moe_runtime.models.registry import plan_model
from moe_runtime.plan import MemoryPlan, weights_by_component
from moe_runtime.sampling import SamplingParams
from moe_runtime.triton_backend import TritonBackend
from tests.moe_runtime.triton_pairs import widened
from tests.oracles.tiny_deepseek import V2_LITE, Sizes, write_tiny_deepseek
from tests.oracles.tiny_deepseek_v4 import sizes_with, write_tiny_deepseek_v4
from tests.tolerances import TIE_MARGIN, assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PUBLISHED = {"heads": 16, "latent": 512, "rotary": 64, "nope": 128, "value": 128, "vocab": 512}
V3 = replace(Sizes(), **PUBLISHED, d=256, query_rank=128, f=128, w=400)
V32 = replace(V3, family="deepseek_v32", index_width=128, index_topk=128)
LITE = replace(V2_LITE, **PUBLISHED, d=256, w=400)
# The indexer may choose 16 of the 50 rows of 200 tokens; one row of 128.
V4 = sizes_with(
    ratios=(0, 4, 128, 4), d=256, heads=16, width=512, rotary=64, query_rank=128, groups=4,
    output_rank=128, window=128, index_heads=64, index_width=128, top_k=16, experts=16,
    experts_per_token=6, f=128, hash_layers=1, vocab=512,
)  # fmt: skip
# In bf16 a token takes all experts and sees all rows: rounding sends it to no others.
# What is chosen is compared in fp32.
ALL = {"experts": 8, "experts_per_token": 8, "groups": 2, "limited_groups": 2}
V32_ALL = replace(V32, **ALL, index_topk=256)
CASES = {
    "v3-fp8": partial(write_tiny_deepseek, sizes=replace(V3, **ALL), format="fp8"),
    "v2-bf16": partial(write_tiny_deepseek, sizes=LITE, format="bf16"),
    "v32-fp8_e8m0": partial(write_tiny_deepseek, sizes=V32_ALL, format="fp8_e8m0"),
    "v4-fp4": partial(write_tiny_deepseek_v4, sizes=V4),
    "v4-fp8": partial(write_tiny_deepseek_v4, sizes=V4, expert_dtype="fp8"),
}
# Latents and rows narrow enough for tiles in fp32.
IN_FP32 = {
    "v32": partial(
        write_tiny_deepseek, sizes=replace(V32, latent=128, layers=2), format="fp8_e8m0"
    ),
    "v4": partial(write_tiny_deepseek_v4, sizes=replace(V4, width=128)),
}
IDS = torch.randint(0, 512, (200,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module", params=CASES)
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    CASES[request.param](folder)
    with (
        MoeModel.from_pretrained(folder, device="cpu", backend="reference") as reference,
        MoeModel.from_pretrained(folder, device="cuda", backend="triton") as ours,
    ):
        yield folder, reference, ours


def test_prefill(models):
    _, reference, ours = models
    assert_close(ours.logits(IDS), reference.logits(IDS), "model_bf16_random")


def test_steps_against_teacher_forced_logits(models):
    """Tokens are the reference's best up to bf16, and their probabilities agree."""
    _, reference, ours = models
    out = ours.generate(IDS, max_new_tokens=60, temperature=0.0, ignore_eos=True, logprobs=1)
    logits = reference.logits(IDS + out.token_ids)[len(IDS) - 1 : -1]
    taken = logits.gather(-1, torch.tensor(out.token_ids)[:, None])[:, 0]
    # Random weights: a tie of the reference's within what bf16 moves.
    assert (logits.max(-1).values - taken).max() <= 5 * TIE_MARGIN
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(out.token_ids)[:, None])[:, 0]
    actual = torch.tensor([entry.logprob for entry in out.logprobs])
    assert_close(actual.exp(), expected.exp(), "model_bf16_random")


@pytest.mark.parametrize("case", IN_FP32)
def test_in_fp32(tmp_path, case):
    """Plain weights but those of experts, cache and activations in fp32: an error of 1 % shows."""
    IN_FP32[case](tmp_path)
    checkpoint = open_folder(tmp_path)
    opened = plan_model(checkpoint)
    config = opened.config
    weights = load_weights(
        checkpoint, opened.table, config.dims, config.num_layers, device="cuda", progress=False
    )
    for name, weight in weights.items():
        weights[name] = widened(name, weight)
    plan = MemoryPlan(config, weights_by_component(opened.plan.nbytes), 256)
    backend = TritonBackend(config, weights, plan, torch.device("cuda"), cache_dtype=torch.float32)
    ids = IDS  # more than the indexer lets a token see
    greedy = SamplingParams(temperature=0.0)
    tokens = [t.token_id for t in backend.decode(ids, greedy, max_new_tokens=5)]
    torch.cuda.synchronize()
    last = backend._step.logits.clone()
    with MoeModel.from_pretrained(tmp_path, device="cpu", backend="reference") as reference:
        expected = reference.logits(ids + tokens)
    assert_close(last, expected[len(ids) + 3], "moe_gemv_mxfp4")
    assert_close(backend.logits(ids), expected[: len(ids)], "moe_gemm_mxfp4_bf16")


def test_the_same_seed_gives_the_same_tokens(models):
    _, _, ours = models
    runs = [
        ours.generate(IDS, max_new_tokens=30, temperature=1.0, seed=7, top_p=p).token_ids
        for p in (1.0, 1.0, 0.9, 0.9)
    ]
    assert runs[0] == runs[1] and runs[2] == runs[3] and runs[0] != runs[2]


def test_nothing_compiles_after_load(models, monkeypatch):
    _, _, ours = models
    missing = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda **found: missing.append(found["repr"])
    )
    for length in (1, 5, 33, 130, 700):
        ours.generate([5] * length, max_new_tokens=3, temperature=0.0, ignore_eos=True)
    ours.generate(IDS, max_new_tokens=3, top_k=5, top_p=0.9, min_p=0.01, logprobs=3)
    ours.logits([5] * 40)
    assert missing == []
