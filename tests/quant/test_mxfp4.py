"""MXFP4: every code and scale byte, the golden file, ties, and what must be refused."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant import e2m1, e8m0, minifloat, mxfp4
from quant.blocks import signed_codes
from quant.formats import MXFP4
from quant.tensor import QuantTensor

GOLDEN = np.load(Path(__file__).parents[1] / "vectors" / "golden_fp4_fp8.npz")
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def test_every_code_decodes_as_ml_dtypes_says():
    codes = np.arange(16, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    low = e2m1.decode_codes(torch.arange(16, dtype=torch.uint8))[0::2]
    high = e2m1.decode_codes(torch.arange(16, dtype=torch.uint8) << 4)[1::2]
    assert np.array_equal(low.numpy().view(np.uint32), expected.view(np.uint32))
    assert np.array_equal(high.numpy().view(np.uint32), expected.view(np.uint32))


def test_every_scale_byte_decodes_as_ml_dtypes_says():
    expected = ALL_BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    decoded = e8m0.decode_e8m0(ALL_BYTES).numpy()
    assert np.array_equal(decoded[:255], expected[:255])
    assert np.isnan(decoded[255]) and np.isnan(expected[255])


def test_every_byte_under_every_scale_is_exact():
    values = ALL_BYTES.repeat(255, 1).reshape(255 * 16, 16)
    scales = torch.arange(255, dtype=torch.uint8).repeat_interleave(16)[:, None]
    decoded = mxfp4.decode(QuantTensor(values, scales, MXFP4, (255 * 16, 32)))
    codes = torch.stack((values & 15, values >> 4), -1).flatten(-2).numpy()
    table = np.array(e2m1.E2M1_VALUES + tuple(-v for v in e2m1.E2M1_VALUES))
    exact = table[codes] * 2.0 ** (scales.numpy().astype(np.float64) - 127)
    with np.errstate(over="ignore"):  # 6 * 2^127 is beyond fp32, as it is for everybody
        expected = exact.astype(np.float32)
    assert np.array_equal(decoded.numpy(), expected)


@pytest.mark.parametrize("rule", e8m0.SCALE_RULES)
def test_encode_equals_the_golden_file(rule):
    encoded = mxfp4.encode(torch.from_numpy(GOLDEN["x"]), rule)
    agreed = GOLDEN[f"mxfp4_{rule.upper()}_agree"]
    assert agreed.all()
    assert encoded.scales is not None
    assert np.array_equal(encoded.scales.numpy(), GOLDEN[f"mxfp4_{rule.upper()}_scale"])
    assert np.array_equal(encoded.values.numpy(), GOLDEN[f"mxfp4_{rule.upper()}_packed"])


@pytest.mark.parametrize(
    ("rule", "exponents"),
    [
        ("floor", [0, 0, 0, 0, 0, 0, 1]),
        ("even", [0, 0, 0, 0, 0, 1, 1]),
        ("rceil", [0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_scale_rules_differ_where_they_should(rule, exponents):
    amax = torch.tensor([4, 4.01, 6, 6.01, 6.99, 7, 8])
    assert (mxfp4.scale_bytes_for(amax, rule).int() - 127).tolist() == exponents


def test_ties_go_to_the_even_code_and_large_values_saturate():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e9, -0.25, -5.0])
    codes = signed_codes(ties, ties.abs(), torch.ones(1), minifloat.E2M1)
    assert e2m1.decode_codes(codes)[0::2].tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6, -0.0, -4]
    assert int(codes[9]) == 8  # -0 keeps its sign


@pytest.mark.parametrize("rule", e8m0.SCALE_RULES)
def test_zero_and_tiny_blocks_stay_finite(rule):
    weight = torch.zeros(3, 32)
    weight[1] = 2.0**-140
    weight[2, 5] = -(2.0**-126)
    decoded = mxfp4.decode(mxfp4.encode(weight, rule))
    assert torch.isfinite(decoded).all()
    assert decoded[0].abs().max() == 0
    assert decoded[2, 5] == -(2.0**-126)


@given(st.integers(0, 2**32 - 1), st.sampled_from(e8m0.SCALE_RULES), st.integers(-30, 30))
def test_encoding_what_was_decoded_changes_nothing(seed, rule, exponent):
    """Values on the grid, with a block maximum of 6, come back bit for bit under every rule."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (4, 16), generator=generator, dtype=torch.uint8)
    codes[:, 0] |= 7
    scales = torch.full((4, 1), 127 + exponent, dtype=torch.uint8)
    weight = mxfp4.decode(QuantTensor(codes, scales, MXFP4, (4, 32)))
    encoded = mxfp4.encode(weight, rule)
    assert encoded.scales is not None
    assert torch.equal(mxfp4.decode(encoded), weight)
    assert torch.equal(encoded.scales, scales)


@pytest.mark.parametrize("rule", e8m0.SCALE_RULES)
def test_signal_to_noise_of_gaussian_weights(rule):
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    error = mxfp4.decode(mxfp4.encode(weight, rule)) - weight
    assert 10 * torch.log10(weight.square().mean() / error.square().mean()) >= 13


def test_refusals():
    with pytest.raises(ValueError, match="multiples of 32, got 33"):
        mxfp4.encode(torch.zeros(2, 33))
    with pytest.raises(ValueError, match="NaN or infinity"):
        mxfp4.encode(torch.full((1, 32), float("nan")))
    with pytest.raises(ValueError, match="unknown scale rule 'round'"):
        mxfp4.encode(torch.zeros(1, 32), "round")
