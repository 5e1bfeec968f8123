"""RMS norm against its twin and against the formula written out in float64."""

import pytest
import torch

from kernels import rms_norm as kernel
from kernels.reference import rms_norm as twin
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (3, 96), (5, 2880), (2, 33)])
def test_norm(device, tokens, width, dtype):
    x = torch.randn(tokens, width, device=device) * 7
    weight = (torch.rand(width, device=device) + 0.5).bfloat16()
    expected = twin.rms_norm(x, weight, 1e-5)
    actual = kernel.rms_norm(x, weight, 1e-5, dtype)
    assert actual.dtype == dtype
    assert_close(actual, expected, "rms_norm" if dtype == torch.float32 else "packed_fp16")


def test_twin_is_the_formula(device):
    x = torch.randn(4, 50, device=device) * 1e-3  # small, so that eps counts
    weight = torch.rand(50, device=device)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_close(twin.rms_norm(x, weight, 1e-5), expected, "rms_norm")


def test_rows_of_zeros_stay_zero(device):
    y = kernel.rms_norm(
        torch.zeros(2, 96, device=device), torch.ones(96, device=device), 1e-5, torch.float32
    )
    assert torch.equal(y, torch.zeros_like(y))


def test_a_planted_error_of_one_percent_is_caught(device):
    x = torch.randn(3, 96, device=device)
    weight = torch.ones(96, device=device)
    expected = twin.rms_norm(x, weight, 1e-5)
    for name, dtype in (("rms_norm", torch.float32), ("packed_fp16", torch.float16)):
        actual = kernel.rms_norm(x, weight * 1.01, 1e-5, dtype)
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close(actual, expected, name)
