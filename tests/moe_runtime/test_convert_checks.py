"""What `convert` refuses, by which name a person may insist, and what it tells of at the end."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from loaders.errors import CheckpointError, UnsupportedModelError
from moe_runtime import cli
from moe_runtime.conversion.convert import convert
from moe_runtime.conversion.errors import ConversionError
from moe_runtime.conversion.options import ConversionOptions
from moe_runtime.verification.verify import verify
from tests.moe_runtime.convert_helpers import (
    EXPERT,
    QUANTIZED,
    deepseek_source,
    numbers,
    read_all,
    run,
)
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss
from tests.oracles.tiny_moe import (
    EXPERTS,
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


def test_the_same_form_again_is_refused(source):
    first, _ = run(source, "mxfp4", name="first")
    with pytest.raises(UnsupportedModelError, match="nothing to convert to mxfp4"):
        run(first, "mxfp4")
    with pytest.raises(UnsupportedModelError, match="nothing to convert to bf16"):
        run(source, "bf16")


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
