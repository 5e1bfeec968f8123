"""A weight encoded on a GPU has the bytes that it has on the CPU: formats, rules, searches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant import codecs, nvfp4
from quant.e8m0 import SCALE_RULES
from quant.formats import FORMATS
from quant.quality import measure
from quant.tensor import QuantTensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

MX = [(name, {"scale_rule": rule}) for name in ("mxfp4", "mxfp8") for rule in SCALE_RULES]
SEARCHES = [(name, {"scale_search": "mse"}) for name in ("mxfp4", "mxfp8", "nvfp4")]
REST = [(name, {}) for name in ("bf16", "nvfp4", "fp8_block128", "fp8_block128_e8m0", "fp8_row")]


def hard_weight() -> Tensor:
    """Every scale of fp32 in reach, ties, both zeros, blocks of zeros, subnormals."""
    generator = torch.Generator().manual_seed(0)
    spread = 2.0 ** torch.randint(-100, 100, (1024, 1), generator=generator)
    weight = torch.randn(1024, 1536, generator=generator) * spread
    weight[:200] = torch.randint(-56, 57, (200, 1536), generator=generator) / 8
    weight[200:264] = 0.0
    weight[230, ::3] = -0.0
    bits = torch.randint(0, 1 << 23, (64, 1536), generator=generator, dtype=torch.int32)
    weight[264:328] = bits.view(torch.float32)  # subnormal
    anything = torch.randint(-(2**31), 2**31 - 1, (256, 1536), generator=generator)
    found = anything.to(torch.int32).view(torch.float32)
    weight[328:584] = torch.where(found.abs() < 1e30, found, 1.0)
    return weight


def raw(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.cpu().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(("name", "options"), MX + SEARCHES + REST, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bytes_are_those_of_the_cpu(name, options, dtype):
    weight = hard_weight().to(dtype)
    here = codecs.encode(weight, FORMATS[name], **options)
    there = codecs.encode(weight.cuda(), FORMATS[name], **options)
    assert there.values.is_cuda
    for ours, theirs in (
        (here.values, there.values),
        (here.scales, there.scales),
        (here.tensor_scale, there.tensor_scale),
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.equal(raw(ours), raw(theirs))
    assert torch.equal(codecs.decode(here), codecs.decode(there).cpu())


def test_a_tensor_scale_may_come_from_the_cpu():
    """A divisor that lies on the CPU is multiplied by its reciprocal in torch on CUDA."""
    weight = hard_weight()[-400:]
    shared = nvfp4.tensor_scale_for(weight, weight.cuda() * 3)
    assert torch.equal(shared, nvfp4.tensor_scale_for(weight * 3))
    here, there = nvfp4.encode(weight, shared), nvfp4.encode(weight.cuda(), shared)
    assert torch.equal(raw(here.scales), raw(there.scales))
    assert torch.equal(raw(here.values), raw(there.values))


@pytest.mark.parametrize("name", ["mxfp4", "fp8_block128"])
def test_quality_is_that_of_the_cpu(name):
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    stored = codecs.encode(weight, FORMATS[name])
    here = measure(weight, stored)
    there = measure(weight.cuda(), stored.to("cuda"))
    assert there.sqnr_db == pytest.approx(here.sqnr_db, rel=1e-5)
    exact = ("saturated", "vanished", "zero_blocks", "scale_exponents", "max_abs_error", "largest")
    for figure in exact:
        assert getattr(there, figure) == getattr(here, figure)


def test_a_bad_number_is_refused_there_too():
    weight = torch.zeros(128, 128, device="cuda")
    weight[5, 5] = torch.nan
    for name in FORMATS:
        if name != "bf16":
            with pytest.raises(ValueError, match="NaN or infinity"):
                codecs.encode(weight, FORMATS[name])


def test_a_stack_of_experts_is_encoded_as_each_of_them():
    weight = torch.randn(4, 256, 512, generator=torch.Generator().manual_seed(2)).cuda()
    for name in FORMATS:
        whole = codecs.encode(weight, FORMATS[name])
        assert isinstance(whole, QuantTensor) and whole.values.is_cuda
        decoded = codecs.decode(whole)
        assert torch.equal(codecs.decode(whole[2]), decoded[2])
