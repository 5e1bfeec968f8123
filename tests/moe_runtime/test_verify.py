"""`verify`: sound checkpoints of every format pass, and each kind of damage is named."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from loaders.checkpoint import open_folder
from loaders.logical import logical_tensors
from moe_runtime import cli
from moe_runtime.conversion.convert import convert
from moe_runtime.conversion.options import TARGETS, ConversionOptions
from moe_runtime.verification import verify as verification
from moe_runtime.verification.verify import pieces_of, verify
from tests.oracles.tiny_gpt_oss import write_json, write_tiny_gpt_oss
from tests.oracles.tiny_moe import config, stacked, tiny_tensors, write_tiny_moe

EXPERT = "model.layers.1.mlp.experts.2."
# Of no family that is run: the checkpoint has names and shapes, not a whole model's config.
SETTINGS = config(model_type="some_moe", architectures=["SomeMoeForCausalLM"])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_tiny_moe(folder, settings=SETTINGS)
    return folder


@pytest.fixture
def converted(source, tmp_path):
    def make(to, **options):
        output = tmp_path / to
        convert(str(source), output, ConversionOptions(to, **options), progress=False)
        return output

    return make


def messages(found, *, errors=True):
    return [f"{f.check}: {f.tensor} {f.message}" for f in found.findings if f.is_error is errors]


def edit(folder, name, change):
    """Change one tensor of a checkpoint in place; `change` gets it and returns the new one."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name].clone())
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise KeyError(name)


def at(place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


@pytest.mark.parametrize("to", [target for target in TARGETS if target != "bf16"])
def test_what_convert_writes_is_sound(converted, source, to):
    found = verify(converted(to, dense="fp8-block"), source)
    assert messages(found) == [] and found.sound and found.compared
    read = found.nbytes + sum(weight.nbytes for weight in tiny_tensors().values())
    assert read <= found.bytes_read < read * 1.01  # tensor scales are read for each piece
    tensors = tiny_tensors()
    assert {tensor.name for tensor in found.tensors} == tensors.keys()
    for tensor in found.tensors:
        if ".experts." in tensor.name or tensor.component in ("attention", "shared experts"):
            if tensor.equal:
                assert len(tensor.shape) == 1 or tensor.component == "attention"
                continue
            assert tensor.quality.weights == tensors[tensor.name].numel()
            assert tensor.quality.sqnr_db > (17 if "4" in tensor.format else 29)
        else:
            assert tensor.equal and tensor.quality is None


def test_the_figures_are_those_of_the_conversion(converted, source):
    output = converted("nvfp4")
    report = json.loads((output / "conversion_report.json").read_text())
    expected = {r["name"]: r["quality"] for r in report["tensors"] if r["quality"]}
    found = {t.name: t.quality for t in verify(output, source).tensors if t.quality}
    assert found.keys() == expected.keys()
    for name, quality in found.items():
        for figure in ("saturated", "zero_blocks", "max_abs_error", "vanished"):
            assert getattr(quality, figure) == expected[name][figure]
        assert quality.sqnr_db == pytest.approx(expected[name]["sqnr_db"], rel=1e-6)


def test_experts_stacked_in_the_source(tmp_path, converted):
    write_tiny_moe(tmp_path / "stacked", stacked(tiny_tensors()), settings=SETTINGS)
    found = verify(converted("mxfp8"), tmp_path / "stacked")
    assert messages(found) == []
    gate, up = (next(t for t in found.tensors if t.name == f"{EXPERT}{m}_proj.weight")
                for m in ("gate", "up"))  # fmt: skip
    assert 29 < gate.quality.sqnr_db < 35 and 29 < up.quality.sqnr_db < 35


def test_pieces_cover_every_row(converted, source, monkeypatch):
    """Cut small, the same figures; bytes add up to the progress bar's total."""
    output = converted("fp8-block")
    whole = verify(output, source)
    monkeypatch.setattr(verification, "_PIECE_WEIGHTS", 2048)
    monkeypatch.setattr(verification, "_BATCH_PIECES", 3)
    total, seen = [], []
    cut = verify(output, source, on_total=total.append, on_bytes=seen.append)
    assert sum(seen) == total[0] == whole.nbytes
    for ours, theirs in zip(whole.tensors, cut.tensors, strict=True):
        assert (ours.name, ours.equal) == (theirs.name, theirs.equal)
        if ours.quality:
            assert theirs.quality.noise == pytest.approx(ours.quality.noise, rel=1e-6)
    with open_folder(output) as checkpoint:
        for weight in logical_tensors(checkpoint):
            pieces = list(pieces_of(weight))
            assert sum(piece.nbytes for piece in pieces) <= weight.nbytes
            rows = sum(piece.stop - piece.start for piece in pieces)
            assert rows == (weight.shape[-2] if len(weight.shape) > 1 else 1)


DAMAGE = [
    ("mxfp4", "gate_proj.weight_scale", torch.zeros_like, "scales are zero over codes"),
    ("mxfp4", "gate_proj.weight_scale", at((3, 1), 255), "1 of 256 scales are NaN"),
    ("nvfp4", "up_proj.weight_scale", at((3, 1), 0.0), "1 of 512 scales are zero over codes"),
    ("nvfp4", "up_proj.weight_global_scale", lambda t: t * 2, "gate and up: .* tensor scale"),
    ("nvfp4", "up_proj.weight_global_scale", lambda t: t * 0, "its tensor scale is inf"),
    ("fp8-block", "up_proj.weight", at((5, 6), torch.nan), r"found nan at \[5, 6\]"),
    ("fp8-block", "up_proj.weight_scale", at((0, 0), -1.0), "1 of 1 scales are NaN, infinite or"),
    ("fp8-channel", "down_proj.weight_scale", at((9, 0), torch.inf), "1 of 128 scales are NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("to", "part", "change", "expected"), DAMAGE)
def test_damaged_scales_and_codes(converted, to, part, change, expected):
    output = converted(to)
    edit(output, EXPERT + part, change)
    found = verify(output)
    assert not found.sound
    assert any(re.search(expected, text) for text in messages(found)), found.findings
    assert all(EXPERT in text for text in messages(found))


@pytest.mark.parametrize("shape", [(), (1,), (64, 1)], ids=str)
def test_equal_scales_are_suspect_but_one_for_all_is_not(tmp_path, shape):
    """ModelOpt's FP8 has one scale a tensor, which each row is read with."""
    tensors = tiny_tensors()
    for name in [name for name in tensors if "up_proj" in name and ".experts." in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale"] = torch.full(shape, 0.5)
    write_tiny_moe(tmp_path, tensors, settings=SETTINGS)
    warned = [text for text in messages(verify(tmp_path), errors=False) if "scales" in text]
    assert len(warned) == (8 if shape == (64, 1) else 0)
    assert all("all 64 scales are the same" in text for text in warned)


def test_numbers_that_are_not_finite(tmp_path):
    write_tiny_moe(tmp_path, settings=SETTINGS)
    edit(tmp_path, "lm_head.weight", at((7, 5), torch.inf))
    edit(tmp_path, "model.norm.weight", at(9, torch.nan))
    edit(tmp_path, "model.embed_tokens.weight", torch.zeros_like)
    found = verify(tmp_path)
    assert sorted(messages(found)) == [
        "numbers: lm_head.weight found inf at [7, 5]",
        "numbers: model.norm.weight found nan at [9]",
    ]
    warned = "numbers: model.embed_tokens.weight every number is zero"
    assert warned in messages(found, errors=False)


def test_numbers_of_a_copied_tensor_that_changed(converted, source):
    output = converted("mxfp4")
    edit(output, "model.layers.0.mlp.gate.weight", at((slice(None), 3), 0.5))
    found = verify(output, source)
    assert messages(found) == [
        "source: model.layers.0.mlp.gate.weight 4 of 512 numbers differ from the source's, in the "
        "same format"
    ]


def test_a_weight_of_another_expert(converted, source):
    """Codes in the wrong place have the right shape and sound scales: only the source tells."""
    output = converted("mxfp4")
    other = f"{EXPERT}gate_proj.weight_packed".replace("experts.2", "experts.3")
    found = {}
    edit(output, other, lambda t: found.setdefault("codes", t))
    edit(output, f"{EXPERT}gate_proj.weight_packed", lambda t: found["codes"])
    assert verify(output).sound
    (message,) = messages(verify(output, source))
    assert f"{EXPERT}gate_proj.weight signal to noise" in message
    assert "expected at least 10 dB" in message


def test_weights_missing_from_either_side(tmp_path, source):
    tensors = tiny_tensors()
    dropped = tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    tensors["model.extra.weight"] = dropped
    write_tiny_moe(tmp_path, tensors, settings=SETTINGS)
    found = messages(verify(tmp_path, source))
    assert any("1 of 4 experts have no up_proj.weight: 3" in text for text in found)
    assert "source: model.layers.1.mlp.experts.3.up_proj.weight of shape (64, 128) is in the " \
        "source and not here" in found  # fmt: skip
    assert "source: model.extra.weight of shape (64, 128) has no counterpart in the source" in found
    assert len(found) == 3


def test_experts_of_different_shapes_and_a_changed_config(tmp_path, source):
    tensors = tiny_tensors()
    name = f"{EXPERT}down_proj.weight"
    tensors[name] = tensors[name][:, :32].contiguous()
    write_tiny_moe(tmp_path, tensors, settings=SETTINGS)
    settings = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", {**settings, "rms_norm_eps": 1e-3})
    found = verify(tmp_path, source)
    assert any(name in text and "(128, 32), where" in text for text in messages(found))
    warned = messages(found, errors=False)
    assert "config:  config.json differs from the source's in rms_norm_eps" in warned


def test_files_that_do_not_fit_the_index(tmp_path):
    write_tiny_moe(tmp_path, settings=SETTINGS)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "renamed.safetensors")
    (only,) = verify(tmp_path).findings
    assert only.check == "files" and f"1 missing: {shard.name}" in only.message
    shard.write_bytes((tmp_path / "renamed.safetensors").read_bytes())
    (warning,) = [f for f in verify(tmp_path).findings if f.check == "files"]
    assert not warning.is_error and "renamed.safetensors: in the folder" in warning.message


def test_gpt_oss_in_both_layouts(tmp_path):
    for layout in ("huggingface", "original"):
        write_tiny_gpt_oss(tmp_path / layout, layout=layout)
        assert messages(verify(tmp_path / layout)) == []
    for source in ("original", "huggingface"):
        same = verify(tmp_path / "huggingface", tmp_path / source)
        assert same.sound and all(tensor.equal for tensor in same.tensors), source
    other = verify(tmp_path / "original", tmp_path / "huggingface")
    assert other.sound and {t.name: t.component for t in other.tensors} == {
        t.name: t.component for t in same.tensors
    }
    name = "model.layers.2.mlp.experts.gate_up_proj_scales"
    edit(tmp_path / "huggingface", name, at((1, 5, 0), 255))
    (message,) = messages(verify(tmp_path / "huggingface"))
    assert "model.layers.2.mlp.experts.gate_up_proj" in message and "are NaN" in message


def test_the_verb(converted, source, capsys):
    output = converted("mxfp4")
    assert cli.run(["verify", str(output), "--against", str(source)]) == 0
    shown = capsys.readouterr().out
    assert "experts (mxfp4)" in shown and "\n  sound; 39 weights" in shown
    assert cli.run(["verify", str(output), "--against", str(source), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sound"] and result["num_tensors"] == 39 and len(result["tensors"]) == 39
    edit(output, "lm_head.weight", at((7, 5), torch.nan))
    assert cli.run(["verify", str(output)]) == 1
    shown = capsys.readouterr().out
    assert "  error: numbers: lm_head.weight found nan at [7, 5]" in shown
    assert "not sound: 1 error;" in shown
    assert cli.run(["verify", str(output / "nothing")]) == 1
    assert "no such folder" in capsys.readouterr().out
    assert cli.run(["verify", str(output), "--against", str(output / "nothing")]) == 1
