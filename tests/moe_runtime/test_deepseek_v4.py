"""DeepSeek V4 against transformers on the CPU, from tiny random checkpoints as published.

An implementation we did not write. 300 tokens pass the window many times, fill both kinds of
compressed rows, and leave the indexer more rows than it may choose. The transformers model reads
the decoded twin of each checkpoint, whose encoders are not ours either.
"""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from loaders.checkpoint import open_folder
from moe_runtime import MoeModel
from moe_runtime.backends import create_backend
from moe_runtime.models.registry import plan_model
from moe_runtime.sampling import SamplingParams
from tests.oracles.tiny_deepseek_v4 import sizes_with, write_tiny_deepseek_v4
from tests.tolerances import assert_close

LENGTH = 300
SMALL = "ratios 4 and 16, FP4 experts, two shards"
REAL = "ratios 4 and 128, FP8 experts, widths that are no multiple of 128"
CASES = {
    SMALL: {"seed": 0},
    REAL: {
        "seed": 1, "shards": 1, "expert_dtype": "fp8",
        "sizes": sizes_with(
            ratios=(128, 0, 4, 128, 4), d=160, f=96, heads=6, groups=3, width=48, rotary=24,
            query_rank=40, output_rank=16, index_heads=40, index_width=32, top_k=20, experts=6,
            experts_per_token=2, hash_layers=1, window=24, vocab=200,
        ),
    },
}  # fmt: skip
GREEDY = SamplingParams(temperature=0.0)


def make_backend(folder):
    checkpoint = open_folder(folder)
    opened = plan_model(checkpoint)
    return create_backend(
        checkpoint, opened, device="cpu", backend="reference", max_context=512, progress=False
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Operations on tiny tensors are shorter than the wake-up of a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path_factory):
    """transformers' model in fp32 and our reference backend on the same weights."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_deepseek_v4(folder / "ours", twin=folder / "twin", **CASES[request.param])
    theirs = AutoModelForCausalLM.from_pretrained(
        folder / "twin",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return theirs.float().eval(), make_backend(folder / "ours")


@pytest.fixture(scope="module")
def whole(pair):
    """transformers' logits of all LENGTH tokens."""
    return their_logits(pair[0], some_ids())


def some_ids(length=LENGTH):
    return torch.randint(0, 200, (length,), generator=torch.Generator().manual_seed(5)).tolist()


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def test_logits(pair, whole):
    assert_close(pair[1].logits(some_ids()), whole, "model_fp32")


@pytest.mark.parametrize("length", [1, 7])
def test_logits_of_short_prompts(pair, length):
    theirs, ours = pair
    ids = some_ids(length)
    assert_close(ours.logits(ids), their_logits(theirs, ids), "model_fp32")


def test_greedy_tokens(pair):
    theirs, ours = pair
    ids = some_ids(250)
    tokens = [t.token_id for t in ours.decode(ids, GREEDY, max_new_tokens=32)]
    assert tokens == their_greedy(theirs, ids, 32)


def their_greedy(model, ids, count):
    cache, tokens, fed = DynamicCache(config=model.config), [], ids
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([fed]), past_key_values=cache, use_cache=True).logits
            tokens.append(int(logits[0, -1].argmax()))
            fed = tokens[-1:]
    return tokens


def test_prefill_equals_token_by_token(pair, whole):
    """Windows, overlaps and finished rows are kept from call to call, whatever the calls' sizes."""
    _, ours = pair
    ids = torch.tensor(some_ids())
    ours.model.reset()
    parts = [*ids[:150].split(61), *ids[150:].split(1)]
    pieces = [ours.model.head(ours.model.forward(part)) for part in parts]
    assert_close(torch.cat(pieces), whole, "model_fp32")


@pytest.mark.parametrize(
    "name", ["attention.out_a", "attention.compressor.gate", "moe.down", "moe.shared_up",
             "moe.router", "hyper.moe_base", "attention.row_norm"],
)  # fmt: skip
def test_a_planted_error_of_one_percent_is_caught(pair, whole, name):
    _, ours = pair
    ids = some_ids()
    weight = ours.model.weights[f"layers.2.{name}"]
    weight *= 1.01
    try:
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close(ours.logits(ids), whole, "model_fp32")
    finally:
        weight /= 1.01


def test_every_row_of_the_index_and_the_window_matters(pair, whole):
    """One row less of the top-k, one token more of the window: the logits move by percents."""
    _, ours = pair
    ids = some_ids()
    for field, change in (("index_top_k", -1), ("sliding_window", 1)):
        kept = ours.model.config
        ours.model.config = replace(kept, **{field: getattr(kept, field) + change})
        moved = ours.logits(ids)
        ours.model.config = kept
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close(moved, whole, "bf16")


@pytest.mark.parametrize("original_format", [True, False], ids=["default", "module names"])
def test_what_transformers_saves_is_read(pair, tmp_path, original_format):
    """save_pretrained: other tensor names, other words in config.json, no quantization."""
    theirs, _ = pair
    theirs.save_pretrained(tmp_path, save_original_format=original_format)
    assert "compress_ratios" not in json.loads((tmp_path / "config.json").read_text())
    ids = some_ids(170)
    assert_close(make_backend(tmp_path).logits(ids), their_logits(theirs, ids), "model_fp32")


def test_mtp_is_skipped_and_counted(tmp_path):
    tensors = write_tiny_deepseek_v4(tmp_path)
    opened = plan_model(open_folder(tmp_path))
    codes = {n for n in tensors if n.startswith("mtp.") and not n.endswith(".scale")}
    assert set(opened.plan.skipped) == codes
    assert len(codes) > 30
    assert set(opened.plan.skipped.values()) == {"multi-token prediction is not used"}


def test_bytes_by_component(tmp_path):
    """Stored bytes of everything but MTP, each under its component; FP4 is half a byte."""
    tensors = write_tiny_deepseek_v4(tmp_path)
    with MoeModel.from_pretrained(tmp_path, max_context=64, progress=False) as model:
        plan = model.plan
    used = {name: t.nbytes for name, t in tensors.items() if not name.startswith("mtp.")}
    assert plan.total_weight_bytes == sum(used.values())
    for component, part in (("indexer", ".indexer."), ("hyper-connections", "hc_")):
        assert plan.weight_bytes[component] == sum(n for name, n in used.items() if part in name)
    compressors = sum(n for name, n in used.items() if "attn.compressor." in name)
    assert plan.weight_bytes["compressor"] == compressors
