"""DeepSeek V2, V3, V3.2 and Kimi-K2 against transformers on the CPU, from tiny checkpoints.

Ours reads the published format (FP8 blocks with their scales, an MTP layer beside the others);
transformers reads the same numbers in fp32. 300 tokens pass YaRN's original context, and V3.2's
indexer chooses 48 of them. The eps of Kimi-K2 tells the norms that heed it from those that do not.
"""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from loaders.checkpoint import open_folder
from moe_runtime.backends import create_backend
from moe_runtime.models.registry import plan_model
from moe_runtime.sampling import SamplingParams
from tests.oracles.tiny_deepseek import V2_LITE, Sizes, write_tiny_deepseek
from tests.tolerances import assert_close

KIMI = Sizes(groups=1, limited_groups=1, routed_scale=2.827)
KIMI_ROPE = {
    "type": "yarn", "factor": 8, "beta_fast": 1, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 1,
    "original_max_position_embeddings": 128,
}  # fmt: skip
V2_GROUPS = replace(V2_LITE, groups=4, limited_groups=2, query_rank=48, routed_scale=4.0)
CASES = {
    "v2-lite-bf16": (V2_LITE, {"format": "bf16"}),
    "v2-groups-fp8": (V2_GROUPS, {"format": "fp8"}),
    "v3-fp8": (Sizes(), {"format": "fp8"}),
    "v3-e8m0-odd-experts": (Sizes(f=96), {"format": "fp8_e8m0", "shards": 1}),
    "kimi-fp8": (KIMI, {"rope_scaling": KIMI_ROPE, "rope_theta": 50000, "rms_norm_eps": 0.01}),
    "v3-bf16-no-query-rank": (replace(KIMI, query_rank=None), {"format": "bf16"}),  # Moonlight
    "v32-fp8": (Sizes("deepseek_v32"), {"format": "fp8"}),
}
GREEDY = SamplingParams(temperature=0.0)


def make_backend(folder):
    checkpoint = open_folder(folder)
    return create_backend(checkpoint, plan_model(checkpoint), device="cpu", progress=False)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """transformers' model in fp32 and our reference backend on the same numbers."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes, options = CASES[request.param]
    write_tiny_deepseek(folder / "ours", sizes, twin=folder / "theirs", **options)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder / "theirs",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return theirs.float().eval(), make_backend(folder / "ours")


@pytest.fixture(autouse=True)
def one_thread():
    """The models are small: a second thread costs more than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def token_ids(count, seed=5):
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


@pytest.mark.parametrize("length", [1, 7, 300])
def test_logits(pair, length):
    theirs, ours = pair
    ids = token_ids(length)
    assert_close(ours.logits(ids), their_logits(theirs, ids), "model_fp32")


def test_greedy_tokens(pair):
    theirs, ours = pair
    ids = token_ids(70, seed=6)
    tokens = [t.token_id for t in ours.decode(ids, GREEDY, max_new_tokens=32)]
    expected = their_logits(theirs, ids + tokens).argmax(-1).tolist()
    assert tokens == expected[len(ids) - 1 : -1]


def test_prefill_equals_token_by_token(pair):
    _, ours = pair
    ids = token_ids(120, seed=7)
    whole = ours.logits(ids)
    ours.model.reset()
    steps = [ours.model.head(ours.model.forward(torch.tensor([i])))[0] for i in ids]
    assert_close(torch.stack(steps), whole, "model_fp32")


def test_a_planted_error_of_one_percent_is_caught(pair):
    theirs, ours = pair
    ids = token_ids(40)
    for name in ("layers.1.moe.down", "layers.1.attention.out", "layers.0.mlp.up"):
        weight = ours.model.weights[name]
        weight *= 1.01
        try:
            with pytest.raises(AssertionError, match="relative RMS"):
                assert_close(ours.logits(ids), their_logits(theirs, ids), "model_fp32")
        finally:
            weight /= 1.01


def test_what_transformers_saves_loads_too(pair, tmp_path):
    """The same names, with rope_parameters in place of rope_scaling."""
    theirs, ours = pair
    theirs.save_pretrained(tmp_path)
    ids = token_ids(20)
    assert_close(make_backend(tmp_path).logits(ids), ours.logits(ids), "model_fp32")


def test_the_indexer_matters_once_there_are_more_tokens_than_it_chooses(tmp_path):
    write_tiny_deepseek(tmp_path / "few", Sizes("deepseek_v32"))
    write_tiny_deepseek(tmp_path / "all", Sizes("deepseek_v32", index_topk=300))
    few, everything = make_backend(tmp_path / "few"), make_backend(tmp_path / "all")
    ids = token_ids(120)
    sparse, dense = few.logits(ids), everything.logits(ids)
    assert_close(sparse[:48], dense[:48], "model_fp32")
    assert (sparse - dense)[60:].norm() > 0.3 * dense[60:].norm()
