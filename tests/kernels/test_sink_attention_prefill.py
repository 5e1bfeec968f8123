"""Attention of a chunk against its twin: windows, rings, chunks, sinks, NaN beyond the end."""

import pytest
import torch

from kernels import sink_attention_prefill as kernel
from kernels.reference import sink_attention_prefill as twin
from tests.tolerances import assert_close

NAN = float("nan")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def working_dtype(device):
    """fp32 in the interpreter, which gets bf16 arithmetic wrong; bf16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def tolerance(device):
    return "attention" if device.type == "cpu" else "attention_bf16"


def filled_cache(device, length, kv_heads, width, slots):
    """Keys and values of positions 0 to length - 1 in their slots; NaN in all others."""
    generator = torch.Generator().manual_seed(length)
    keys = torch.randn(2, kv_heads, length, width, generator=generator).to(device)
    caches = torch.full((2, kv_heads, slots, width), NAN, device=device)
    for position in range(length):
        caches[:, :, position % slots] = keys[:, :, position]
    k_cache, v_cache = caches.to(working_dtype(device))
    return k_cache, v_cache


def attend(module, q, k_cache, v_cache, sinks, position, window):
    tokens, heads, width = q.shape
    out = torch.full((tokens, heads * width), NAN, device=q.device)
    where = torch.tensor([position], dtype=torch.int32, device=q.device)
    return module.sink_attention_prefill(q, k_cache, v_cache, sinks, where, out, window=window)


def queries(device, tokens, heads, width):
    return (torch.randn(tokens, heads, width, device=device) * 2).to(working_dtype(device))


@pytest.mark.parametrize(
    ("tokens", "position", "window", "slots"),
    [
        (1, 0, 0, 8),
        (20, 0, 0, 20),
        (33, 70, 0, 128),
        (9, 150, 0, 160),
        (1, 5, 8, 8),
        (20, 0, 8, 27),
        (30, 44, 8, 37),
        (17, 200, 128, 144),
        (70, 3, 1, 70),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 16), (6, 2, 32), (4, 1, 64)])
def test_attention(device, tokens, position, window, slots, heads, kv_heads, width):
    q = queries(device, tokens, heads, width)
    k_cache, v_cache = filled_cache(device, position + tokens, kv_heads, width, slots)
    sinks = torch.randn(heads, device=device) * 3
    arguments = (q, k_cache, v_cache, sinks, position, window)
    assert_close(attend(kernel, *arguments), attend(twin, *arguments), tolerance(device))


def test_large_tiles(device):
    """Enough rows for 128 a program: unmasked blocks, then masked ones."""
    tokens, heads, kv_heads, width = 256, 8, 1, 16
    assert kernel.rows_per_program(tokens, heads // kv_heads) == 128
    q = queries(device, tokens, heads, width)
    sinks = torch.randn(heads, device=device)
    for window, slots, position in ((0, 340, 37), (24, 330, 37)):
        k_cache, v_cache = filled_cache(device, position + tokens, kv_heads, width, slots)
        arguments = (q, k_cache, v_cache, sinks, position, window)
        assert_close(attend(kernel, *arguments), attend(twin, *arguments), tolerance(device))


@pytest.mark.parametrize("window", [0, 8])
def test_two_chunks_equal_one(device, window):
    tokens, heads, kv_heads, width = 40, 4, 2, 16
    q = queries(device, tokens, heads, width)
    sinks = torch.randn(heads, device=device)
    k_cache, v_cache = filled_cache(device, tokens, kv_heads, width, 48)
    whole = attend(kernel, q, k_cache, v_cache, sinks, 0, window)
    parts = [
        attend(kernel, part, k_cache, v_cache, sinks, start, window)
        for start, part in ((0, q[:23]), (23, q[23:]))
    ]
    assert_close(torch.cat(parts), whole, tolerance(device))


def test_the_window_counts_the_query_itself(device):
    """Window 2 sees this token and the one before: with equal keys, half of each value."""
    q = torch.zeros(4, 2, 16, device=device, dtype=working_dtype(device))
    k_cache, v_cache = filled_cache(device, 4, 1, 16, 8)
    no_sink = torch.full((2,), -1e4, device=device)
    out = attend(kernel, q, k_cache, v_cache, no_sink, 0, 2).view(4, 2, 16)
    expected = (v_cache[0, 2].float() + v_cache[0, 3].float()) / 2
    assert_close(out[3, 1], expected, tolerance(device))
    assert_close(out[0, 0], v_cache[0, 0].float(), tolerance(device))


@pytest.mark.parametrize("size", [-80.0, 30.0, 80.0])
def test_sinks_of_any_size(device, size):
    """A sink takes its share of the denominator and nothing else: logit s among equal keys."""
    tokens, heads, width = 5, 2, 16
    q = torch.zeros(tokens, heads, width, device=device, dtype=working_dtype(device))
    k_cache, v_cache = filled_cache(device, tokens, 1, width, 8)
    sinks = torch.tensor([size, 0.0], device=device)
    out = attend(kernel, q, k_cache, v_cache, sinks, 0, 0).view(tokens, heads, width)
    total = v_cache[0, :tokens].double().sum(0)
    share = 1 / (tokens + torch.tensor(size, dtype=torch.float64).exp())
    assert_close(out[4, 0] / share, total, tolerance(device))
    assert_close(out[4, 1], total / (tokens + 1), tolerance(device))


def test_planted_errors_of_one_percent_are_caught(device):
    tokens, heads, kv_heads, width = 20, 4, 2, 16
    q = queries(device, tokens, heads, width)
    k_cache, v_cache = filled_cache(device, tokens, kv_heads, width, 24)
    sinks = torch.randn(heads, device=device)
    expected = attend(twin, q, k_cache, v_cache, sinks, 0, 0)
    for wrong in (
        attend(kernel, q * 1.01, k_cache, v_cache, sinks, 0, 0),
        attend(kernel, q, k_cache, v_cache * 1.01, sinks, 0, 0),
        attend(kernel, q, k_cache, v_cache, sinks + 0.05, 0, 0),
    ):
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close(wrong, expected, tolerance(device))
