"""The experts' format: tensor names decide, and what we cannot read is named."""

import pytest

from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.quant_config import expert_format
from quant.formats import MXFP4

EXPERTS = "model.layers.0.mlp.experts."


@pytest.mark.parametrize(
    "name", [EXPERTS + "gate_up_proj_blocks", "block.3.mlp.mlp1_weight.blocks"]
)
@pytest.mark.parametrize(
    "config",
    [{}, {"quantization_config": {"quant_method": "mxfp4"}},
     {"quantization_config": {"quant_method": "gptq", "bits": 4}}],
)  # fmt: skip
def test_blocks_are_mxfp4_whatever_the_config_says(name, config):
    """A mirror of gpt-oss-20b had quant_method edited to gptq; its tensors were as published."""
    assert expert_format(config, ["lm_head.weight", name]) is MXFP4


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        ({}, EXPERTS + "gate_up_proj", "experts without quantization are not supported"),
        ({}, EXPERTS + "7.down_proj.weight", "experts without quantization are not supported"),
        ({}, "block.0.mlp.mlp1_weight", "experts without quantization are not supported"),
        ({}, EXPERTS + "7.up_proj.weight_packed", "compressed-tensors .packed. experts are not"),
        ({}, EXPERTS + "7.up_proj.qweight", "GPTQ or AWQ experts are not supported"),
        ({}, EXPERTS + "7.up_proj.weight_scale_inv", "FP8 experts in blocks are not supported"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            EXPERTS + "gate_up_proj",
            "quantization 'bitsandbytes' is not supported",
        ),
        (
            {"quantization_config": {"quant_method": ["fp8"]}},
            EXPERTS + "gate_up_proj",
            "quantization .'fp8'. is not supported",
        ),
    ],
)
def test_other_formats_are_named(config, name, message):
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        expert_format(config, [name])
    assert "experts in MXFP4 as published" in caught.value.hint


def test_a_quantization_config_that_is_no_object():
    with pytest.raises(CheckpointError, match="quantization_config: expected a JSON object, found"):
        expert_format({"quantization_config": "mxfp4"}, [EXPERTS + "gate_up_proj"])
