"""FP8 E4M3: every code, the golden file, edges of blocks, and what must be refused."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from quant import codecs, fp8
from quant.e8m0 import decode_e8m0
from quant.formats import BF16, FORMATS, FP8_BLOCK128, FP8_ROW
from quant.tensor import QuantTensor

GOLDEN = np.load(Path(__file__).parents[1] / "vectors" / "golden_fp4_fp8.npz")


def test_every_code_decodes_as_ml_dtypes_says():
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for scale in (1.0, 0.37):
        stored = QuantTensor(
            codes.view(torch.float8_e4m3fn)[None], torch.tensor([[scale]]), FP8_ROW, (1, 256)
        )
        decoded = codecs.decode(stored)[0].numpy()
        assert np.array_equal(decoded, expected * np.float32(scale), equal_nan=True)


def test_encode_equals_the_golden_file():
    encoded = fp8.encode_block128(torch.from_numpy(GOLDEN["fp8_w"]))
    assert encoded.scales is not None
    assert np.array_equal(encoded.values.view(torch.uint8).numpy(), GOLDEN["fp8_fp32_codes"])
    assert np.allclose(encoded.scales.numpy(), GOLDEN["fp8_fp32_scale"], rtol=1.2e-7, atol=0)


def test_e8m0_scales_equal_the_golden_file():
    encoded = fp8.encode_block128_e8m0(torch.from_numpy(GOLDEN["fp8_w"]))
    assert encoded.scales is not None
    assert np.array_equal(encoded.values.view(torch.uint8).numpy(), GOLDEN["fp8_ue8m0_codes"])
    assert np.array_equal(decode_e8m0(encoded.scales).numpy(), GOLDEN["fp8_ue8m0_scale"])
    powers = fp8.encode_block128_e8m0(torch.full((1, 128), 448.0 * 2.0**-9))
    assert powers.scales is not None
    assert powers.scales.tolist() == [[127 - 9]]  # a power of two already: not raised
    assert torch.equal(codecs.decode(powers), torch.full((1, 128), 448.0 * 2.0**-9))


@pytest.mark.parametrize("rows", [1, 127, 128, 130])
@pytest.mark.parametrize("columns", [64, 128, 320])
def test_partial_blocks_have_their_own_scales(rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    encoded = fp8.encode_block128(weight)
    assert encoded.scales is not None
    assert encoded.scales.shape == (-(-rows // 128), -(-columns // 128))
    corner = weight[(rows - 1) // 128 * 128 :, (columns - 1) // 128 * 128 :]
    assert encoded.scales[-1, -1] == corner.abs().max() / 448
    error = (fp8.decode_block128(encoded) - weight).abs()
    assert (error <= weight.abs() * 2**-4 + encoded.scales.max() * 2**-10).all()


@pytest.mark.parametrize("format", [FP8_BLOCK128, FP8_ROW, BF16], ids=lambda f: f.name)
def test_signal_to_noise_of_gaussian_weights(format):
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    error = codecs.decode(codecs.CODECS[format.name].encode(weight)) - weight
    assert 10 * torch.log10(weight.square().mean() / error.square().mean()) >= 30


def test_zero_blocks_and_the_largest_value():
    weight = torch.zeros(2, 128)
    weight[1, 3] = -1000.0
    encoded = fp8.encode_row(weight)
    assert encoded.scales is not None and encoded.scales[0, 0] == 1.0
    assert fp8.decode_row(encoded)[1, 3] == -1000.0
    assert fp8.decode_row(encoded)[0].abs().max() == 0


def test_what_is_not_finite_is_refused():
    for encode in (fp8.encode_row, fp8.encode_block128):
        with pytest.raises(ValueError, match="NaN or infinity"):
            encode(torch.tensor([[1.0, float("inf")]]))


def test_every_format_has_a_codec():
    assert set(codecs.CODECS) == set(FORMATS)


def test_one_expert_of_a_stack_decodes_like_the_stack():
    weight = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(2))
    for name in codecs.CODECS:
        encoded = codecs.CODECS[name].encode(weight)
        assert torch.equal(codecs.decode(encoded[1]), codecs.decode(encoded)[1])
