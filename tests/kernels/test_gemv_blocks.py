"""Dense projections in FP8 blocks against the twin of kernels/gemv.py."""

from contextlib import nullcontext

import pytest
import torch

from kernels.decode_blocks import decode_blocks
from kernels.gemv import gemv
from kernels.reference import gemv as twin
from quant.codecs import decode, encode
from quant.formats import FP8_BLOCK128, FP8_BLOCK128_E8M0
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def on_device(device):
    """Tensors are made where kernels run: on a GPU, or in the interpreter."""
    with torch.device(device) if device.type == "cuda" else nullcontext():
        yield


@pytest.mark.parametrize("format", [FP8_BLOCK128, FP8_BLOCK128_E8M0], ids=lambda f: f.name)
@pytest.mark.parametrize(("rows", "columns"), [(136, 160), (20, 1168), (16, 48)])
def test_against_the_twin(rows, columns, format):
    g = torch.Generator(torch.get_default_device()).manual_seed(rows)
    x, norm = torch.randn(columns, generator=g), torch.randn(columns, generator=g)
    # Blocks of different sizes, so that a wrong scale shows.
    sizes = torch.rand(rows, 1, generator=g) * torch.rand(1, columns, generator=g)
    weight = encode(torch.randn(rows, columns, generator=g) * sizes, format)
    start = torch.randn(rows, generator=g)
    for options in ({}, {"norm": norm, "eps": 1e-5}, {"add": True}):
        ours, expected = (run(x, weight, start.clone(), **options) for run in (gemv, twin.gemv))
        assert_close(ours, expected, "gemv")


@pytest.mark.parametrize("format", [None, FP8_BLOCK128_E8M0], ids=["fp32", "fp8"])
@pytest.mark.parametrize("rows", [128, 12])
def test_groups_of_rows(format, rows):
    """Each of three groups times its own columns; a group of 12 rows ends within a block of 8."""
    g = torch.Generator(torch.get_default_device()).manual_seed(rows)
    x, weight = torch.randn(3 * 160, generator=g), torch.randn(3 * rows, 160, generator=g)
    weight *= torch.rand(3 * rows, 1, generator=g)
    stored = weight if format is None else encode(weight, format)
    ours, expected = (run(x, stored, torch.empty(3 * rows), groups=3) for run in (gemv, twin.gemv))
    assert_close(ours, expected, "gemv")
    plain = weight if format is None else decode(stored)
    wanted = [plain[i * rows : (i + 1) * rows] @ x[i * 160 : (i + 1) * 160] for i in range(3)]
    assert_close(expected, torch.cat(wanted), "gemv")


@pytest.mark.parametrize("format", [FP8_BLOCK128, FP8_BLOCK128_E8M0], ids=lambda f: f.name)
def test_decoded_blocks_are_the_codecs(format):
    weight = encode(
        torch.randn(140, 528, generator=torch.Generator(torch.get_default_device()).manual_seed(1)),
        format,
    )
    assert torch.equal(decode_blocks(weight, torch.empty(140, 528)), decode(weight))
