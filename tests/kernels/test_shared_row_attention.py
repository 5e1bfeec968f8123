"""DeepSeek V4's attention of one token against its twin and the model's own layer, in fp32."""

import pytest
import torch

from kernels import shared_row_attention
from kernels.reference import shared_row_attention as twin
from moe_runtime.layers.compressed_attention import shared_row_attention as of_the_model
from tests.tolerances import assert_close

WINDOW = 24


def case(device, heads, width, position, ratio, top):
    """Arguments of the decode: what the token may not see is NaN."""
    g = torch.Generator().manual_seed(heads + position)
    finished = (position + 1) // ratio if ratio else 0
    rows = torch.randn(WINDOW + 200, width, generator=g)
    rows[min(position + 1, WINDOW) : WINDOW] = float("nan")
    rows[WINDOW + finished :] = float("nan")
    chosen = None
    if top is not None:
        chosen = torch.zeros(top, dtype=torch.int32)
        order = torch.randperm(finished, generator=g)[:top]
        chosen[: len(order)] = order
        chosen = chosen.to(device)
    query = 2 * torch.randn(heads, width, generator=g)
    sinks = torch.randn(heads, generator=g)
    at = torch.tensor([position], dtype=torch.int32)
    return [t.to(device) for t in (query, rows, at, sinks)], chosen


def decode(module, tensors, ratio, chosen):
    query = tensors[0]
    heads, width = query.shape
    splits = shared_row_attention.SPLITS
    out, acc = query.new_empty(heads, width), query.new_empty(heads, splits, width)
    return module.shared_row_attention_decode(
        *tensors, out, window=WINDOW, ratio=ratio, acc=acc,
        stats=query.new_empty(heads, splits, 2), chosen=chosen,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "width", "position", "ratio", "top"),
    [
        (16, 32, 0, 0, None),  # the first token sees itself and the sink
        (16, 32, 90, 0, None),
        (5, 24, 2, 4, 6),  # no compressed row yet
        (5, 24, 17, 4, 6),  # fewer rows than may be chosen
        (36, 32, 410, 4, 33),
        (5, 24, 410, 4, None),  # several splits
    ],
)
def test_decode(device, heads, width, position, ratio, top):
    tensors, chosen = case(device, heads, width, position, ratio, top)
    ours = decode(shared_row_attention, tensors, ratio, chosen)
    assert_close(ours, decode(twin, tensors, ratio, chosen), "attention")


def test_the_twin_is_the_models_layer():
    (query, rows, at, sinks), chosen = case("cpu", 5, 24, 410, 4, 33)
    seen = torch.zeros(1, len(rows), dtype=torch.bool)
    seen[:, :WINDOW] = True
    seen[0, WINDOW + chosen.long()] = True
    expected = of_the_model(query[None], rows.nan_to_num(), seen, sinks)[0]
    assert_close(decode(twin, [query, rows, at, sinks], 4, chosen), expected, "attention")


def test_an_error_of_one_percent_in_the_sinks_is_seen(device):
    tensors, chosen = case(device, 5, 24, 17, 4, 6)
    expected = decode(twin, tensors, 4, chosen)
    ours = decode(shared_row_attention, [*tensors[:3], tensors[3] * 1.01], 4, chosen)
    with pytest.raises(AssertionError, match="attention"):
        assert_close(ours, expected, "attention")
