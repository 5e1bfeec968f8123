"""GPT-OSS against transformers on the CPU, from tiny random checkpoints in the published format.

An implementation we did not write: a mistake in a formula, a name or a byte order shows here. The
tiny models are scaled so that routing, sinks, clamps and windows matter (a window one off moves
the logits by 90 %).
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

from loaders.checkpoint import open_folder
from moe_runtime.backends import create_backend
from moe_runtime.models.registry import plan_model
from moe_runtime.sampling import SamplingParams
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss
from tests.tolerances import assert_close

SHAPES = {
    "window 8, top 4 of 8, two shards": {"seed": 0},
    "window 5, top 1 of 4, one shard": {
        "seed": 1, "shards": 1, "d": 96, "f": 64, "heads": 6, "kv": 3, "hd": 32, "experts": 4,
        "topk": 1, "window": 5, "layers": 2,
    },
    "window 16, top 2 of 6, original layout": {
        "seed": 2, "d": 64, "f": 32, "experts": 6, "topk": 2, "window": 16, "layout": "original",
    },
}  # fmt: skip
GREEDY = SamplingParams(temperature=0.0)


def make_backend(folder, name):
    checkpoint = open_folder(folder)
    opened = plan_model(checkpoint)
    return create_backend(
        checkpoint, opened, device="cpu", backend=name, max_context=256, progress=False
    )


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path_factory):
    """transformers' model in fp32 and our reference backend on the same weights."""
    folder = tmp_path_factory.mktemp("tiny")
    arguments = dict(SHAPES[request.param])
    write_tiny_gpt_oss(folder / "ours", **arguments)
    arguments.pop("layout", None)
    write_tiny_gpt_oss(folder / "theirs", **arguments)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder / "theirs",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    )
    return theirs.float().eval(), make_backend(folder / "ours", "reference")


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


@pytest.mark.parametrize("length", [1, 7, 64])
def test_logits(pair, length):
    theirs, ours = pair
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(5)).tolist()
    assert_close(ours.logits(ids), their_logits(theirs, ids), "model_fp32")


def test_greedy_tokens(pair):
    theirs, ours = pair
    ids = [3, 17, 101, 4, 99, 200, 7, 7, 45]
    tokens = [t.token_id for t in ours.decode(ids, GREEDY, max_new_tokens=32)]
    expected = list(ids)
    for _ in range(32):
        expected.append(int(their_logits(theirs, expected)[-1].argmax()))
    assert tokens == expected[len(ids) :]


def test_prefill_equals_token_by_token(pair):
    _, ours = pair
    ids = list(range(40, 104))
    whole = ours.logits(ids)
    ours.model.reset()
    steps = [ours.model.head(ours.model.forward(torch.tensor([i])))[0] for i in ids]
    assert_close(torch.stack(steps), whole, "model_fp32")


def test_a_planted_error_of_one_percent_is_caught(pair):
    theirs, ours = pair
    ids = list(range(40, 104))
    weight = ours.model.weights["layers.1.moe.down"]
    weight *= 1.01
    try:
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close(ours.logits(ids), their_logits(theirs, ids), "model_fp32")
    finally:
        weight /= 1.01
