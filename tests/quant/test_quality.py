"""Figures of quality against sums written out by hand, and how they merge."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from quant import codecs, tiles
from quant.formats import BF16, FORMATS, FP8_BLOCK128, FP8_ROW, MXFP4, NVFP4
from quant.quality import TensorQuality, measure, merge, scale_values
from quant.tensor import QuantTensor

QUANTIZED = sorted(name for name in FORMATS if name != "bf16")


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(64, 256), (3, 130, 320)], ids=str)
@pytest.mark.parametrize("name", QUANTIZED)
def test_sums_and_extremes(name, shape, monkeypatch):
    weight = random_weight(*shape)
    weight[..., :32] = 0
    stored = codecs.encode(weight, FORMATS[name])
    error = (codecs.decode(stored) - weight).double()
    whole = measure(weight, stored)
    monkeypatch.setattr(tiles, "_CPU_WEIGHTS", 4096)
    for found in (whole, measure(weight, stored)):  # in one tile, and in many
        assert found.weights == weight.numel()
        assert found.signal == pytest.approx(float(weight.double().square().sum()), rel=1e-6)
        assert found.noise == pytest.approx(float(error.square().sum()), rel=1e-6)
        assert found.largest == float(weight.abs().max())
        assert found.max_abs_error == float(error.abs().max())
        assert found.blocks == stored.scales.numel() == sum(found.scale_exponents.values())
        assert found.vanished == int(((codecs.decode(stored) == 0) & (weight != 0)).sum())
        expected = 10 * math.log10(found.signal / found.noise)
        assert found.sqnr_db == pytest.approx(expected, rel=1e-9)
        rows = weight.shape[:-1].numel()
        in_zero_columns = {"mxfp4": rows, "mxfp8": rows, "nvfp4": 2 * rows}
        assert found.zero_blocks == in_zero_columns.get(name, 0)
        assert not found.exact and found.zero_scales == found.nan_scales == 0


def test_weights_past_the_end_of_their_block_are_counted():
    weight = torch.full((2, 64), 0.5)
    weight[0, 3], weight[0, 9], weight[1, 40] = 7.9, -7.5, 6.9
    floor = measure(weight, codecs.encode(weight, MXFP4, scale_rule="floor"))
    assert floor.saturated == 3 and floor.saturated_share == 3 / 128
    assert floor.max_abs_error == pytest.approx(1.9, rel=1e-6)
    even = measure(weight, codecs.encode(weight, MXFP4, scale_rule="even"))
    assert even.saturated == 1
    assert measure(weight, codecs.encode(weight, MXFP4, scale_rule="rceil")).saturated == 0
    for format in (FP8_BLOCK128, FP8_ROW):
        stored = codecs.encode(random_weight(300, 300), format)
        assert measure(random_weight(300, 300), stored).saturated == 0


def test_scale_exponents():
    weight = torch.zeros(3, 32)
    weight[0], weight[1], weight[2] = 6.0, 6.0 * 2.0**-9, 3.0 * 2.0**20
    found = measure(weight, codecs.encode(weight, MXFP4))
    assert found.scale_exponents == {0: 1, -9: 1, 19: 1}
    assert found.exact and found.sqnr_db is None and found.relative_mse == 0
    scales = scale_values(codecs.encode(weight, NVFP4))
    assert scales[2, 0] == pytest.approx(2.0**19, rel=1e-6)
    with pytest.raises(ValueError, match="bf16 has no scales"):
        scale_values(codecs.encode(weight, BF16))


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-73, 2.0**73, 2.0**123])
@pytest.mark.parametrize("name", ["fp8_row", "mxfp8"])
def test_squares_that_leave_fp32(name, size):
    """Finite weights have finite figures, and what is not exact does not pass for it."""
    weight = random_weight(8, 64) * size
    found = measure(weight, codecs.encode(weight, FORMATS[name]))
    expected = measure(weight / size, codecs.encode(weight / size, FORMATS[name]))
    assert found.signal == pytest.approx(float(weight.double().square().sum()), rel=1e-6)
    assert not found.exact and found.sqnr_db == pytest.approx(expected.sqnr_db, rel=1e-6)


def test_bad_scales_are_counted():
    values = torch.full((2, 32), 0x11, dtype=torch.uint8)
    scales = torch.tensor([[127, 255], [127, 126]], dtype=torch.uint8)
    found = measure(torch.ones(2, 64), QuantTensor(values, scales, MXFP4, (2, 64)))
    assert found.nan_scales == 1 and found.sqnr_db is None
    stored = codecs.encode(torch.ones(2, 64), NVFP4)
    stored.scales[0, 1] = 0.0
    found = measure(torch.ones(2, 64), stored)
    assert found.zero_scales == 1 and found.zero_blocks == 1 and found.vanished == 16


def test_merged_figures_are_those_of_both():
    first, second = random_weight(32, 128), random_weight(64, 128, seed=1) * 3
    both = torch.cat((first, second))
    parts = [measure(part, codecs.encode(part, MXFP4)) for part in (first, second)]
    whole, merged = measure(both, codecs.encode(both, MXFP4)), merge(parts)
    assert merged.noise == pytest.approx(whole.noise, rel=1e-6)
    assert merged.scale_exponents == whole.scale_exponents
    for figure in ("weights", "blocks", "saturated", "vanished", "largest", "max_abs_error"):
        assert getattr(merged, figure) == getattr(whole, figure)
    assert merge([]) == TensorQuality() and merge([]).sqnr_db is None
    assert TensorQuality.from_dict(json.loads(json.dumps(whole.as_dict()))) == whole


def test_plain_numbers_and_vectors():
    vector = random_weight(1000)
    found = measure(vector, codecs.encode(vector, BF16))
    assert found.weights == 1000 and found.blocks == 0 and 50 < found.sqnr_db < 60
    before = vector.clone()
    shifted = measure(vector + 0.5, QuantTensor(vector, None, BF16, (1000,)))
    assert shifted.max_abs_error == pytest.approx(0.5, rel=1e-6) and torch.equal(vector, before)
    with pytest.raises(ValueError, match=r"the weight is \(1000,\), the stored form \(4, 32\)"):
        measure(vector, codecs.encode(torch.ones(4, 32), MXFP4))
