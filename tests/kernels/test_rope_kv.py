"""Rope and cache writes against the twin; the tables against numbers of GPT-OSS."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from kernels import rope_kv as kernel
from kernels.reference import rope_kv as twin
from tests.tolerances import assert_close

NAN = float("nan")


@dataclass(frozen=True)
class Yarn:
    """GPT-OSS's numbers."""

    theta: float = 150000.0
    factor: float = 32.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_context: int = 4096
    truncate: bool = False


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def run(module, device, tokens, heads, kv_heads, width, slots, position, dtype):
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width, generator=generator).to(device)
    cos, sin = twin.rope_table(Yarn(), width, torch.arange(400, device=device))
    k_cache = torch.full((kv_heads, slots, width), NAN, dtype=dtype, device=device)
    v_cache = k_cache.clone()
    q = torch.full((tokens, heads, width), NAN, dtype=dtype, device=device)
    where = torch.tensor([position], dtype=torch.int32, device=device)
    assert module.rope_and_cache(qkv, cos, sin, where, k_cache, v_cache, q) is q
    return qkv, q, k_cache, v_cache


@pytest.mark.parametrize(
    ("tokens", "position", "slots"),
    [(1, 0, 8), (1, 399, 16), (5, 7, 12), (5, 9, 12), (12, 25, 12), (3, 130, 200)],
    ids=["first", "last", "fits", "wraps", "fills-the-ring", "full-cache"],
)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 16), (5, 1, 64), (4, 4, 32)])
def test_rope_and_cache(device, tokens, position, slots, heads, kv_heads, width):
    sizes = (tokens, heads, kv_heads, width, slots, position)
    _, *expected = run(twin, device, *sizes, torch.float32)
    _, *actual = run(kernel, device, *sizes, torch.float32)
    for a, e in zip(actual, expected, strict=True):
        # Slots that no token was written to must be left alone.
        assert torch.equal(a.isnan(), e.isnan())
        assert_close(a.nan_to_num(), e.nan_to_num(), "rope")


def test_sixteen_bit_caches_take_the_rounded_values(device):
    # The interpreter's casts to 16 bits truncate, so equality with the twin is only near.
    sizes = (6, 8, 2, 64, 40, 30)
    _, *expected = run(twin, device, *sizes, torch.float32)
    _, *actual = run(kernel, device, *sizes, torch.float16)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float16
        assert_close(a.nan_to_num(), e.nan_to_num(), "packed_fp16")


def test_values_are_not_rotated_and_pairs_are_half_split(device):
    heads, kv_heads, width = 2, 1, 16
    sizes = (1, heads, kv_heads, width, 8, 3)
    qkv, q, _, v_cache = run(kernel, device, *sizes, torch.float32)
    x = qkv.view(heads + 2 * kv_heads, width)
    assert torch.equal(v_cache[0, 3], x[3])
    cos, sin = twin.rope_table(Yarn(), width, torch.tensor([3], device=device))
    expected = torch.cat(
        (x[0, :8] * cos[0] - x[0, 8:] * sin[0], x[0, 8:] * cos[0] + x[0, :8] * sin[0])
    )
    assert_close(q[0, 0], expected, "rope")


def test_table_has_the_published_edges():
    """Frequencies 0 to 8 are plain, 18 to 31 divided by 32, between them blended; see YaRN."""
    plain = 150000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    ours = twin.inverse_frequencies(Yarn(), 64)
    low, high = 8.092779115512402, 17.39802450158856
    ramp = ((torch.arange(32, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(ours, plain * (1 - ramp) + plain / 32 * ramp, rtol=1e-12, atol=0)
    rounded = twin.inverse_frequencies(replace(Yarn(), truncate=True), 64)
    assert ((rounded / ours - 1).abs().max()).item() == pytest.approx(0.76, abs=0.02)


def test_table_grows_cos_and_sin_and_keeps_precision_far_out():
    position = torch.tensor([0, 131071])
    cos, sin = twin.rope_table(Yarn(), 64, position)
    assert cos.dtype == sin.dtype == torch.float32
    growth = 1.3465735902799727
    assert cos[0].tolist() == pytest.approx([growth] * 32)
    assert float(cos[1, 0]) == pytest.approx(growth * math.cos(131071), abs=1e-6)
    assert float(sin[1, 0]) == pytest.approx(growth * math.sin(131071), abs=1e-6)
    plain, _ = twin.rope_table(replace(Yarn(), factor=1.0), 64, position)
    assert float(plain[0, 0]) == 1.0


def test_a_planted_error_of_one_percent_is_caught(device):
    _, expected, *_ = run(twin, device, 3, 4, 2, 16, 8, 2, torch.float32)
    for name, dtype in (("rope", torch.float32), ("packed_fp16", torch.float16)):
        _, actual, *_ = run(kernel, device, 3, 4, 2, 16, 8, 2, dtype)
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close(actual.float() * 1.01, expected, name)
