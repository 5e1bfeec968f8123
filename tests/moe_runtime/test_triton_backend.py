"""The Triton backend's wiring against the reference, in Triton's interpreter with fp32 weights.

The interpreter gets bf16 arithmetic wrong, so weights and cache are fp32 here; the experts stay
MXFP4. On a GPU tests/gpu does the same in bf16.
"""

import pytest
import torch

from loaders.checkpoint import open_folder
from loaders.weights import load_weights
from moe_runtime.models.gpt_oss import GptOssReference
from moe_runtime.models.registry import plan_model
from moe_runtime.plan import MemoryPlan, weights_by_component
from moe_runtime.reference_backend import ReferenceBackend
from moe_runtime.sampling import SamplingParams
from moe_runtime.triton_backend import TritonBackend
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs the interpreter; tests/gpu covers machines with a GPU"
)
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_gpt_oss(
        folder, layers=2, d=32, f=32, heads=2, kv=1, hd=16, window=6,
        vocab=40, experts=5, topk=2,
    )  # fmt: skip
    checkpoint = open_folder(folder)
    opened = plan_model(checkpoint)
    config = opened.config
    weights = load_weights(
        checkpoint, opened.table, config.dims, config.num_layers, device="cpu", progress=False
    )
    plan = MemoryPlan(config, weights_by_component(opened.plan.nbytes), 64)
    wide = {n: w.float() if isinstance(w, torch.Tensor) else w for n, w in weights.items()}
    reference = ReferenceBackend(GptOssReference(config, weights, CPU), plan)
    return reference, TritonBackend(config, wide, plan, CPU, cache_dtype=torch.float32)


def test_logits(pair):
    reference, triton = pair
    ids = [5, 39, 3, 32, 17, 8, 24, 1, 2, 37, 31]
    assert_close(triton.logits(ids), reference.logits(ids), "moe_gemv_mxfp4")


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SamplingParams(top_p=0.8, top_k=20, temperature=0.9, seed=6)],
    ids=["greedy", "cut"],
)
def test_decode_draws_the_same_tokens(pair, sampling):
    prompt = [5, 39, 3, 32, 17, 8, 24]
    runs = [
        list(backend.decode(prompt, sampling, max_new_tokens=3, num_logprobs=2)) for backend in pair
    ]
    assert [t.token_id for t in runs[0]] == [t.token_id for t in runs[1]]
    for ours, expected in zip(runs[1], runs[0], strict=True):
        assert ours.logprob == pytest.approx(expected.logprob, abs=5e-3)
        assert [i for i, _ in ours.top_logprobs] == [i for i, _ in expected.top_logprobs]


def test_decoding_goes_on_behind_the_prompt_and_not_behind_its_padding(pair):
    """17 tokens are padded to 32: more than a window of rows that decoding must not see."""
    prompt = [(7 * i + 3) % 40 for i in range(17)]
    ours, expected = (list(b.decode(prompt, GREEDY, max_new_tokens=4)) for b in pair)
    assert [t.token_id for t in ours] == [t.token_id for t in expected]
    for one, other in zip(ours, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=5e-3)


def test_a_closed_iterator_leaves_the_backend_usable(pair):
    _, triton = pair
    first = next(iter(triton.decode([1, 2, 3], GREEDY, max_new_tokens=2)))
    again = next(iter(triton.decode([1, 2, 3], GREEDY, max_new_tokens=2)))
    assert first == again


def test_prefill_in_chunks_equals_prefill_at_once(pair):
    _, triton = pair
    ids = list(range(19, 40))
    whole = triton.logits(ids)
    triton._prefill.chunk, full = 6, triton._prefill.chunk
    try:
        assert_close(triton.logits(ids), whole, "moe_gemv_mxfp4")
    finally:
        triton._prefill.chunk = full
