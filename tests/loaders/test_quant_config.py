"""The experts' format: the tensors decide, and what we cannot read is named."""

import pytest

from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.logical import LogicalTensor
from loaders.quant_config import check_quantization
from quant.formats import MXFP4, NVFP4

EXPERTS = "model.layers.0.mlp.experts."


def weight(name, format=None):
    return LogicalTensor(name, (2, 32, 32), format, "U8" if format else "BF16", {})


@pytest.mark.parametrize("name", [EXPERTS + "gate_up_proj", "block.3.mlp.mlp1_weight"])
@pytest.mark.parametrize("format", [MXFP4, NVFP4])
def test_what_the_tensors_hold_decides(name, format):
    """A mirror of gpt-oss-20b had quant_method edited to gptq; its tensors were as published."""
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    check_quantization(config, [weight("lm_head.weight"), weight(name, format)])


@pytest.mark.parametrize("method", ["mxfp4", "compressed-tensors", "modelopt", "fp8"])
def test_methods_that_are_read(method):
    check_quantization({"quantization_config": {"quant_method": method}}, [weight("lm_head")])
    check_quantization({}, [weight(EXPERTS + "7.down_proj.weight")])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("bitsandbytes", "quantization 'bitsandbytes' is not supported"),
        (["fp8"], "quantization .'fp8'. is not supported"),
    ],
)
def test_other_methods_are_named(method, message):
    config = {"quantization_config": {"quant_method": method}}
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        check_quantization(config, [weight(EXPERTS + "gate_up_proj"), weight("head", MXFP4)])
    assert "experts in bf16, mxfp4, mxfp8, nvfp4 and fp8" in caught.value.hint


def test_a_quantization_config_that_is_no_object():
    with pytest.raises(CheckpointError, match="quantization_config: expected a JSON object, found"):
        check_quantization({"quantization_config": "mxfp4"}, [weight(EXPERTS + "gate_up_proj")])
