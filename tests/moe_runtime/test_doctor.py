"""`moe-runtime doctor` says what is here, in text and JSON, and never fails or tells a secret."""

import json
import platform
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from moe_runtime import cli, warm_up
from moe_runtime.commands import doctor
from moe_runtime.published import PUBLISHED
from moe_runtime.support import SUPPORTED, Support
from quant.formats import MXFP4

SECRET = "hf_" + "secret" * 6


@pytest.fixture
def quick(monkeypatch):
    """No measuring: 11 reads of 256 MiB take half a second."""
    measured = [{"device": "cpu", "read_gbps": 12.4, "buffer_bytes": 1 << 28}]
    monkeypatch.setitem(doctor.PROBES, "read_bandwidth", lambda: measured)


def run(*args: str) -> str:
    result = CliRunner().invoke(doctor.command, args)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_has_every_section(monkeypatch, quick, tmp_path):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    output = run("--json")
    report = json.loads(output)
    assert list(report) == list(doctor.PROBES)
    assert not any("failed" in section for section in report.values())
    assert report["versions"]["python"] == platform.python_version()
    assert report["hub"]["token"] == "present"
    assert SECRET not in output
    caches = {entry["what"]: entry for entry in report["caches"]}
    assert caches["triton"]["folder"] == str(tmp_path / "kernels")
    assert not caches["triton"]["exists"]
    assert caches["triton"]["free_bytes"] > 0
    assert 0 < report["host_memory"]["free_bytes"] <= report["host_memory"]["total_bytes"]
    runs = {entry["backend"]: entry["runs"] for entry in report["support"]}
    assert runs["reference"]


def test_text_can_be_pasted(monkeypatch, quick):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    lines = run().splitlines()
    assert "  cpu: read 12 GB/s, buffer 0.27 GB" in lines
    assert any(line.split() == ["python", platform.python_version()] for line in lines)
    assert any(line.split() == ["token", "present"] for line in lines)
    assert all(line.isascii() and SECRET not in line for line in lines)


def test_says_which_models_fit(quick):
    small, large = PUBLISHED
    with_room = doctor.fits_gpu(large, "cuda:0", 80 * 10**9, (8, 0))
    assert with_room["fits"] and with_room["context"] == 131072
    assert 65.2e9 < with_room["needs_bytes"] < 80e9
    tiled = doctor.fits_gpu(large, "cuda:0", 80 * 10**9, (9, 0))
    assert tiled["needs_bytes"] > with_room["needs_bytes"] + 3e9
    tight = doctor.fits_gpu(small, "cuda:0", 16 * 10**9, (8, 0))
    assert tight["fits"] and 512 <= tight["context"] < 131072
    assert tight["needs_bytes"] <= 16e9
    too_small = doctor.fits_gpu(large, "cuda:1", 24 * 10**9, (8, 0))
    assert not too_small["fits"] and "65.25 GB" in too_small["why_not"]
    assert json.loads(run("--json"))["models"][0]["model"] == small.repo_id


def test_a_probe_that_fails_is_a_line(monkeypatch, quick):
    def broken():
        raise RuntimeError("no driver\nat all")

    for name in doctor.PROBES:
        monkeypatch.setitem(doctor.PROBES, name, broken)
    report = json.loads(run("--json"))
    assert report["gpus"] == {"failed": "RuntimeError: no driver at all"}
    assert run().count("failed  RuntimeError: no driver at all") == len(doctor.PROBES)


def test_measures_bandwidth():
    (measured, *_) = doctor.probe_bandwidth()
    assert measured["read_gbps"] > 0.5
    assert measured["best_gbps"] >= measured["read_gbps"]


def test_caches_name_an_existing_disk(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/nowhere/at/all")
    assert doctor._disk(Path("/nowhere/at/all"))["free_bytes"] > 0


@pytest.mark.parametrize(
    ("capabilities", "triton_problem", "reason"),
    [
        ([], None, "none is visible"),
        ([(7, 5)], None, "needs an NVIDIA GPU of sm_80 or newer; the best here is sm_75"),
        ([(7, 5), (9, 0)], None, None),
        ([(12, 0)], None, None),
        ([(9, 0)], "triton does not import: ImportError", "triton does not import"),
    ],
)
def test_why_not(capabilities, triton_problem, reason):
    said = Support("gpt_oss", "mxfp4", "bf16", "triton", (8, 0)).why_not(
        capabilities, triton_problem
    )
    assert said is None if reason is None else reason in said


def test_the_reference_runs_everywhere():
    rows = [row for row in SUPPORTED if row.backend == "reference"]
    assert rows and all(row.why_not([], "triton is not installed") is None for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_warm_up_needs_a_gpu(capsys):
    assert cli.run(["doctor", "--warm-up"]) == 1
    assert "kernels are compiled for a GPU: torch sees none here" in capsys.readouterr().err
    assert cli.run(["doctor", "demo"]) == 2
    assert "need --warm-up" in capsys.readouterr().err


def test_warm_up_compiles_for_what_would_be_opened(monkeypatch):
    """Every model in both dense formats, with the context that fits; what does not is named."""
    compiled = []

    def compile_kernels(config, max_context, device, formats, dense_format):
        name = f"{config.num_layers} layers"
        compiled.append((name, max_context, formats, dense_format and dense_format.name))
        return 7

    free = 20 * 10**9
    monkeypatch.setattr(warm_up, "compile_kernels", compile_kernels)
    monkeypatch.setattr(warm_up, "knows_fp8", lambda device: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    small, large, demo = warm_up.known_models()
    done = list(warm_up.warm_up(small, torch.device("cuda")))
    mxfp4 = ((MXFP4, MXFP4),)
    assert compiled == [
        ("24 layers", 131072, mxfp4, None), ("24 layers", 131072, mxfp4, "fp8_row"),
    ]  # fmt: skip
    line = doctor.describe_warm_up(done[1])
    assert line.startswith("openai/gpt-oss-20b, dense fp8, context of 131072 tokens: 7 kernels in")
    (left_out,) = warm_up.warm_up(large, torch.device("cuda"))
    assert "needs 7" in left_out.why_not and "left out" in doctor.describe_warm_up(left_out)
    (*_, last) = warm_up.warm_up(demo, torch.device("cuda"), max_context=300)
    assert last.max_context == 300 and compiled[-1][2] == mxfp4
