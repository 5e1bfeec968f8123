"""What all encoders have in common: any size and dtype, errors within bounds, options refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quant import codecs, minifloat, tiles
from quant.blocks import signed_codes
from quant.e2m1 import E2M1_VALUES
from quant.e8m0 import decode_e8m0, power_of_two_bytes
from quant.formats import BF16, FORMATS, FP8_BLOCK128, MXFP4, NVFP4, TARGETS
from quant.quality import measure, scale_values

QUANTIZED = sorted(name for name in FORMATS if name != "bf16")


def random_weight(seed: int, *shape: int, exponent: float = 0.0) -> Tensor:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return weight * 2.0**exponent


@pytest.mark.parametrize("name", QUANTIZED)
def test_tiles_do_not_change_the_bytes(name, monkeypatch):
    """Cut small, on several threads, in inference mode or not, from bf16: the same result."""
    weight = random_weight(0, 3, 260, 384).bfloat16()
    format = FORMATS[name]
    whole = codecs.encode(weight.float(), format)
    monkeypatch.setattr(tiles, "_CPU_WEIGHTS", 4096)
    threads = torch.get_num_threads()
    for mode in (False, True):
        with torch.inference_mode(mode):
            cut = codecs.encode(weight, format)
            assert torch.equal(whole.values.view(torch.uint8), cut.values.view(torch.uint8))
            assert torch.equal(whole.scales.view(torch.uint8), cut.scales.view(torch.uint8))
            assert torch.equal(codecs.decode(whole), codecs.decode(cut))
    assert torch.get_num_threads() == threads


@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(QUANTIZED),
    exponent=st.integers(-100, 100),
    rows=st.integers(1, 5),
)
def test_errors_are_bounded(seed, name, exponent, rows):
    """Half a step at the block's largest weight; where a rule clips, what it clips."""
    weight = random_weight(seed, rows, 64, exponent=exponent)
    stored = codecs.encode(weight, FORMATS[name])
    width = FORMATS[name].block[1] or 64
    scale = scale_values(stored).repeat_interleave(width, -1)[:, :64]
    if FORMATS[name].block[0] > 1:
        scale = scale.repeat_interleave(128, 0)[:rows]
    error = (codecs.decode(stored) - weight).abs().double() / scale
    largest = FORMATS[name].max_value
    half_step = largest / (6 if FORMATS[name].value_bits == 4 else 28)
    clipped = (weight.abs().double() / scale - largest).clamp(min=0)
    assert (error <= torch.maximum(clipped, torch.tensor(half_step)) * 1.00001).all()
    # The rule even clips a seventh off at most; rounding a scale to E4M3 moves it by a sixteenth.
    assert clipped.max() <= largest * 0.17


@given(st.integers(0, 2**32 - 1), st.sampled_from(QUANTIZED), st.integers(-30, 30))
def test_what_was_decoded_is_encoded_without_loss(seed, name, exponent):
    """A second conversion into the same format adds no error where the block's maximum stays."""
    weight = random_weight(seed, 4, 128, exponent=exponent)
    options = {"scale_rule": "rceil"} if name.startswith("mx") else {}
    once = codecs.encode(weight, FORMATS[name], **options)
    if once.tensor_scale is not None:
        options["tensor_scale"] = once.tensor_scale
    again = codecs.encode(codecs.decode(once), FORMATS[name], **options)
    found, before = codecs.decode(again), codecs.decode(once)
    assert (found - before).abs().max() <= before.abs().max() * (0.04 if name == "nvfp4" else 1e-6)


@pytest.mark.parametrize("grid", [minifloat.E2M1, minifloat.E4M3], ids=["e2m1", "e4m3"])
def test_rounding_is_to_the_nearest_at_every_tie(grid):
    """Every midpoint of the grid, and the fp32 numbers next to it on both sides."""
    codes = torch.arange(1 << grid.code_bits)
    values = np.array(E2M1_VALUES)
    if grid is minifloat.E4M3:
        codes = codes[:-1]  # the last one is NaN
        values = codes.to(torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    midpoints = torch.from_numpy((values[:-1] + values[1:]) / 2).float()
    below = torch.nextafter(midpoints, torch.tensor(0.0))
    above = torch.nextafter(midpoints, torch.tensor(1e9))
    even = codes[:-1] + codes[:-1] % 2
    for points, expected in ((below, codes[:-1]), (midpoints, even), (above, codes[1:])):
        assert torch.equal(minifloat.magnitude_codes_(points.clone(), grid).long(), expected)
        nearest = minifloat.nearest_(points.clone(), grid).double()
        assert np.array_equal(nearest.numpy(), values[expected.numpy()])
    signed = signed_codes(-above, above.clone(), torch.ones(1), grid).long()
    assert torch.equal(signed, codes[1:] | (1 << grid.code_bits))
    huge = torch.tensor([grid.largest * 1.01, 1e30, torch.inf])
    assert (minifloat.magnitude_codes_(huge, grid) == codes[-1]).all()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_scale_search_finds_the_least_error(name):
    """No block gets worse, and the choice is the best of the neighbours, tried one by one."""
    weight = random_weight(3, 64, 512) * torch.exp(random_weight(4, 64, 512))
    format = FORMATS[name]
    rule, searched = (
        codecs.encode(weight, format),
        codecs.encode(weight, format, scale_search="mse"),
    )
    width = format.block[1]

    def block_errors(stored) -> Tensor:
        error = (codecs.decode(stored) - weight).double()
        return error.square().unflatten(-1, (-1, width)).sum(-1)

    before, after = block_errors(rule), block_errors(searched)
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < before.sum() * 0.999
    better_than_neighbours(weight, rule, after, format)


def better_than_neighbours(weight, rule, after, format) -> None:
    """`after`, the error of each block, is that of the best code next to the rule's."""
    width = format.block[1]
    groups = weight.unflatten(-1, (-1, width)).double()
    raw = rule.scales.view(torch.uint8).int()
    steps = (-1, 0, 1) if format is not NVFP4 else (-2, -1, 0, 1, 2, 3, 4, 5)
    grid = minifloat.E2M1 if format.value_bits == 4 else minifloat.E4M3
    best = torch.full(after.shape, torch.inf, dtype=torch.float64)
    for step in steps:
        moved = (raw + step).clamp(8, 126) if format is NVFP4 else (raw + step).clamp(0, 254)
        moved = moved.to(torch.uint8)
        factor = (
            moved.view(torch.float8_e4m3fn).float() * rule.tensor_scale
            if format is NVFP4
            else decode_e8m0(moved)
        )[..., None]
        near = minifloat.nearest_((groups.abs() / factor).float(), grid).double() * factor
        best = torch.minimum(best, (near - groups.abs()).square().sum(-1))
    assert torch.allclose(after, best, rtol=1e-4, atol=1e-12)


def test_power_of_two_scales_are_the_next_ones_up():
    scales = torch.tensor([1.0, 1.0001, 0.75, 2.0**-127, 2.0**-127 * 1.5, 2.0**-140, 3e38])
    found = decode_e8m0(power_of_two_bytes(scales)).double()
    expected = torch.exp2(torch.ceil(torch.log2(scales.double()))).clamp(2.0**-127, 2.0**127)
    assert torch.equal(found, expected)


def test_targets_are_formats_that_can_be_encoded():
    weight = random_weight(5, 130, 256)
    for name, format in TARGETS.items():
        stored = codecs.encode(weight, format)
        least = {4: 18, 8: 30, 16: 40}[format.value_bits]
        assert measure(weight, stored).sqnr_db > least, name


def test_options_that_a_format_does_not_have_are_refused():
    weight = random_weight(6, 128, 128)
    for format, options, message in (
        (BF16, {"scale_rule": "even"}, "bf16 has no scale rule"),
        (FP8_BLOCK128, {"scale_search": "mse"}, "fp8_block128 has no scale search"),
        (MXFP4, {"tensor_scale": torch.tensor(1.0)}, "mxfp4 has no tensor scale"),
        (NVFP4, {"scale_search": "best"}, "unknown scale search 'best', expected one of mse"),
        (MXFP4, {"scale_search": "best"}, "unknown scale search 'best', expected one of mse"),
    ):
        with pytest.raises(ValueError, match=message):
            codecs.encode(weight, format, **options)
    with pytest.raises(ValueError, match="not empty, got shape"):
        codecs.encode(torch.zeros(0, 32), MXFP4)
    with pytest.raises(ValueError, match="not empty, got shape"):
        codecs.encode(torch.zeros(32), MXFP4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", QUANTIZED)
def test_one_bad_number_anywhere_is_refused(name, value, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_WEIGHTS", 4096)
    weight = random_weight(7, 256, 256).bfloat16()
    weight[200, 131] = value
    with pytest.raises(ValueError, match="cannot encode NaN or infinity as"):
        codecs.encode(weight, FORMATS[name])
