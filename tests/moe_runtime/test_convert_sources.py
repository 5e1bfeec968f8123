"""`convert` from the forms of others: DeepSeek, ModelOpt, GPT-OSS in both layouts, stacks."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from loaders.checkpoint import open_folder
from loaders.errors import CheckpointError, UnsupportedModelError
from moe_runtime.conversion.work import divisible_scale
from moe_runtime.models.registry import plan_model
from quant import formats
from quant.codecs import decode, encode
from quant.nvfp4 import tensor_scale_for
from quant.tensor import QuantTensor
from tests.moe_runtime.convert_helpers import deepseek_source, numbers, read_all, run
from tests.oracles.tiny_deepseek import Sizes, write_tiny_deepseek
from tests.oracles.tiny_deepseek_v4 import write_tiny_deepseek_v4
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss
from tests.oracles.tiny_moe import (
    LAYERS,
    config,
    stacked,
    tiny_tensors,
    write_tiny_moe,
)


@pytest.fixture
def source(tmp_path):
    write_tiny_moe(tmp_path / "source")
    return tmp_path / "source"


def test_stacked_experts_become_the_same_files(source, tmp_path):
    output, _ = run(source, "nvfp4")
    write_tiny_moe(tmp_path / "stacked", stacked(tiny_tensors()))
    other, report = run(tmp_path / "stacked", "nvfp4", name="from-stacked")
    ours, theirs = read_all(output), read_all(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(numbers(ours[n]), numbers(theirs[n])) for n in ours)
    converted = [r["name"] for r in report["tensors"] if r["action"] == "converted"]
    assert len(converted) == 2 * LAYERS and converted[0].endswith(("gate_up_proj", "down_proj"))


def test_stacked_experts_of_unknown_orientation_are_refused(tmp_path):
    tensors = {n: t.mT if t.dim() == 3 else t for n, t in stacked(tiny_tensors()).items()}
    write_tiny_moe(tmp_path / "source", tensors)
    with pytest.raises(UnsupportedModelError, match="stacked experts of shape"):
        run(tmp_path / "source")


def test_fp8_source_dense_is_copied_and_mtp_stays(tmp_path):
    tensors = deepseek_source(tmp_path / "source")
    output, report = run(tmp_path / "source", "nvfp4")
    before, found = read_all(tmp_path / "source"), read_all(output)
    assert found.keys() == tensors.keys()
    for name, weight in found.items():
        is_expert = ".experts." in name and "layers.2." not in name
        if is_expert:
            assert weight.format is formats.NVFP4
        else:
            assert torch.equal(numbers(weight), numbers(before[name])), name
    actions = {r["name"]: (r["action"], r["reason"]) for r in report["tensors"]}
    scale = "model.layers.0.self_attn.q_proj.input_scale"
    assert actions[scale] == ("skipped", "scale of quantized activations")
    assert actions["model.layers.2.mlp.experts.0.up_proj.weight"][1].startswith("multi-token")
    quantization = json.loads((output / "config.json").read_text())["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    targets = quantization["config_groups"]["group_1"]["targets"]
    assert r"re:^model\.layers\.2\.mlp\.experts\.\d+\.up_proj$" in targets
    assert r"re:^model\.layers\.\d+\.self_attn\.q_proj$" in targets
    # transformers takes the first group that names experts for all of them
    targets = quantization["config_groups"]["group_0"]["targets"]
    assert targets[0] == "Linear"
    assert r"re:^model\.layers\.1\.mlp\.experts\.\d+\.up_proj$" in targets


def test_fp8_source_to_bf16_has_nothing_quantized(tmp_path):
    deepseek_source(tmp_path / "source")
    output, _ = run(tmp_path / "source", "bf16")
    before, found = read_all(tmp_path / "source"), read_all(output)
    assert not any(isinstance(weight, QuantTensor) for weight in found.values())
    for name, weight in found.items():
        assert torch.equal(weight, numbers(before[name]).bfloat16()), name
    assert "quantization_config" not in json.loads((output / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "to"),
    [
        ("deepseek_v3 fp8_e8m0", "mxfp4"),
        ("deepseek_v32 fp8", "nvfp4"),
        ("deepseek_v32 fp8", "fp8-block"),
        ("v4 fp4", "mxfp4"),
        ("v4 fp4", "bf16"),
        ("v4 fp8", "nvfp4"),
        ("v4 fp8", "fp8-block"),
    ],
)
def test_families_of_deepseek(tmp_path, family, to):
    """From the published forms, MTP and all: experts as the codec makes them, the rest exact."""
    source = tmp_path / "source"
    source.mkdir()
    name, form = family.split()
    if name == "v4":
        write_tiny_deepseek_v4(source, expert_dtype=form)
    else:
        write_tiny_deepseek(source, Sizes(family=name), format=form)
    format = formats.TARGETS[to]
    output, report = run(source, to, allow=frozenset({"requantize"}))
    before, found = read_all(source), read_all(output)
    assert found.keys() == before.keys()
    roles = {record["name"]: record for record in report["tensors"]}
    for weight_name, weight in before.items():
        record = roles[weight_name]
        if record["action"] == "converted":
            options = {}
            if to == "nvfp4":
                options["tensor_scale"] = found[weight_name].tensor_scale
            expected = decode(encode(numbers(weight), format, **options))
        else:
            expected = numbers(weight)
        assert torch.equal(numbers(found[weight_name]).float(), expected.float()), weight_name
    experts = [r for r in report["tensors"] if r["component"] == "experts"]
    assert len(experts) > 50
    assert {r["format"] for r in experts} <= {format.name, "fp8_block128_e8m0"}
    written = json.loads((output / "config.json").read_text())
    assert "expert_dtype" not in written


def modelopt_source(folder, algorithm):
    """The tiny MoE with experts as ModelOpt writes them; returns the numbers they stand for."""
    published, expected = {}, {}
    for name, weight in tiny_tensors().items():
        if ".experts." not in name:
            published[name] = weight
            continue
        base = name.removesuffix("weight")
        if algorithm == "FP8":  # one scale a tensor
            scale = weight.abs().max().float() / 448
            published[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            published[base + "weight_scale"] = scale
            expected[name] = published[name].float() * scale
        else:
            stored = encode(weight, formats.NVFP4, tensor_scale=torch.tensor(2.0**-10))
            published[name], published[base + "weight_scale"] = stored.values, stored.scales
            published[base + "weight_scale_2"] = stored.tensor_scale
            expected[name] = decode(stored)
        published[base + "input_scale"] = torch.tensor(1.0)
    claim = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    write_tiny_moe(folder, published, settings=config(quantization_config=claim))
    return expected


@pytest.mark.parametrize(
    ("algorithm", "to"),
    [("FP8", "fp8-channel"), ("FP8", "mxfp4"), ("FP8", "bf16"), ("NVFP4", "nvfp4"),
     ("NVFP4", "fp8-block"), ("NVFP4", "bf16")],
)  # fmt: skip
def test_from_modelopt(tmp_path, algorithm, to):
    """Its own format in the form that transformers opens, and each other one from its numbers."""
    expected = modelopt_source(tmp_path / "source", algorithm)
    output, report = run(tmp_path / "source", to, allow=frozenset({"requantize"}))
    found = read_all(output)
    same_format = to in ("fp8-channel", "nvfp4")
    for name, weight in expected.items():
        converted = weight if same_format else decode(encode(weight, formats.TARGETS[to]))
        assert torch.equal(numbers(found[name]).float(), converted), name
    assert report["totals"]["converted"] == (0 if same_format else len(expected))
    skipped = {r["reason"] for r in report["tensors"] if r["action"] == "skipped"}
    assert skipped == {"scale of quantized activations"}
    written = json.loads((output / "config.json").read_text()).get("quantization_config", {})
    assert written.get("quant_method") == (None if to == "bf16" else "compressed-tensors")


@pytest.mark.parametrize("to", ["nvfp4", "mxfp8", "fp8-block", "fp8-channel", "bf16"])
def test_gpt_oss_in_every_format(tmp_path, to):
    write_tiny_gpt_oss(tmp_path / "source", layers=2, d=160, f=96, experts=4)
    allow = frozenset({"requantize"})
    output, _ = run(tmp_path / "source", to, allow=allow)
    before, found = read_all(tmp_path / "source"), read_all(output)
    assert found.keys() == before.keys()
    for name, weight in before.items():
        if not isinstance(weight, QuantTensor):
            assert torch.equal(found[name], weight)
            continue
        again = encode(decode(weight), formats.TARGETS[to])
        if to == "nvfp4":
            scale = divisible_scale(tensor_scale_for(decode(weight)))
            again = encode(decode(weight), formats.NVFP4, tensor_scale=scale)
        assert torch.equal(numbers(found[name]).float(), decode(again)), name
    quantization = json.loads((output / "config.json").read_text()).get("quantization_config")
    assert (quantization or {}).get("quant_method") == (None if to == "bf16" else "moe_runtime")


def test_gpt_oss_comes_back_from_bf16_to_its_published_bytes(tmp_path):
    """bf16 holds every MXFP4 number, and a block whose largest code is 4 or more has one scale."""
    published = write_tiny_gpt_oss(tmp_path / "source", layers=2)
    for name in [n for n in published if n.endswith("_blocks")]:
        published[name][..., 0] = 0x77  # the largest code in each block
    for path in (tmp_path / "source").glob("*.safetensors"):
        save_file({n: published[n] for n in load_file(path)}, path)
    plain, _ = run(tmp_path / "source", "bf16", name="plain")
    back, _ = run(plain, "mxfp4", name="back")
    again = {}
    for path in back.glob("*.safetensors"):
        again |= load_file(path)
    assert again.keys() == published.keys()
    for name, tensor in published.items():
        assert torch.equal(tensor, again[name]), name
    quantization = json.loads((back / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "mxfp4"


def test_fp8_of_gpt_oss_dense_is_refused(tmp_path):
    write_tiny_gpt_oss(tmp_path / "source", layers=2)
    with pytest.raises(UnsupportedModelError, match="no place for scales of dense weights"):
        run(tmp_path / "source", "mxfp8", dense="fp8-block",
            allow=frozenset({"requantize"}))  # fmt: skip


@pytest.mark.parametrize("to", ["mxfp4", "bf16", "nvfp4"])
def test_the_vendors_layout_becomes_the_published_one(tmp_path, to):
    """To the same tensors as the published twin, and a config.json that describes the model."""
    published = write_tiny_gpt_oss(tmp_path / "twin", layers=2, f=64)
    write_tiny_gpt_oss(tmp_path / "vendor", layers=2, f=64, layout="original")
    allow = frozenset({"requantize"})
    output, report = run(tmp_path / "vendor", to, allow=allow)
    found = read_all(output)
    if to == "mxfp4":
        written = {n: t for p in output.glob("*.safetensors") for n, t in load_file(p).items()}
        assert written.keys() == published.keys()
        assert all(torch.equal(written[name], published[name]) for name in written)
        assert report["totals"]["converted"] == 0
    else:
        twin, _ = run(tmp_path / "twin", to, name="of-twin", allow=allow)
        expected = read_all(twin)
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            assert torch.equal(numbers(weight), numbers(expected[name])), name
    with open_folder(output) as ours, open_folder(tmp_path / "twin") as theirs:
        assert ours.layout == "huggingface"
        twin_config = replace(plan_model(theirs).config, eos_token_ids=())  # the vendor tells none
        assert plan_model(ours).config == twin_config


def test_a_vendors_tensor_of_other_rows_is_refused(tmp_path):
    write_tiny_gpt_oss(tmp_path / "source", layers=2, layout="original")
    config = tmp_path / "source" / "original" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "num_key_value_heads": 4}))
    with pytest.raises(CheckpointError, match=r"qkv\.(bias|weight): expected 256 rows"):
        run(tmp_path / "source", "bf16")
