"""DeepSeek's router against its twin."""

from contextlib import nullcontext

import pytest
import torch

from kernels import grouped_router as kernel
from kernels.packed_vector import packed_vectors, unpack_vectors
from kernels.reference import grouped_router as twin
from moe_runtime.layers.routing import choose_experts, limit_groups
from quant.formats import FP8_BLOCK128, MXFP4
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def on_device(device):
    """Tensors are made where kernels run: on a GPU, or in the interpreter."""
    with torch.device(device) if device.type == "cuda" else nullcontext():
        yield


_WORDS = ("scores", "num_groups", "num_limited", "normalized", "scale")
KINDS = {
    "v3": dict(zip(_WORDS, ("sigmoid", 4, 2, True, 2.5), strict=True)),
    "k2": dict(zip(_WORDS, ("sigmoid", 1, 1, True, 2.8), strict=True)),
    "v2": dict(zip(_WORDS, ("softmax", 5, 2, False, 16.0), strict=True)),
    "lite": dict(zip(_WORDS, ("softmax", 1, 1, False, 1.0), strict=True)),
    "v4": dict(zip(_WORDS, ("sqrtsoftplus", 1, 1, True, 1.5), strict=True)),
}


def route(
    module, kind, format=FP8_BLOCK128, *, seed=0, ties=False, bias=True, experts=20, width=160,
    table=None, size=1.0, also=None,
):  # fmt: skip
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    x = torch.randn(width, generator=g)
    norm = 1 + 0.1 * torch.randn(width, generator=g)
    router = torch.randn(experts, width, generator=g) * 0.2 * size
    if ties:
        router[1:] = router[0]
    biases = 0.3 * torch.randn(experts, generator=g) - 1.5 if bias else None
    logits, ticket = torch.zeros(experts), torch.zeros(1, dtype=torch.int32)
    ids, weights = torch.full((4,), -1, dtype=torch.int32), torch.zeros(4)
    packed = packed_vectors(format, 1, width, torch.get_default_device())
    module.grouped_router(
        x, norm, router, biases, eps=1e-6, **KINDS[kind], logits=logits, ticket=ticket,
        expert_ids=ids, expert_weights=weights, packed=packed, also=also, table=table,
        token=torch.tensor([5], dtype=torch.int32),
    )  # fmt: skip
    assert int(ticket) == 0
    return ids, weights, logits, unpack_vectors(packed)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_twin(kind, seed):
    bias = kind in ("v3", "k2", "v4")
    ours, expected = (route(m, kind, seed=seed, bias=bias) for m in (kernel, twin))
    assert ours[0].tolist() == expected[0].tolist()
    assert_close(ours[1], expected[1], "router")
    assert_close(ours[2], expected[2], "router")
    assert_close(ours[3], expected[3], "packed_fp16")


def test_equal_scores_take_the_lower_id():
    assert route(kernel, "v2", ties=True, bias=False)[0].tolist() == [0, 1, 2, 3]


def test_the_vector_in_digits():
    ours, expected = (route(m, "v3", MXFP4)[3] for m in (kernel, twin))
    assert_close(ours, expected, "packed_fp16")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_experts_by_token_id(dtype):
    """As the table has them, one of them twice: the weights of both count in the sum."""
    table = torch.randint(0, 20, (9, 4)).to(dtype)
    table[5] = torch.tensor([7, 19, 7, 0])
    ours, expected = (route(m, "v4", bias=False, table=table) for m in (kernel, twin))
    assert ours[0].tolist() == expected[0].tolist() == [7, 19, 7, 0]
    assert_close(ours[1], expected[1], "router")


def test_scores_far_from_zero():
    """Roots of softplus where exp(x) or 1 + exp(x) leave fp32's range."""
    ours, expected = (route(m, "v4", bias=False, size=40.0) for m in (kernel, twin))
    assert expected[2].min() < -60 and expected[2].max() > 60
    table = expected[2].sort().indices[:4][None].expand(9, -1).contiguous()  # smallest logits
    found = [route(m, "v4", bias=False, size=5.0, table=table) for m in (kernel, twin)]
    for actual, wanted in ((ours, expected), found):
        assert_close(actual[1], wanted[1], "router")


def test_the_vector_in_both_forms():
    found = []
    for module in (kernel, twin):
        also = packed_vectors(FP8_BLOCK128, 1, 160, torch.get_default_device())
        digits = route(module, "v4", MXFP4, also=also)[3]
        found.append((digits, unpack_vectors(also)))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, "packed_fp16")


def test_norm_and_pack():
    g = torch.Generator(torch.get_default_device()).manual_seed(1)
    x, norm = torch.randn(96, generator=g), torch.randn(96, generator=g)
    found = []
    for module in (kernel, twin):
        packed = packed_vectors(FP8_BLOCK128, 1, 96, torch.get_default_device())
        found.append(unpack_vectors(module.norm_and_pack(x, norm, packed, eps=1e-6)))
    assert_close(*found, "packed_fp16")


def test_the_choice_for_many_tokens_is_that_of_the_reference_model():
    logits = torch.randn(
        40, 20, generator=torch.Generator(torch.get_default_device()).manual_seed(3)
    )
    bias = torch.randn(20, generator=torch.Generator(torch.get_default_device()).manual_seed(4)) - 2
    ids, weights = twin.choose(logits, bias, **KINDS["v3"], experts_per_token=4)
    scores = logits.sigmoid()
    limited = limit_groups(scores + bias, num_groups=4, num_limited=2, best_of_group=2)
    assert torch.equal(ids, choose_experts(limited, 4))
    chosen = scores.gather(1, ids)
    assert_close(weights, 2.5 * chosen / chosen.sum(1, keepdim=True), "router")
