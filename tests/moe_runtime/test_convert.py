"""`convert`: what becomes of every tensor, the files around them, options."""

import io
import json
import os
import re
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from loaders.checkpoint import open_files, open_folder
from loaders.logical import logical_tensors
from moe_runtime import cli
from moe_runtime.conversion import needs, work
from moe_runtime.conversion.convert import convert
from moe_runtime.conversion.errors import REFUSALS
from moe_runtime.conversion.options import TARGETS, ConversionOptions, parse_size
from moe_runtime.conversion.planning import plan_conversion
from moe_runtime.conversion.quant_configs import module_patterns
from moe_runtime.conversion.roles import role_of
from moe_runtime.conversion.work import divisible_scale
from quant import formats
from quant.codecs import CODECS, decode, encode
from quant.nvfp4 import tensor_scale_for
from quant.tensor import QuantTensor
from tests.moe_runtime.convert_helpers import EXPERT, QUANTIZED, read_all, run
from tests.oracles.published_headers import gpt_oss
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss
from tests.oracles.tiny_moe import (
    EXPERTS,
    LAYERS,
    config,
    tiny_tensors,
    write_tiny_moe,
)


@pytest.fixture
def source(tmp_path):
    write_tiny_moe(tmp_path / "source")
    return tmp_path / "source"


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


def test_native_fp8_is_the_form_of_deepseek(source):
    output, _ = run(source, "fp8-block", layout="native")
    names = open_folder(output).tensors.keys()
    assert EXPERT + "up_proj.weight_scale_inv" in names
    quantization = json.loads((output / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "fp8"
    assert quantization["weight_block_size"] == [128, 128]
    assert "model.layers.0.mlp.gate" in quantization["modules_to_not_convert"]


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
