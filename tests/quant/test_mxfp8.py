"""MXFP8: every code under scale bytes, where each rule's exponent steps, errors."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant import e8m0, mxfp8
from quant.formats import MXFP8
from quant.tensor import QuantTensor


@pytest.mark.parametrize("byte", [0, 1, 100, 127, 200, 246])
def test_every_code_is_exact_under_a_scale(byte):
    codes = torch.arange(256, dtype=torch.uint8)
    stored = codes.view(torch.float8_e4m3fn).view(8, 32)
    scales = torch.full((8, 1), byte, dtype=torch.uint8)
    decoded = mxfp8.decode(QuantTensor(stored, scales, MXFP8, (8, 32))).flatten().numpy()
    values = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = (values * 2.0 ** (byte - 127)).astype(np.float32)
    assert np.array_equal(decoded, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("rule", "last_without", "first_with"),
    [("floor", 511.9, 512), ("even", 495.9, 496), ("rceil", 448, 448.1)],
)
def test_where_the_scale_steps(rule, last_without, first_with):
    amax = torch.tensor([last_without, first_with])
    found = e8m0.scale_bytes_for(amax, rule, largest=448.0, mantissa_bits=3)
    assert found.tolist() == [127, 128]


@given(st.integers(0, 2**32 - 1), st.sampled_from(e8m0.SCALE_RULES), st.integers(-40, 40))
def test_error_is_bounded(seed, rule, exponent):
    """At most half a step of the element, or what clipping at 448 leaves under floor and even."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    encoded = mxfp8.encode(weight, rule)
    scale = e8m0.decode_e8m0(encoded.scales).repeat_interleave(32, -1)
    error = (mxfp8.decode(encoded) - weight).abs()
    clipped = (weight.abs() - 448 * scale).clamp(min=0)
    bound = torch.maximum(weight.abs() * 2**-4, scale * 2**-10)
    assert (error <= torch.maximum(bound, clipped) * 1.0001).all()
    if rule == "rceil":
        assert clipped.max() == 0


def test_refusals_and_zeros():
    with pytest.raises(ValueError, match="MXFP8 needs columns in multiples of 32, got 40"):
        mxfp8.encode(torch.zeros(2, 40))
    with pytest.raises(ValueError, match="NaN or infinity as MXFP8"):
        mxfp8.encode(torch.full((1, 32), float("inf")))
    assert mxfp8.decode(mxfp8.encode(torch.zeros(2, 32))).abs().max() == 0
