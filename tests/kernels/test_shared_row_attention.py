"""DeepSeek V4's attention against its twins and the model's own layer, in fp32."""

import pytest
import torch

from kernels import shared_row_attention
from kernels.reference import shared_row_attention as twin
from moe_runtime.layers.compressed_attention import rotate
from moe_runtime.layers.compressed_attention import shared_row_attention as of_the_model
from tests.tolerances import assert_close

WINDOW, SLOTS, ROTARY = 24, 33, 8
POSITIONS = 420


def case(device, heads, width, position, ratio, top, tokens=1):
    """Arguments for tokens from a position on: what none of them may see is NaN."""
    g = torch.Generator().manual_seed(heads + position)
    last = position + tokens - 1
    finished = (last + 1) // ratio if ratio else 0
    rows = torch.randn(SLOTS + 200, width, generator=g)
    oldest = max(0, position + 1 - WINDOW)
    kept = torch.arange(oldest, last + 1) % SLOTS
    assert len(kept.unique()) == len(kept)
    unseen = torch.ones(SLOTS, dtype=torch.bool).index_fill(0, kept, False)
    rows[:SLOTS][unseen] = float("nan")
    rows[SLOTS + finished :] = float("nan")
    chosen = None
    if top is not None:
        chosen = torch.zeros(tokens, top, dtype=torch.int32)
        for t in range(tokens):
            order = torch.randperm((position + t + 1) // ratio, generator=g)[:top]
            chosen[t, : len(order)] = order
        chosen = chosen.to(device)
    query = 2 * torch.randn(tokens, heads, width, generator=g)
    sinks = torch.randn(heads, generator=g)
    angles = torch.arange(POSITIONS)[:, None] * 0.7 ** torch.arange(ROTARY // 2)
    at = torch.tensor([position], dtype=torch.int32)
    tensors = [t.to(device) for t in (query, rows, at, sinks)]
    return tensors, (angles.cos().float().to(device), angles.sin().float().to(device)), chosen


def decode(module, tensors, rope, ratio, chosen):
    query, *others = tensors
    heads, width = query.shape[1:]
    splits = shared_row_attention.SPLITS
    out, acc = query.new_empty(heads, width), query.new_empty(heads, splits, width)
    return module.shared_row_attention_decode(
        query[0], *others, rope, out, slots=SLOTS, window=WINDOW, ratio=ratio, acc=acc,
        stats=query.new_empty(heads, splits, 2), chosen=None if chosen is None else chosen[0],
    )  # fmt: skip


def prefill(module, tensors, rope, ratio, chosen):
    out = torch.full_like(tensors[0], float("nan"))
    return module.shared_row_attention_prefill(
        *tensors, rope, out, slots=SLOTS, window=WINDOW, ratio=ratio, chosen=chosen
    )


@pytest.mark.parametrize(
    ("heads", "width", "position", "ratio", "top"),
    [
        (16, 32, 0, 0, None),  # the first token sees itself and the sink
        (16, 32, 90, 0, None),
        (5, 24, 2, 4, 6),  # no compressed row yet
        (5, 24, 17, 4, 6),  # fewer rows than may be chosen
        (36, 96, 410, 4, 33),  # the rotary columns are within the last of two blocks
        (5, 24, 410, 4, None),  # several splits
    ],
)
def test_decode(device, heads, width, position, ratio, top):
    tensors, rope, chosen = case(device, heads, width, position, ratio, top)
    ours = decode(shared_row_attention, tensors, rope, ratio, chosen)
    assert_close(ours, decode(twin, tensors, rope, ratio, chosen), "attention")


@pytest.mark.parametrize(
    ("heads", "width", "position", "ratio", "top"),
    [
        (5, 24, 0, 4, None),  # from the start of a sequence
        (36, 96, 95, 4, 7),
        (5, 24, 410, 16, None),
    ],
)
def test_prefill(device, heads, width, position, ratio, top):
    tensors, rope, chosen = case(device, heads, width, position, ratio, top, tokens=9)
    ours = prefill(shared_row_attention, tensors, rope, ratio, chosen)
    assert_close(ours, prefill(twin, tensors, rope, ratio, chosen), "attention")


def test_the_twin_is_the_models_layer():
    (query, rows, at, sinks), (cos, sin), chosen = case("cpu", 5, 24, 410, 4, 33)
    seen = torch.zeros(1, len(rows), dtype=torch.bool)
    seen[:, torch.arange(411 - WINDOW, 411) % SLOTS] = True
    seen[0, SLOTS + chosen[0].long()] = True
    plain = of_the_model(query, rows.nan_to_num(), seen, sinks)
    expected = rotate(plain, cos[410], -sin[410])[0]
    ours = decode(twin, [query, rows, at, sinks], (cos, sin), 4, chosen)
    assert_close(ours, expected, "attention")


def test_an_error_of_one_percent_in_the_sinks_is_seen(device):
    tensors, rope, chosen = case(device, 5, 24, 17, 4, 6)
    expected = decode(twin, tensors, rope, 4, chosen)
    wrong = [*tensors[:3], tensors[3] * 1.01]
    for run in (decode, prefill):
        ours = run(shared_row_attention, wrong, rope, 4, chosen)
        with pytest.raises(AssertionError, match="attention"):
            assert_close(ours.view_as(expected), expected, "attention")
