"""What the tests of `convert` share: sources, a conversion, and all that a folder holds."""

import torch

from loaders.checkpoint import open_folder
from loaders.logical import logical_tensors, read_tensor
from moe_runtime.conversion.convert import convert
from moe_runtime.conversion.options import TARGETS, ConversionOptions
from quant import formats
from quant.codecs import decode, encode
from quant.tensor import QuantTensor
from tests.oracles.tiny_moe import LAYERS, config, tiny_tensors, write_tiny_moe

QUANTIZED = [target for target in TARGETS if target != "bf16"]
EXPERT = "model.layers.1.mlp.experts.2."


def run(source, to="mxfp4", name="out", **options):
    """Convert into a folder beside the source; returns it and the report."""
    output = source.parent / name
    report = convert(str(source), output, ConversionOptions(to, **options), progress=False)
    return output, report


def read_all(folder):
    """Every weight of a folder by name: numbers in fp32, or a QuantTensor."""
    checkpoint = open_folder(folder)
    return {t.name: read_tensor(checkpoint, t) for t in logical_tensors(checkpoint)}


def numbers(weight):
    return decode(weight) if isinstance(weight, QuantTensor) else weight


def deepseek_source(folder, *, mtp=True):
    """The tiny MoE with FP8 blocks in attention and experts, and a layer of MTP behind the last."""
    tensors = tiny_tensors(layers=LAYERS + mtp)
    published = {}
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            stored = encode(weight, formats.FP8_BLOCK128)
            published[name], published[name + "_scale_inv"] = stored.values, stored.scales
        else:
            published[name] = weight
    published["model.layers.0.self_attn.q_proj.input_scale"] = torch.ones(1)
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write_tiny_moe(folder, published, settings=config(quantization_config=fp8))
    return tensors
