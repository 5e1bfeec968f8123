"""`convert`: what becomes of every tensor, the files around them, options and refusals."""

import io
import json
import os
import re
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loaders.checkpoint import open_files, open_folder
from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.logical import logical_tensors, read_tensor
from moe_runtime import cli
from moe_runtime.conversion import needs, work
from moe_runtime.conversion.convert import convert
from moe_runtime.conversion.errors import REFUSALS, ConversionError
from moe_runtime.conversion.options import TARGETS, ConversionOptions, parse_size
from moe_runtime.conversion.planning import plan_conversion
from moe_runtime.conversion.quant_configs import module_patterns
from moe_runtime.conversion.roles import role_of
from moe_runtime.conversion.work import divisible_scale
from moe_runtime.models.registry import plan_model
from moe_runtime.verification.verify import verify
from quant import formats
from quant.codecs import CODECS, decode, encode
from quant.nvfp4 import tensor_scale_for
from quant.tensor import QuantTensor
from tests.oracles.published_headers import gpt_oss
from tests.oracles.tiny_deepseek import Sizes, write_tiny_deepseek
from tests.oracles.tiny_deepseek_v4 import write_tiny_deepseek_v4
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss
from tests.oracles.tiny_moe import (
    EXPERTS,
    LAYERS,
    config,
    stacked,
    tiny_tensors,
    write_tiny_moe,
)

QUANTIZED = [target for target in TARGETS if target != "bf16"]
EXPERT = "model.layers.1.mlp.experts.2."


@pytest.fixture
def source(tmp_path):
    write_tiny_moe(tmp_path / "source")
    return tmp_path / "source"


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


def expected_experts(tensors, to, **options):
    """The experts as the codecs alone make them, gate and up of NVFP4 together."""
    format = formats.TARGETS[to]
    found = {}
    for name in [n for n in tensors if ".experts." in n]:
        more = dict(options)
        if to == "nvfp4":
            side = name.replace("gate_proj", "up_proj"), name.replace("up_proj", "gate_proj")
            both = [tensors[n] for n in {name, *side}]
            more["tensor_scale"] = divisible_scale(tensor_scale_for(*both))
        found[name] = encode(tensors[name], format, **more)
    return found


@pytest.mark.parametrize("to", QUANTIZED)
def test_experts_are_what_the_codec_makes_and_the_rest_is_untouched(source, to):
    tensors = tiny_tensors()
    output, report = run(source, to)
    found = read_all(output)
    assert found.keys() == tensors.keys()
    expected = expected_experts(tensors, to)
    for name, weight in found.items():
        if name in expected:
            assert weight.format is formats.TARGETS[to]
            assert torch.equal(weight.values.view(torch.uint8),
                               expected[name].values.view(torch.uint8)), name  # fmt: skip
            assert torch.equal(decode(weight), decode(expected[name])), name
        else:
            assert torch.equal(weight, tensors[name]) and weight.dtype == torch.bfloat16
    records = {record["name"]: record for record in report["tensors"]}
    assert records.keys() == tensors.keys()
    assert {n for n, r in records.items() if r["action"] == "converted"} == expected.keys()
    assert all(r["reason"] for n, r in records.items() if n not in expected)


def test_chunks_do_not_show(source, monkeypatch):
    """Weights cut into rows give the same files as whole ones."""
    wide = tiny_tensors(d=160, f=320)
    write_tiny_moe(source, wide, settings=config(d=160, f=320))
    for to in QUANTIZED:
        whole, first = run(source, to, name=f"{to}-whole")
        monkeypatch.setattr(work, "CHUNK_WEIGHTS", 160 * 128)
        cut, second = run(source, to, name=f"{to}-cut")
        monkeypatch.undo()
        assert [p.read_bytes() for p in sorted(whole.glob("*.safetensors"))] == [
            p.read_bytes() for p in sorted(cut.glob("*.safetensors"))
        ]
        noise = [r["totals"]["quality"]["noise"] for r in (first, second)]
        assert noise[0] == pytest.approx(noise[1], rel=1e-6)


def test_gate_and_up_share_one_nvfp4_scale(source):
    output, _ = run(source, "nvfp4")
    found = read_all(output)
    gate, up, down = (found[f"{EXPERT}{m}_proj.weight"] for m in ("gate", "up", "down"))
    assert gate.tensor_scale == up.tensor_scale != down.tensor_scale


def test_a_tensor_scale_multiplies_as_its_inverse_divides():
    """compressed-tensors divides by the inverse: both must give the same fp32 numbers."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for _ in range(500):
        before = torch.rand((), generator=generator) * 10 ** float(
            torch.randint(-8, 2, (), generator=generator)
        )
        scale = divisible_scale(before)
        assert before <= scale <= before * (1 + 1e-4)
        assert torch.equal(blocks * scale, blocks / (1 / scale))


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


def test_files_around_the_weights(source):
    output, report = run(source, shard_bytes=60_000)
    names = {path.name for path in output.iterdir()}
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert names == {
        *shards, "config.json", "generation_config.json", "tokenizer.json", "README.md",
        "model.safetensors.index.json", "conversion_report.json", "conversion_report.html",
    }  # fmt: skip
    index = json.loads((output / "model.safetensors.index.json").read_text())
    sizes = 0
    for shard in shards:
        with safe_open(output / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - not a mapping
                assert index["weight_map"].pop(name) == shard
                sizes += file.get_tensor(name).nbytes
        assert (output / shard).stat().st_size < 60_000 + 20_000
    assert not index["weight_map"] and index["metadata"]["total_size"] == sizes
    assert sizes == report["totals"]["bytes"]
    for name in ("tokenizer.json", "generation_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    card = (output / "README.md").read_text()
    assert "license: apache-2.0" in card and "- compressed-tensors" in card
    assert f"| experts | {3 * EXPERTS * LAYERS} | mxfp4 |" in card
    assert not (source.parent / "out.partial").exists()


def test_the_base_model_of_a_folder_is_named_on_request(source):
    output, _ = run(source, "mxfp4", base_model="acme/tiny")
    assert "\nbase_model: acme/tiny\n" in (output / "README.md").read_text()
    with pytest.raises(ValueError, match="expected a hub id"):
        ConversionOptions("mxfp4", base_model="tiny: x")


def test_the_card_names_what_opens_the_result(source, tmp_path):
    write_tiny_gpt_oss(tmp_path / "gpt-oss", layers=2)
    for to, opens, library in (
        ("mxfp4", "vLLM, SGLang and transformers open", "transformers"),
        ("nvfp4", "does not read experts in nvfp4 rightly", "vllm"),
    ):
        card = (run(source, to, name=to)[0] / "README.md").read_text()
        assert opens in card and f"library_name: {library}\n" in card
    output, _ = run(tmp_path / "gpt-oss", "mxfp8", allow=frozenset({"requantize"}))
    card = (output / "README.md").read_text()
    assert "by moe-runtime alone" in card and "library_name: moe-runtime\n" in card


def test_compressed_tensors_config(source):
    output, _ = run(source, "mxfp4")
    written = json.loads((output / "config.json").read_text())
    quantization = written.pop("quantization_config")
    assert written == config()
    assert quantization["format"] == "mxfp4-pack-quantized"
    (group,) = quantization["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["weights"]["group_size"] == 32
    assert {"lm_head", r"re:^model\.layers\.\d+\.mlp\.gate$"} <= set(quantization["ignore"])
    assert not any("experts\\.\\d" in pattern for pattern in quantization["ignore"])


def test_dense_and_keep(source):
    output, report = run(source, "mxfp4", dense="fp8-block", keep=("layers.0.", "*.down_proj.*"))
    formats_of = {
        name: weight.format.name if isinstance(weight, QuantTensor) else "plain"
        for name, weight in read_all(output).items()
    }
    assert formats_of[EXPERT + "gate_proj.weight"] == "mxfp4"
    assert formats_of[EXPERT + "down_proj.weight"] == "plain"
    assert formats_of["model.layers.1.self_attn.q_proj.weight"] == "fp8_block128"
    assert formats_of["model.layers.1.mlp.shared_expert.up_proj.weight"] == "fp8_block128"
    assert {f for n, f in formats_of.items() if "layers.0." in n} == {"plain"}
    for name in ("mlp.gate.weight", "input_layernorm.weight", "self_attn.q_proj.bias"):
        assert formats_of[f"model.layers.1.{name}"] == "plain"
    quantization = json.loads((output / "config.json").read_text())["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    first, second = quantization["config_groups"].values()
    assert first["targets"] == ["Linear"]
    assert r"re:^model\.layers\.1\.self_attn\.q_proj$" in second["targets"] or (
        "model.layers.1.self_attn.q_proj" in second["targets"]
    )
    kept = {r["name"]: r["reason"] for r in report["tensors"] if r["action"] == "copied"}
    assert kept["model.layers.0.mlp.experts.0.up_proj.weight"] == "kept: --keep"


def test_power_of_two_scales(source):
    output, _ = run(source, "fp8-block", power_of_two_scales=True)
    weight = read_all(output)[EXPERT + "up_proj.weight"]
    assert weight.format is formats.FP8_BLOCK128
    assert torch.equal(torch.frexp(weight.scales).mantissa, torch.full_like(weight.scales, 0.5))
    plain = encode(tiny_tensors()[EXPERT + "up_proj.weight"], formats.FP8_BLOCK128_E8M0)
    assert torch.equal(decode(weight), decode(plain))


def test_scale_rule_and_search_reach_the_codec(source):
    for options in ({"scale_rule": "floor"}, {"scale_search": "mse"}):
        output, _ = run(source, "mxfp4", name=f"out-{next(iter(options))}", **options)
        expected = expected_experts(tiny_tensors(), "mxfp4", **options)
        name = EXPERT + "gate_proj.weight"
        assert torch.equal(decode(read_all(output)[name]), decode(expected[name]))


def test_a_search_is_reported_beside_the_plain_rule(source, capsys):
    for to in ("mxfp4", "nvfp4", "mxfp8"):
        _, plain = run(source, to, name=f"{to}-plain")
        searched, report = run(source, to, name=f"{to}-searched", scale_search="mse")
        before = {record["name"]: record["quality"] for record in plain["tensors"]}
        for record in report["tensors"]:
            if record["quality"] is not None:
                ours, theirs = record["quality"], before[record["name"]]
                assert ours["plain_noise"] == pytest.approx(theirs["noise"], rel=1e-12)
                assert ours["plain_sqnr_db"] == pytest.approx(theirs["sqnr_db"], rel=1e-12)
                assert ours["sqnr_db"] >= ours["plain_sqnr_db"]
                assert theirs["plain_noise"] == 0 and theirs["plain_sqnr_db"] is None
    arguments = ["convert", str(source), "--to", "mxfp8", "--scale-search", "mse"]
    assert cli.run([*arguments, "--output", str(searched)]) == 0
    assert re.search(
        r"SQNR \d+\.\d\d dB \(\d+\.\d\d dB by the plain rule\)", capsys.readouterr().out
    )
    quality = report["components"][[p["component"] for p in report["components"]].index("experts")]
    both = f"{quality['quality']['sqnr_db']:.2f} ({quality['quality']['plain_sqnr_db']:.2f})"
    assert both in (searched / "conversion_report.html").read_text()


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


def test_the_same_form_again_is_refused(source):
    first, _ = run(source, "mxfp4", name="first")
    with pytest.raises(UnsupportedModelError, match="nothing to convert to mxfp4"):
        run(first, "mxfp4")
    with pytest.raises(UnsupportedModelError, match="nothing to convert to bf16"):
        run(source, "bf16")


def test_native_fp8_is_the_form_of_deepseek(source):
    output, _ = run(source, "fp8-block", layout="native")
    names = open_folder(output).tensors.keys()
    assert EXPERT + "up_proj.weight_scale_inv" in names
    quantization = json.loads((output / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "fp8"
    assert quantization["weight_block_size"] == [128, 128]
    assert "model.layers.0.mlp.gate" in quantization["modules_to_not_convert"]


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


def broken(source, change):
    tensors = tiny_tensors()
    change(tensors)
    write_tiny_moe(source, tensors)


def set_nan(name):
    def change(tensors):
        tensors[name][3, 5] = float("nan")

    return change


@pytest.mark.parametrize(
    ("change", "refusal", "message"),
    [
        (set_nan(EXPERT + "up_proj.weight"), "non-finite", "found nan at row 3, column 5"),
        (set_nan("model.layers.0.mlp.gate.weight"), "non-finite", "found nan at element 389"),
        (lambda t: t.pop(EXPERT + "up_proj.weight"), "missing-tensors", "1 of 4 experts have no"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1." in n], "missing-tensors", "layer 1"),
        (lambda t: t.pop("model.layers.1.mlp.gate.weight"), "router", "no router was found in"),
        (
            lambda t: t.update({EXPERT + "up_proj.weight": torch.ones(64, 96)}),
            "different-experts",
            r"experts.2.up_proj.weight: fp32 \(64, 96\), where .*experts.0.* bf16 \(64, 128\)",
        ),
        (
            lambda t: t.update({EXPERT + "up_proj.weight": torch.ones(64, 128).to(torch.int8)}),
            "different-experts",
            r"experts.2.up_proj.weight: i8 \(64, 128\), where",
        ),
    ],
)
def test_refusals_and_insisting(source, change, refusal, message):
    broken(source, change)
    with pytest.raises(ConversionError, match=message) as caught:
        run(source)
    assert f"--allow {refusal}" in str(caught.value.hint)
    output, _ = run(source, allow=frozenset({refusal}))  # goes on in the same folder
    assert torch.isfinite(numbers(read_all(output)["model.layers.0.mlp.experts.0.up_proj.weight"])
                          ).all()  # fmt: skip


def test_four_bits_are_not_rounded_again_unasked(source):
    first, _ = run(source, "mxfp4", name="first")
    with pytest.raises(ConversionError, match="rounds rounded weights again") as caught:
        run(first, "nvfp4", name="second")
    assert "--allow requantize" in caught.value.hint
    run(first, "nvfp4", name="second", allow=frozenset({"requantize"}))


@pytest.mark.parametrize(
    ("part", "refusal", "message"),
    [
        ("weight_global_scale", "gate-up-scales", "have the tensor scales"),
        ("weight_scale", "zero-scales", "scales of zero over codes"),
    ],
)
def test_scales_of_the_source_are_not_trusted(source, part, refusal, message):
    nvfp4, _ = run(source, "nvfp4", name="nvfp4")
    path = next(
        p for p in nvfp4.glob("*.safetensors") if EXPERT + "up_proj." + part in load_file(p)
    )
    tensors = load_file(path)
    tensor = tensors[EXPERT + "up_proj." + part]
    tensors[EXPERT + "up_proj." + part] = (
        tensor.float() * (2 if part != "weight_scale" else 0)
    ).to(tensor.dtype)
    save_file(tensors, path)
    allow = frozenset({"requantize"})
    with pytest.raises(ConversionError, match=message):
        run(nvfp4, "mxfp8", name="again", allow=allow)
    run(nvfp4, "mxfp8", name="again", allow=allow | {refusal})


@pytest.mark.parametrize(("part", "nan"), [("", 0x7F), ("_scale_inv", None)])
@pytest.mark.parametrize("module", ["self_attn.q_proj", "mlp.experts.1.up_proj"])
def test_nan_among_codes_or_scales(tmp_path, part, nan, module):
    """In weights that are copied as they are and in those that are converted."""
    source = tmp_path / "source"
    deepseek_source(source)
    name = f"model.layers.1.{module}.weight{part}"
    path = next(p for p in source.glob("*.safetensors") if name in load_file(p))
    tensors = load_file(path)
    if nan is None:
        tensors[name][0, 0] = float("nan")
    else:
        tensors[name].view(torch.uint8)[5, 7] = nan
    save_file(tensors, path)
    with pytest.raises(ConversionError, match=r"found (nan|NaN)"):
        run(source, "mxfp4")
    run(source, "mxfp4", allow=frozenset({"non-finite"}))


def test_odd_widths_are_refused_and_can_be_kept(source):
    write_tiny_moe(source, tiny_tensors(d=128, f=40), settings=config(f=40))
    with pytest.raises(ConversionError, match="takes columns in multiples of 32"):
        run(source)
    _, report = run(source, keep=("down_proj",))
    assert report["totals"]["converted"] == 2 * EXPERTS * LAYERS


def test_outputs_that_are_not_ours_to_write(source, tmp_path):
    taken = tmp_path / "out"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    with pytest.raises(ConversionError, match="is not empty"):
        run(source)
    options = ConversionOptions("mxfp4")
    with pytest.raises(ConversionError, match="holds something that is no checkpoint"):
        convert(str(source), taken, options, overwrite=True, progress=False)
    assert (taken / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ConversionError, match="is the source itself"):
        convert(str(source), source, options, overwrite=True, progress=False)


def test_overwrite_replaces_a_checkpoint(source):
    output, _ = run(source, "mxfp4")
    convert(str(source), output, ConversionOptions("mxfp8"), overwrite=True, progress=False)
    assert read_all(output)[EXPERT + "up_proj.weight"].format is formats.MXFP8
    assert {p.name for p in output.parent.iterdir()} == {"source", "out"}


def test_roles_of_many_families(tmp_path):
    """A quick look over names that other families use: what is converted, by name."""
    tensor = logical_tensors(open_folder_of(tmp_path))[0]
    for name, expected in {
        "model.layers.3.mlp.gate.e_score_correction_bias": "router",
        "model.layers.3.block_sparse_moe.gate.weight": "router",
        "model.layers.3.block_sparse_moe.experts.7.w1.weight": "experts",
        "model.layers.3.mlp.shared_expert_gate.weight": "router",
        "model.layers.3.mlp.shared_experts.down_proj.weight": "shared experts",
        "model.layers.0.mlp.gate_proj.weight": "mlp",
        "model.layers.61.mlp.experts.0.up_proj.weight": "mtp",
        "mtp.0.ffn.experts.0.w1.weight": "mtp",
        "layers.3.ffn.experts.0.w1.weight": "experts",
        "layers.3.ffn.gate.tid2eid": "router",
        "layers.3.attn.indexer.wq_b.weight": "indexer",
        "layers.3.attn.compressor.wkv.weight": "indexer",
        "layers.3.attn.wo_a.weight": "attention",
        "model.layers.3.self_attn.kv_a_layernorm.weight": "norm",
        "model.layers.3.linear_attn.conv1d.weight": "other",
        "model.visual.blocks.0.attn.qkv.weight": "vision and audio",
        "embed.weight": "embedding",
        "head.weight": "head",
    }.items():
        assert role_of(replace(tensor, name=name, shape=(8, 8)), {"num_hidden_layers": 61}) == (
            expected
        ), name


def open_folder_of(folder):
    write_tiny_moe(folder / "any")
    return open_folder(folder / "any")


def test_patterns_match_what_they_should_and_nothing_else():
    kept = [f"model.layers.{i}.mlp.gate" for i in range(3)] + ["lm_head"]
    kept += [f"model.layers.3.mlp.experts.{e}.up_proj" for e in range(2)]
    others = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(3) for e in range(2)]
    assert module_patterns(kept, others) == [
        r"re:^model\.layers\.3\.mlp\.experts\.\d+\.up_proj$",
        r"re:^model\.layers\.\d+\.mlp\.gate$",
        "lm_head",
    ]


def test_options_are_checked():
    for options in ({"target": "int4"}, {"target": "mxfp4", "allow": frozenset({"all"})},
                    {"target": "mxfp4", "power_of_two_scales": True},
                    {"target": "nvfp4", "scale_rule": "floor"},
                    {"target": "fp8-block", "scale_search": "mse"},
                    {"target": "bf16", "dense": "fp8-block"}):  # fmt: skip
        with pytest.raises(ValueError, match="--"):
            ConversionOptions(**options)
    assert parse_size("1.5GB") == 1_500_000_000 and parse_size("2 KiB") == 2048
    for wrong in ("5", "GB", "-1GB", "five GB"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(wrong)
    assert set(TARGETS) == set(formats.TARGETS)
    assert set(CODECS) >= {format.name for format in formats.TARGETS.values()}
    assert all(text for text in REFUSALS.values())


def test_dry_run_writes_nothing_and_tells_the_sizes(source, capsys):
    output = source.parent / "out"
    arguments = ["convert", str(source), "--to", "nvfp4", "--output", str(output), "--json"]
    assert cli.run([*arguments, "--dry-run"]) == 0
    foreseen = json.loads(capsys.readouterr().out)
    assert [path.name for path in source.parent.iterdir()] == ["source"]
    assert cli.run(arguments) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["bytes"] == foreseen["bytes"]
    written = sum(path.stat().st_size for path in output.iterdir())
    assert written <= foreseen["disk_bytes"] and foreseen["memory_bytes"] < 2e9
    plan = plan_conversion(open_folder(source), ConversionOptions("nvfp4"))
    assert plan.output_bytes == sum(p.stat().st_size for p in output.glob("*.safetensors"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_has_bytes_rate_and_time_left(source, monkeypatch, capsys):
    output = source.parent / "out"
    arguments = ["--to", "mxfp4", "--output", str(output)]
    monkeypatch.setattr("sys.stderr", Terminal())
    assert cli.run(["convert", str(source), *arguments]) == 0
    size = sum(weight.nbytes for weight in tiny_tensors().values()) / 1e3
    shown = sys.stderr.getvalue()
    assert re.search(rf"Converting: 100%.*{size:.0f}k/{size:.0f}k \[00:0\d<00:00, .*B/s\]", shown)
    assert re.search(rf"read {size / 1e3:.1f} MB in \d+\.\d s \(\d+ MB/s\)", shown)
    monkeypatch.setattr("sys.stderr", Terminal())
    assert cli.run(["verify", str(output), "--against", str(source)]) == 0
    assert re.search(r"verify: 100%.*\[00:0\d<00:00, .*B/s\]", sys.stderr.getvalue())
    assert re.search(r"weights, read \d+\.\d MB in \d+\.\d s \(\d+ MB/s\)", capsys.readouterr().out)


def test_the_command_line_tells_what_is_wrong(source, capsys):
    arguments = ["convert", str(source), "--to", "mxfp4", "--output", str(source.parent / "out")]
    assert cli.run([*arguments, "--shard-size", "large"]) == 2
    assert "is not a size" in capsys.readouterr().err
    assert cli.run(["convert", str(source), "--to", "int4", "--output", "x"]) == 2
    broken(source, set_nan(EXPERT + "up_proj.weight"))
    capsys.readouterr()
    assert cli.run(arguments) == 1
    message, hint = capsys.readouterr().err.splitlines()
    assert message.startswith(f"error: {EXPERT}up_proj.weight: found nan")
    assert hint.startswith("hint: --allow non-finite")


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


def test_a_model_that_we_know_is_checked_further(tmp_path):
    """Tensors that only this family has: no count of layers and experts misses them."""
    tensors = write_tiny_gpt_oss(tmp_path / "source", layers=2, shards=1)
    del tensors["model.layers.1.self_attn.sinks"]
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"missing: model\.layers\.1\.self_attn\.sinks") as e:
        run(tmp_path / "source", "bf16")
    assert "--allow model" in e.value.hint
    run(tmp_path / "source", "bf16", allow=frozenset({"model"}))


def test_huge_weights_have_finite_figures_or_are_refused(source, capsys):
    """Finite in bf16, their squares beyond fp32; the largest of all round up to infinity."""
    tensors = tiny_tensors()
    tensors[EXPERT + "up_proj.weight"][3, 4] = 1e25
    write_tiny_moe(source, tensors)
    for to in QUANTIZED:
        output, report = run(source, to, name=to)
        assert 0 < report["totals"]["quality"]["noise"] < float("inf")
        assert verify(output, source).sound == (to != "nvfp4")
    # gate shares the scale of up, and vanishes
    assert (
        cli.run(["convert", str(source), "--to", "nvfp4", "--output", str(output.parent / "nvfp4")])
        == 0
    )
    assert f"do: 1, worst {EXPERT}gate_proj.weight with 0.00 dB" in capsys.readouterr().out
    tensors[EXPERT + "up_proj.weight"][3, 4] = 3.3e38
    write_tiny_moe(source, tensors)
    with pytest.raises(ConversionError, match=r"up_proj.weight: a weight of 3.3e\+38 is infinity"):
        run(source, "mxfp4")
    run(source, "mxfp4", keep=(EXPERT + "up_proj",))


def test_sizes_that_are_no_numbers_are_refused(source):
    for key in ("num_hidden_layers", "num_experts", "hidden_size"):
        write_tiny_moe(source, stacked(tiny_tensors()), settings=config(**{key: "two"}))
        with pytest.raises(CheckpointError, match=f"{key}: expected a whole number, found 'two'"):
            run(source)


def test_a_keep_that_keeps_nothing_is_refused(source):
    with pytest.raises(ConversionError, match=r"--keep shared_exprt: no weight has such a name"):
        run(source, keep=("down_proj", "shared_exprt"))


def test_files_that_the_index_does_not_name_are_reported(source, capsys):
    save_file({"model.mtp.weight": torch.ones(4)}, source / "mtp.safetensors")
    output, report = run(source)
    assert report["meta"]["files_left_out"] == ["mtp.safetensors"]
    assert "mtp.safetensors" in (output / "conversion_report.html").read_text()
    assert cli.run(["convert", str(source), "--to", "mxfp4", "--output", str(output)]) == 0
    shown = capsys.readouterr()
    assert "left out: mtp.safetensors, not in the index" in shown.out
    assert "holds this conversion already" in shown.err


@pytest.mark.parametrize("cores", [1, 2, 256])
def test_memory_stays_in_its_bound_on_any_machine(tmp_path, monkeypatch, cores):
    """2 GB and three times the largest tensor, as foreseen; test_memory_is_bounded measures."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    with open_files(gpt_oss(layers=2, experts=32, bf16=True)) as checkpoint:
        plan = plan_conversion(checkpoint, ConversionOptions("mxfp4"))
    outputs = [output for _, output in plan.outputs]
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    assert largest > 10**9
    assert needs.memory_bytes(outputs) <= 2 * 10**9 + 3 * largest
    assert 1 <= needs.num_threads(outputs) <= cores
    write_tiny_moe(tmp_path)
    small = plan_conversion(open_folder(tmp_path), ConversionOptions("mxfp4"))
    outputs = [output for _, output in small.outputs]
    assert needs.memory_bytes(outputs) <= 2.01e9
    assert needs.num_threads(outputs) == min(cores, 31)
