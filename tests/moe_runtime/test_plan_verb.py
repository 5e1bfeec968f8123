"""`moe-runtime plan` as users type it: text, JSON, the hub by headers alone, errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from loaders.checkpoint import open_folder
from loaders.errors import CheckpointError
from moe_runtime import machines
from moe_runtime.cli import run
from moe_runtime.machines import Machine
from moe_runtime.planning.report import plan_checkpoint
from tests.loaders.hub_server import ROOT, FakeHub, client_environment, serve
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_gpt_oss(folder)
    return folder


def test_every_section_is_there(capsys):
    assert run(["plan", "demo", "--gpu", "rtx 4090", "--context", "2000"]) == 0
    text = capsys.readouterr().out
    assert "demo: GptOssForCausalLM, 6 layers, 4 of 8 experts a token" in text
    assert "On NVIDIA GeForce RTX 4090 (25.8 GB, reads 927 GB/s, 92 % of the data sheet's" in text
    assert "What if, after 2000 tokens" in text
    rows = ("embedding ", "cache ", "total ", "mxfp4 ", "kv fp8 ", "NVIDIA B200 ", "fp8-channel ")
    for words in (*(f"  {row}" for row in rows), "note: a step of so few bytes is bound by"):
        assert words in text, words
    assert max(map(len, text.splitlines())) < 200


def test_json_has_what_the_text_has(tiny, capsys):
    assert run(["plan", str(tiny), "--gpu", "h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == str(tiny)
    assert found["machine"]["name"] == "NVIDIA H200"
    assert found["token_bytes"] == sum(found["read_by_component"].values())
    assert found["total_bytes"] == sum(part["nbytes"] for part in found["components"])
    assert [row["context"] for row in found["contexts"]] == [1024, 8192, 32768, 131072]
    assert {row["target"] for row in found["conversions"]} >= {"mxfp4", "nvfp4", "fp8-block"}
    assert found["backends"] == ["triton", "reference"]


def test_the_vendors_layout_gives_the_same_plan(tiny, tmp_path):
    write_tiny_gpt_oss(tmp_path, layout="original")
    gpu = machines.find_gpu("h100")
    with open_folder(tiny) as checkpoint, open_folder(tmp_path) as original:
        ours, theirs = (plan_checkpoint(one, gpu) for one in (checkpoint, original))
    assert theirs.layout == "original"
    assert (theirs.contexts, theirs.what_if) == (ours.contexts, ours.what_if)
    first, *rows = zip(theirs.conversions, ours.conversions, strict=True)
    assert all(one == other for one, other in rows)
    assert first[0].output_bytes == ours.total_bytes  # mxfp4: the published names
    assert first[1].problem == "no routed experts that are not in mxfp4 already"


def test_without_a_name_the_gpu_here_is_measured(tiny, monkeypatch, capsys):
    here = Machine("Some GPU", 10**10, 1234.0, "measured now", (8, 0))
    monkeypatch.setattr("moe_runtime.commands.plan.gpu_here", lambda: here)
    assert run(["plan", str(tiny)]) == 0
    shown = capsys.readouterr()
    assert "On Some GPU (10.0 GB, reads 1234 GB/s, measured now)" in shown.out
    assert not shown.err
    monkeypatch.setattr("moe_runtime.commands.plan.gpu_here", lambda: None)
    assert run(["plan", str(tiny)]) == 0
    shown = capsys.readouterr()
    assert (
        "On NVIDIA H100 80GB HBM3 (85.5 GB, reads 3100 GB/s, measured on one before)" in shown.out
    )
    assert shown.err == "note: no GPU here: planned for h100; --gpu names another\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "voodoo"], "error: there is no GPU named 'voodoo' in the table: expected one"),
        (["--context", "0"], "error: --context must be from 1 to 131072, got 0"),
        (["--context", "131073"], "error: --context must be from 1 to 131072, got 131073"),
    ],
)
def test_errors_are_one_line(tiny, arguments, message, capsys):
    assert run(["plan", str(tiny), *arguments]) == 1
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.startswith(message) and len(shown.err.splitlines()) == 1


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path, capsys):
    assert run(["plan", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_codes_without_scales_are_an_error(tiny, tmp_path):
    tensors = write_tiny_gpt_oss(tmp_path, shards=1)
    path = tmp_path / "model.safetensors"
    renamed = path.read_bytes().replace(
        b"0.mlp.experts.down_proj_scales", b"0.mlp.experts.down_proj_xcales"
    )
    path.write_bytes(renamed)
    assert any(name.endswith("_scales") for name in tensors)
    with open_folder(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="scales"):
        plan_checkpoint(checkpoint, machines.find_gpu("h100"))


def test_a_hub_model_is_planned_from_its_headers(tmp_path):
    write_tiny_gpt_oss(tmp_path / "model", vocab=4096)
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with serve(FakeHub(repos={"acme/tiny": files})) as hub:
        command = [sys.executable, "-m", "moe_runtime", "plan", "acme/tiny", "--gpu", "h100"]
        done = subprocess.run(
            [*command, "--json"], cwd=ROOT, env=client_environment(hub, tmp_path / "cache"),
            text=True, capture_output=True,
        )  # fmt: skip
        fetched = hub.fetched()
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    shards = {name: size for name, size in files.items() if name.endswith(".safetensors")}
    assert all(0 < fetched[name] <= 100_000 < len(data) for name, data in shards.items())
    possible = [row for row in report["conversions"] if row["problem"] is None]
    assert possible  # to bf16, with a shard of the source beside the result
    assert all(row["disk_bytes"] > row["output_bytes"] for row in possible)
