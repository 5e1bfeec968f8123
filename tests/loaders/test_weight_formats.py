"""Weights in other formats than MXFP4: joined, decoded where they must be, checked."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from loaders.checkpoint import open_folder
from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.logical import logical_tensors
from loaders.names.table import NameTable, match_names, stacked
from loaders.weights import load_mapped, load_staged
from moe_runtime.models.registry import plan_model
from quant.codecs import CODECS, decode
from quant.tensor import QuantTensor
from tests.oracles.expert_formats import write_with_experts
from tests.oracles.tiny_gpt_oss import write_json, write_tiny_gpt_oss

CPU = torch.device("cpu")
SHAPE = {"layers": 1, "d": 32, "f": 32, "heads": 2, "kv": 1, "hd": 16, "experts": 2, "topk": 1}
PATHS = {"mapped": load_mapped, "staged": load_staged}
DOWN = "model.layers.0.mlp.experts.down_proj"
HALVES = (("experts.{e}.gate.weight", "F D"), ("experts.{e}.up.weight", "F D"))
STACKED = NameTable({"gate_up": stacked("E 2F D", *HALVES)})


def uncounted(nbytes):
    """Progress that nobody looks at."""


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize(
    ("format", "part", "value", "message"),
    [
        ("mxfp8", "_blocks", 0xFF, r"_blocks: found an FP8 NaN at \(1, 31, 31\) in model.safe"),
        ("fp8_block128", "_blocks", 0x7F, r"_blocks: found an FP8 NaN at \(1, 31, 31\)"),
        ("nvfp4", "_scales", 0x7F, r"_scales: found an FP8 NaN at \(1, 31, 1\)"),
        ("mxfp8", "_scales", 0xFF, r"_scales: found scale byte 255 \(NaN\) at \(1, 31, 0\)"),
        ("fp8_row", "_scales", float("inf"), r"_scales: found inf at \(1, 31, 0\)"),
        (
            "nvfp4",
            "_tensor_scale",
            0.0,
            r"_tensor_scale: found 0.0 at \(\) in model.safetensors, 1",
        ),
    ],
)
def test_bad_values_are_named(tmp_path, how, format, part, value, message):
    write_with_experts(tmp_path, format, **SHAPE)
    tensors = load_file(tmp_path / "model.safetensors")
    flat = tensors[DOWN + part].view(-1)
    (flat.view(torch.uint8) if isinstance(value, int) else flat)[-1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_folder(tmp_path)
    with pytest.raises(CheckpointError, match=DOWN + message):
        PATHS[how](checkpoint, plan_model(checkpoint).plan, CPU, uncounted)


def write_single_experts(folder, format, rows, columns):
    """Two experts, gate and up apart; returns [E, 2F, D] as the codes have it."""
    torch.manual_seed(0)
    tensors, held = {}, []
    for name in (f"experts.{e}.{half}" for e in range(2) for half in ("gate", "up")):
        weight = CODECS[format].encode(torch.randn(rows, columns) * (1 + len(held)))
        values, scales = ("_packed", "_scale") if format == "nvfp4" else ("", "_scale_inv")
        tensors[f"{name}.weight{values}"] = weight.values
        if weight.scales is not None:
            tensors[f"{name}.weight{scales}"] = weight.scales
        if weight.tensor_scale is not None:  # compressed-tensors stores what divides
            tensors[f"{name}.weight_global_scale"] = (1 / weight.tensor_scale).reshape(1)
        held.append(decode(weight))
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "x"})
    return torch.cat(held).view(2, 2 * rows, columns)


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize(
    ("format", "rows", "kept"),
    [
        ("fp8_block128", 128, True),
        ("fp8_block128", 96, False),  # the second block of rows would begin inside the first
        ("mxfp8", 96, True),
        ("bf16", 96, True),
        ("nvfp4", 96, False),  # each has a scale of its own
    ],
)
def test_single_experts_become_one_stack(tmp_path, how, format, rows, kept):
    expected = write_single_experts(tmp_path, format, rows, 160)
    checkpoint = open_folder(tmp_path)
    dims = {"E": 2, "F": rows, "2F": 2 * rows, "D": 160}
    plan = match_names(logical_tensors(checkpoint), STACKED, dims, 0)
    assert plan.total_bytes == checkpoint.total_bytes
    weight = PATHS[how](checkpoint, plan, CPU, uncounted)["gate_up"]
    assert weight.shape == expected.shape
    assert isinstance(weight, QuantTensor) == (kept and format != "bf16")
    found = decode(weight) if isinstance(weight, QuantTensor) else weight.float()
    if format == "nvfp4":  # 1 / (1 / scale) is not always scale
        torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)
    else:
        assert torch.equal(found, expected)


def test_single_experts_of_a_family_that_has_stacked_ones(tmp_path):
    tensors = write_tiny_gpt_oss(tmp_path, shards=1, **SHAPE)
    for part in ("blocks", "scales", "bias"):
        del tensors[f"{DOWN}_{part}"]
    for expert in range(2):
        tensors[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"] = torch.zeros(32, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"one by one \(model.layers.0.mlp.experts.0.d"):
        plan_model(open_folder(tmp_path))
