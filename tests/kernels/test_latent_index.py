"""The indexer of V3.2 and V4 against its twin, with fp32 data."""

from contextlib import nullcontext

import pytest
import torch

from kernels import latent_index as kernel
from kernels.reference import latent_index as twin
from tests.tolerances import assert_close

SLOTS, HEADS, WIDTH, ROTARY = 400, 20, 24, 8


@pytest.fixture(autouse=True)
def on_device(device):
    """Tensors are made where kernels run: on a GPU, or in the interpreter."""
    with torch.device(device) if device.type == "cuda" else nullcontext():
        yield


def random(seed, *shapes):
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def test_index_rows():
    q, key, norm, bias = random(1, (3, HEADS, WIDTH), (3, WIDTH), (WIDTH,), (WIDTH,))
    angles = torch.arange(SLOTS)[:, None] * 0.7 ** torch.arange(ROTARY // 2)
    rope = angles.cos().float(), angles.sin().float()
    at = torch.tensor([30], dtype=torch.int32)
    found = []
    for module in (kernel, twin):
        cache, query = torch.zeros(SLOTS, WIDTH), torch.zeros(3, HEADS, WIDTH)
        module.index_rows(q, key + 3.0, norm, bias, rope, at, cache, query)
        found.append((cache, query))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, "gemv")


def choose(module, position, count, tokens=1, *, ties=False, ratio=1, cut=None):
    query, weights, cache = random(
        position, (tokens, HEADS, WIDTH), (tokens, HEADS), (SLOTS, WIDTH)
    )
    if ties:  # of whole numbers, whose sums are exact in any order
        query, weights, cache = query.round(), weights.round(), cache.round()
        cache[1:] = cache[0]
    at = torch.tensor([position], dtype=torch.int32)
    scores = torch.full((tokens, SLOTS), float("nan"))
    chosen = torch.full((tokens, count), -1, dtype=torch.int32)
    module.index_choose(query, weights, cache, at, scores, chosen, ratio=ratio, cut=cut)
    return chosen.tolist()


@pytest.mark.parametrize(("position", "count"), [(0, 8), (7, 8), (8, 8), (70, 8), (399, 200)])
def test_the_best_are_chosen(position, count):
    assert choose(kernel, position, count) == choose(twin, position, count)


def test_many_tokens():
    assert choose(kernel, 30, 33, tokens=5) == choose(twin, 30, 33, tokens=5)


@pytest.mark.parametrize("position", [0, 3, 19, 20, 300])
def test_rows_of_four_tokens(position):
    """None, one, fewer than may be chosen, and more; rows that are not finished are not seen."""
    found = choose(kernel, position, 5, tokens=3, ratio=4)
    assert found == choose(twin, position, 5, tokens=3, ratio=4)
    assert max(map(max, found)) < (position + 3) // 4


def test_equal_scores_take_the_earlier_token():
    assert choose(kernel, 90, 40, ties=True) == [list(range(40))]


def test_scores_of_either_sign_and_blocks(monkeypatch):
    """More than one block in every pass; negative scores, zeros and subnormal differences."""
    monkeypatch.setattr(kernel, "_CHOOSE_BLOCK", 64)
    monkeypatch.setattr(kernel, "_CHOOSE_WARPS", 1)
    assert choose(kernel, 395, 100) == choose(twin, 395, 100)


@pytest.fixture
def small_blocks(monkeypatch):
    """13 programs of up to 32 scores leave out what cannot be chosen, a part has room for 9."""
    monkeypatch.setattr(kernel, "_CHOOSE_BLOCK", 256)
    monkeypatch.setattr(kernel, "_CHOOSE_CUT_BLOCK", 128)
    monkeypatch.setattr(kernel, "_CUT_BLOCK", 32)
    monkeypatch.setattr(kernel, "_CHOOSE_WARPS", 1)


@pytest.mark.parametrize("position", [10, 127, 128, 250, 399])
@pytest.mark.parametrize("count", [1, 10, 20, 60])
def test_with_others_left_out_before(small_blocks, position, count):
    """From few rows, of which none is left out, to so many chosen that parts have no room."""
    cut = kernel.cut_scratch(SLOTS, torch.get_default_device())
    cut.fill_(-1)
    expected = choose(twin, position, count)
    assert choose(kernel, position, count, cut=cut) == expected
    _, counts, kept = cut.split((13, 13, 13 * 9))
    if position >= 128:
        assert counts.sum() >= count
        assert count in (10, 20) or (counts.max() > 9) == (count == 60)
        in_room = [part[:n] for part, n in zip(kept.view(13, 9), counts.tolist(), strict=True)]
        assert all((part != 0).all() for part in in_room)
    else:
        assert (cut == -1).all()


def test_equal_scores_with_others_left_out_before(small_blocks):
    """None can be left out, and the parts have no room: all are looked at."""
    cut = kernel.cut_scratch(SLOTS, torch.get_default_device())
    assert choose(kernel, 390, 40, ties=True, cut=cut) == [list(range(40))]


def test_a_cut_that_leaves_out_what_is_chosen_is_noticed(small_blocks, monkeypatch):
    """Planted: an edge of each part's best score, which is too high."""
    cut = kernel.cut_scratch(SLOTS, torch.get_default_device())
    real = kernel._edges_kernel

    class Wrong:
        def __getitem__(self, grid):
            return lambda *args, C, **options: real[grid](*args, C=1, **options)

    monkeypatch.setattr(kernel, "_edges_kernel", Wrong())
    assert choose(kernel, 399, 60, cut=cut) != choose(twin, 399, 60)


def test_few_rows_need_no_cut():
    assert kernel.cut_scratch(kernel._CHOOSE_BLOCK, torch.device("cpu")) is None
