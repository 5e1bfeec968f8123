"""The Triton backend against the reference backend, on a machine with a GPU.

Greedy tokens must be equal except where the reference's own two best logits are closer than the
tolerance of bf16 arithmetic; after such a tie the texts may differ, so the comparison is teacher
forced on the reference's tokens.
"""

from dataclasses import replace

import pytest
import torch
import triton

from moe_runtime import MoeModel
from moe_runtime.gpu.families import GPU_FAMILIES
from moe_runtime.plan import MoreBytes
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss
from tests.tolerances import TIE_MARGIN, assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PROMPT = "It was a dark night, and the old man"


@pytest.fixture(scope="module")
def demo():
    with (
        MoeModel.from_pretrained("demo", device="cpu", backend="reference") as reference,
        MoeModel.from_pretrained("demo", device="cuda", backend="triton") as triton,
    ):
        yield reference, triton


def check_greedy(reference_logits, tokens, margin):
    """Every token is the reference's best, or its logit is within margin of it."""
    best = reference_logits.max(-1).values
    taken = reference_logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    worst = (best - taken).max()
    assert worst <= margin, f"a token {worst:.4f} below the reference's best, margin {margin}"


def test_demo_logits(demo):
    reference, triton = demo
    ids = reference.tokenizer.encode(PROMPT * 40)
    assert_close(triton.logits(ids), reference.logits(ids), "model_bf16")


def test_demo_greedy_200_tokens(demo):
    reference, triton = demo
    ids = reference.tokenizer.encode(PROMPT)
    out = triton.generate(ids, max_new_tokens=200, temperature=0.0, ignore_eos=True)
    logits = reference.logits(ids + out.token_ids)[len(ids) - 1 : -1]
    check_greedy(logits, out.token_ids, TIE_MARGIN)
    expected = reference.generate(ids, max_new_tokens=200, temperature=0.0, ignore_eos=True)
    differing = [
        i for i, (a, b) in enumerate(zip(out.token_ids, expected.token_ids, strict=True)) if a != b
    ]
    if differing:  # the first difference must be a tie of the reference's own
        top = logits[differing[0]].topk(2).values
        assert top[0] - top[1] <= TIE_MARGIN


def test_demo_without_room_for_tiles(demo, monkeypatch, capsys):
    """The chain of kernels, with nothing compiled late, and it says so once."""
    reference, _ = demo
    family = replace(GPU_FAMILIES["gpt_oss"], more_bytes=lambda *_: MoreBytes(tiles=1 << 50))
    monkeypatch.setitem(GPU_FAMILIES, "gpt_oss", family)
    ids = reference.tokenizer.encode(PROMPT)
    with MoeModel.from_pretrained("demo", device="cuda", backend="triton") as model:
        assert capsys.readouterr().err.count("chain of kernels") == 1
        compiled = []
        monkeypatch.setattr(
            triton.knobs.runtime, "jit_cache_hook", lambda **found: compiled.append(found["repr"])
        )
        assert_close(model.logits(ids), reference.logits(ids), "model_bf16")
        out = model.generate(ids, max_new_tokens=50, temperature=0.0, ignore_eos=True)
        assert compiled == []
    logits = reference.logits(ids + out.token_ids)[len(ids) - 1 : -1]
    check_greedy(logits, out.token_ids, TIE_MARGIN)


def test_step_by_step_equals_prefill(demo):
    reference, triton = demo
    ids = reference.tokenizer.encode(PROMPT)
    out = triton.generate(ids, max_new_tokens=300, temperature=0.0, ignore_eos=True, logprobs=1)
    logprobs = reference.logits(ids + out.token_ids)[len(ids) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(out.token_ids)[:, None])[:, 0]
    actual = torch.tensor([entry.logprob for entry in out.logprobs])
    assert_close(actual.exp(), expected.exp(), "model_bf16")


def test_the_same_seed_gives_the_same_tokens(demo):
    _, triton = demo
    runs = [
        triton.generate(PROMPT, max_new_tokens=120, temperature=1.0, seed=7, top_p=p).token_ids
        for p in (1.0, 1.0, 0.9, 0.9)
    ]
    assert runs[0] == runs[1] and runs[2] == runs[3] and runs[0] != runs[2]


def test_closing_a_stream_leaves_the_model_usable(demo):
    _, triton = demo
    expected = triton.generate(PROMPT, max_new_tokens=20, temperature=0.0).token_ids
    stream = triton.stream(PROMPT, max_new_tokens=100, temperature=0.0)
    next(stream)
    stream.close()
    assert triton.generate(PROMPT, max_new_tokens=20, temperature=0.0).token_ids == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_random_tiny_models(tmp_path, seed):
    write_tiny_gpt_oss(tmp_path, seed=seed, d=96, f=160, heads=8, kv=2, hd=64, window=16)
    ids = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(seed)).tolist()
    with (
        MoeModel.from_pretrained(tmp_path, device="cpu", backend="reference") as reference,
        MoeModel.from_pretrained(tmp_path, device="cuda", backend="triton") as triton,
    ):
        assert_close(triton.logits(ids), reference.logits(ids), "model_bf16_random")


def test_nothing_compiles_after_load(demo, monkeypatch):
    """Prompts of any length and every sampling mode use kernels compiled while loading."""
    _, triton_model = demo
    missing = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda **found: missing.append(found["repr"])
    )
    for length in (1, 5, 33, 97, 130, 700, 3000):
        triton_model.generate([5] * length, max_new_tokens=3, temperature=0.0, ignore_eos=True)
    triton_model.generate(PROMPT, max_new_tokens=3, top_k=5, top_p=0.9, min_p=0.01, logprobs=3)
    triton_model.logits([5] * 40)
    assert missing == []


def test_a_captured_prompt_leaves_the_same_bits(demo):
    """Of each padded length the first prompt is launched, the second captured, others replayed."""
    _, triton_model = demo
    for length in (3, 20, 100, 300):
        ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length))
        found = [triton_model.logits(ids.tolist()) for _ in range(4)]
        assert all(torch.equal(found[0], other) for other in found[1:])
        other = triton_model.logits(ids.flip(0).tolist())
        assert not torch.equal(other, found[0])
        assert torch.equal(triton_model.logits(ids.flip(0).tolist()), other)
    captured = triton_model.open_backend._prefill._captured
    assert {4, 32, 128, 384} <= set(captured)
