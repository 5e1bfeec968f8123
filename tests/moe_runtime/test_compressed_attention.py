"""Compressed rows, the indexer's choice and attention over rows, each against a plain loop."""

import pytest
import torch

from moe_runtime.layers import compressed_attention
from moe_runtime.layers.compressed_attention import (
    Compressor,
    compressed_is_seen,
    index_is_chosen,
    rotate,
    shared_row_attention,
    window_is_seen,
)
from tests.tolerances import assert_close

CPU = torch.device("cpu")
WIDTH = 6


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True, params=[1 << 25, 40], ids=["all queries at once", "few at once"])
def max_scores(request, monkeypatch):
    """Long sequences are taken in parts; short ones here too."""
    monkeypatch.setattr(compressed_attention, "_MAX_SCORES", request.param)


@pytest.mark.parametrize(
    ("ratio", "overlap"), [(4, True), (3, False), (5, False), (2, True)], ids=str
)
@pytest.mark.parametrize("parts", [[23], [1] * 23, [7, 1, 1, 9, 5], [2, 21]], ids=str)
def test_rows_of_windows(ratio, overlap, parts):
    """The same rows however the tokens arrive, and those of a loop over windows and channels."""
    columns = 2 * WIDTH if overlap else WIDTH
    values, gates = random(23, columns), random(23, columns, seed=1)
    compressor = Compressor.empty(ratio, WIDTH, overlap=overlap, device=CPU)
    rows = [
        compressor.add_tokens(v, g)
        for v, g in zip(values.split(parts), gates.split(parts), strict=True)
    ]
    assert_close(torch.cat(rows), looped_rows(values, gates, ratio, overlap), "router")
    assert len(compressor.values) == 23 % ratio


def looped_rows(values, gates, ratio, overlap):
    rows = torch.zeros(len(values) // ratio, WIDTH)
    for w in range(len(rows)):
        for channel in range(WIDTH):
            own = WIDTH + channel if overlap else channel
            slots = [(t, own) for t in range(w * ratio, (w + 1) * ratio)]
            if overlap and w:
                slots += [(t, channel) for t in range((w - 1) * ratio, w * ratio)]
            weights = torch.stack([gates[slot] for slot in slots]).softmax(0)
            rows[w, channel] = sum(p * values[s] for p, s in zip(weights, slots, strict=True))
    return rows


def test_what_is_seen():
    positions = torch.tensor([5, 6, 7, 8])
    window = window_is_seen(positions, torch.arange(3, 9), 3)
    assert [row.nonzero().flatten().add(3).tolist() for row in window] == [
        [3, 4, 5], [4, 5, 6], [5, 6, 7], [6, 7, 8],
    ]  # fmt: skip
    # Window w of ratio 4 ends with token 4 w + 3, which sees it.
    assert compressed_is_seen(positions, 3, 4).sum(1).tolist() == [1, 1, 2, 2]


def test_the_index_chooses_among_what_is_seen():
    q, weights, rows = random(5, 8, WIDTH), random(5, 8, seed=1).abs(), random(7, WIDTH, seed=2)
    seen = compressed_is_seen(torch.arange(1, 14, 3), 7, 2)
    chosen = index_is_chosen(q, weights, rows, seen, 3)
    for t in range(5):
        scores = {
            n: sum(float(weights[t, h] * (q[t, h] @ rows[n]).clamp(min=0)) for h in range(8))
            for n in range(7)
            if seen[t, n]
        }
        best = sorted(scores, key=lambda n: -scores[n])[:3]
        assert set(chosen[t].nonzero().flatten().tolist()) == set(best)


def test_attention_with_a_sink():
    q, rows, sinks = random(3, 2, WIDTH), random(4, WIDTH, seed=1), random(2, seed=2)
    seen = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]]).bool()
    out = shared_row_attention(q, rows, seen, sinks)
    for t in range(3):
        for h in range(2):
            powers = (rows @ q[t, h] * WIDTH**-0.5).exp() * seen[t]
            expected = (powers[:, None] * rows).sum(0) / (powers.sum() + sinks[h].exp())
            assert_close(out[t, h] + 1, expected + 1, "attention")


def test_rotation_is_of_pairs_at_the_end_and_can_be_undone():
    x, angle = random(2, WIDTH), torch.tensor([[0.3, 1.1], [0.0, 2.0]])
    turned = rotate(x, angle.cos(), angle.sin())
    assert_close(turned[:, :2], x[:, :2], "rope")
    pairs = torch.view_as_complex(x[:, 2:].unflatten(-1, (2, 2)).contiguous())
    expected = torch.view_as_real(pairs * torch.polar(torch.ones(2, 2), angle)).flatten(1)
    assert_close(turned[:, 2:], expected, "rope")
    assert_close(rotate(turned, angle.cos(), -angle.sin()), x, "rope")
