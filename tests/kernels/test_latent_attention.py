"""Kernels of multi-head latent attention against their twins, with fp32 data."""

from contextlib import nullcontext

import pytest
import torch

from kernels import latent_attention, latent_cache
from kernels.reference import latent_attention as attention_twin
from kernels.reference import latent_cache as cache_twin
from quant.codecs import encode
from quant.formats import FP8_BLOCK128, FP8_BLOCK128_E8M0
from tests.tolerances import assert_close

# Heads, latent, rotary, nope and value widths: whole tiles, and sizes that fill none.
SHAPES = [(16, 64, 16, 32, 32), (5, 48, 8, 24, 40)]
SLOTS = 150


@pytest.fixture(autouse=True)
def on_device(device):
    """Tensors are made where kernels run: on a GPU, or in the interpreter."""
    with torch.device(device) if device.type == "cuda" else nullcontext():
        yield


def random(seed, *shapes):
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def rope_tables(rotary):
    angles = torch.arange(SLOTS)[:, None] * 0.7 ** torch.arange(rotary // 2)
    return angles.cos().float(), angles.sin().float()


@pytest.mark.parametrize(("heads", "latent", "rotary", "nope", "value"), SHAPES)
def test_what_is_cached_and_the_absorbed_query(heads, latent, rotary, nope, value):
    q, row, norm, weight = random(
        1, (heads, nope + rotary), (latent + rotary,), (latent,), (heads * (nope + value), latent)
    )
    rope, position = rope_tables(rotary), torch.tensor([77], dtype=torch.int32)
    found = []
    for module in (latent_cache, cache_twin):
        cache = torch.zeros(SLOTS, latent + rotary)
        query = torch.zeros(heads, latent + rotary)
        module.latent_query(q, row, norm, weight, rope, position, cache, query, eps=1e-6)
        found.append((query, cache))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, "gemv")
    assert found[0][1].abs().sum(1).nonzero().flatten().tolist() == [77]


@pytest.mark.parametrize(("heads", "latent", "rotary", "nope", "value"), SHAPES)
def test_many_tokens_are_cached(heads, latent, rotary, nope, value):
    q, rows, norm = random(2, (5, heads, nope + rotary), (5, latent + rotary), (latent,))
    rope, position = rope_tables(rotary), torch.tensor([140], dtype=torch.int32)
    found = []
    for module in (latent_cache, cache_twin):
        cache = torch.zeros(SLOTS, latent + rotary)
        query = torch.zeros(5, heads, latent + rotary)
        module.latent_cache(q, rows, norm, rope, position, cache, query, eps=1e-6)
        found.append((query, cache))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, "rope")


@pytest.mark.parametrize(
    ("shape", "position", "top"),
    [(0, 131, None), (1, 33, None), (1, 0, None), (0, 131, 40), (1, 33, 40)],
)
def test_decode(shape, position, top):
    heads, latent, rotary, nope, value = SHAPES[shape]
    query, cache, weight = random(
        3, (heads, latent + rotary), (SLOTS, latent + rotary), (heads * (nope + value), latent)
    )
    cache[position + 1 :] = float("nan")  # not written yet: must not be read
    at = torch.tensor([position], dtype=torch.int32)
    chosen = None
    if top is not None:
        order = torch.randperm(
            position + 1, generator=torch.Generator(torch.get_default_device()).manual_seed(4)
        )
        chosen = torch.zeros(top, dtype=torch.int32)
        chosen[: min(top, position + 1)] = order[:top].int()
    splits = latent_attention.num_splits(heads)
    found = []
    for module in (latent_attention, attention_twin):
        out = torch.empty(heads, value)
        acc, stats = torch.empty(heads, splits, latent), torch.empty(heads, splits, 2)
        module.latent_attention_decode(
            query, cache, at, weight, out, scale=0.2, acc=acc, stats=stats, chosen=chosen
        )
        found.append(out)
    assert_close(*found, "gemv")


@pytest.mark.parametrize("top", [None, 30], ids=["all", "chosen"])
def test_prefill(top):
    heads, latent, rotary = 16, 48, 16
    query, cache = random(5, (9, heads, latent + rotary), (SLOTS, latent + rotary))
    cache[60:] = float("nan")
    at = torch.tensor([51], dtype=torch.int32)
    chosen = None
    if top is not None:
        g = torch.Generator(torch.get_default_device()).manual_seed(6)
        chosen = torch.stack([torch.randperm(52 + t, generator=g)[:top] for t in range(9)]).int()
    found = []
    for module in (latent_attention, attention_twin):
        out = torch.empty(9, heads, latent)
        module.latent_attention_prefill(query, cache, at, out, scale=0.2, chosen=chosen)
        found.append(out)
    assert_close(*found, "attention")


def test_prefill_of_few_heads():
    """Rows of several tokens in one tile, each with its own last key."""
    query, cache = random(7, (30, 5, 64), (SLOTS, 64))
    at = torch.tensor([3], dtype=torch.int32)
    found = []
    for module in (latent_attention, attention_twin):
        out = torch.empty(30, 5, 48)
        found.append(module.latent_attention_prefill(query, cache, at, out, scale=0.3))
    assert_close(*found, "attention")


@pytest.mark.parametrize("format", [FP8_BLOCK128, FP8_BLOCK128_E8M0], ids=lambda f: f.name)
def test_projections_in_blocks(format):
    heads, latent, rotary = 3, 160, 8
    q, row, norm, query, cache, weight, sizes = random(
        8, (heads, 128 + rotary), (latent + rotary,), (latent,), (heads, latent + rotary),
        (SLOTS, latent + rotary), (heads * 256, latent), (heads * 256, 1),
    )  # fmt: skip
    weight, at = encode(weight * sizes.exp(), format), torch.tensor([20], dtype=torch.int32)
    splits = latent_attention.num_splits(heads)
    found = []
    for cached, attention in ((latent_cache, latent_attention), (cache_twin, attention_twin)):
        absorbed = torch.zeros(heads, latent + rotary)
        rope, slots = rope_tables(rotary), torch.zeros(SLOTS, latent + rotary)
        cached.latent_query(q, row, norm, weight, rope, at, slots, absorbed, eps=1e-6)
        acc, stats = torch.empty(heads, splits, latent), torch.empty(heads, splits, 2)
        values = torch.empty(heads, 128)
        attention.latent_attention_decode(
            query, cache, at, weight, values, scale=0.2, acc=acc, stats=stats
        )
        found.append((absorbed, values))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, "gemv")
