"""The tiny GPT-OSS with its experts, or its dense matrices, in another number format.

Stacked names as published: X_blocks, X_scales and for NVFP4 X_tensor_scale; bf16 as transformers
writes it, [E, columns, rows].
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.codecs import CODECS, decode
from quant.formats import BF16, MXFP4
from quant.tensor import QuantTensor
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss

EXPERT_FORMATS = tuple(CODECS)
_FILE = "model.safetensors"
_DENSE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "lm_head")


def write_with_experts(folder: Path, format: str, **shape: int) -> dict[str, Tensor]:
    """A tiny checkpoint in one file; returns the experts' weights as it holds them, in fp32.

    format: a name of quant.formats
    shape:  arguments of write_tiny_gpt_oss
    """
    tensors = write_tiny_gpt_oss(folder, shards=1, **shape)
    held = {}
    for blocks in [name for name in tensors if name.endswith("_blocks")]:
        name = blocks.removesuffix("_blocks")
        values, scales = tensors.pop(blocks), tensors.pop(name + "_scales")
        columns = 32 * values.shape[-2]
        published = QuantTensor(values.flatten(-2), scales, MXFP4, (*values.shape[:2], columns))
        # 0.93: block maxima that are no powers of two, so that scales matter
        encoded = CODECS[format].encode(decode(published) * 0.93)
        held[name] = decode(encoded)
        tensors |= stored_parts(name, encoded)
    save_file(tensors, folder / _FILE)
    return held


def stored_parts(name: str, weight: QuantTensor) -> dict[str, Tensor]:
    """Stacked experts under the names in which they are written."""
    if weight.format is BF16:
        return {name: weight.values.mT.contiguous()}
    assert weight.scales is not None
    parts = {name + "_blocks": weight.values, name + "_scales": weight.scales}
    if weight.tensor_scale is not None:
        parts[name + "_tensor_scale"] = weight.tensor_scale
    return parts


def quantize_dense(folder: Path, ending: str) -> dict[str, Tensor]:
    """Put attention and head of a checkpoint in one file into FP8 blocks; returns them in fp32.

    ending: of the names of scales, "weight_scale" or "weight_scale_inv"
    """
    tensors = load_file(folder / _FILE)
    held = {}
    for name in [n for n in tensors if n.endswith(tuple(f"{d}.weight" for d in _DENSE))]:
        encoded = CODECS["fp8_block128"].encode(tensors[name].float())
        assert encoded.scales is not None
        tensors[name] = encoded.values
        tensors[name.removesuffix("weight") + ending] = encoded.scales
        held[name] = decode(encoded)
    save_file(tensors, folder / _FILE)
    return held
