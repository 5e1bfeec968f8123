"""benchmarks/bench_decode.py: all figures of a child come back into one table, a peer's too."""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_decode.py"
PEER = {
    "runtime": "peer", "version": "0.1", "gpu": "H100", "model": "gpt-oss-20b", "context": 128,
    "tokens_per_s": 316.0, "tokens_per_s_min": 315.3, "time_to_first_token_ms": {"128": 12.8},
    "start_s": 153.0,
}  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_decode", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_decode", module)
    spec.loader.exec_module(module)
    return module


def test_a_child_gives_every_figure(script, tmp_path, monkeypatch, capsys):
    write_tiny_gpt_oss(tmp_path, layers=1, d=32, f=32, heads=2, kv=1, hd=16, experts=2, topk=1)
    monkeypatch.setattr(script, "PROMPTS", (5, 9))
    options = argparse.Namespace(
        folder=tmp_path, name="tiny", dense=["fp8"], context=[7], tokens=16, repeats=1,
        device="cpu", backend="auto",
    )  # fmt: skip
    script.run_child(options)
    rows = [script.Row(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    assert {row.formats for row in rows} == {"dense=fp8 experts=mxfp4"}
    found = {(row.metric, row.context) for row in rows}
    assert found >= {
        ("start_s", 5), ("read_gbps", 0), ("decode_tokens_per_s", 7), ("bandwidth_share", 7),
        ("first_token_ms", 5), ("first_token_ms", 9), ("start_weights_s", 5),
    }  # fmt: skip


def test_a_section_that_fails_is_named_and_the_others_go_on(script, tmp_path, monkeypatch, capsys):
    from moe_runtime import benchmark

    write_tiny_gpt_oss(tmp_path, layers=1, d=32, f=32, heads=2, kv=1, hd=16, experts=2, topk=1)
    monkeypatch.setattr(script, "PROMPTS", (5, 9))

    def broken(*_, **__):
        raise RuntimeError("no room")

    monkeypatch.setattr(benchmark, "measure_decode", broken)
    options = argparse.Namespace(
        folder=tmp_path, name="tiny", dense=["as-published"], context=[7], tokens=8, repeats=1,
        device="cpu", backend="auto",
    )  # fmt: skip
    script.run_child(options)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"failed": "decoding at 7", "why": "RuntimeError: no room"} in lines
    assert lines[-1]["metric"] == "first_token_ms"


def test_lines_of_a_peer(script):
    rows = script.peer_rows(json.dumps(PEER))
    assert [(row.metric, row.context, row.value) for row in rows] == [
        ("decode_tokens_per_s", 128, 316.0), ("decode_tokens_per_s_min", 128, 315.3),
        ("first_token_ms", 128, 12.8), ("start_s", 128, 153.0),
    ]  # fmt: skip
    (row,) = script.peer_rows("2026-11-24,abc,H100,peer 1,m,dense=bf16,8192,first_token_ms,7.5,ms")
    assert (row.runtime, row.context, row.value) == ("peer 1", 8192, 7.5)
    for other in ("", "loading", "date,commit,gpu,runtime,model,formats,context,metric,value,unit",
                  "{not json", '{"runtime": "peer"}'):  # fmt: skip
        assert script.peer_rows(other) == []


def test_the_table_has_targets_and_the_peer(script, tmp_path):
    table = script.Table()
    head = ("NVIDIA H100 80GB HBM3", "moe_runtime 1.0.0", "gpt-oss-20b", "dense=bf16 experts=mxfp4")
    for metric, value in (("decode_tokens_per_s", 582.0), ("step_tokens_per_s", 600.0),
                          ("bandwidth_share", 0.6), ("first_token_ms", 11.25)):  # fmt: skip
        table.add(script.Row(*head, 128, metric, value, "x"), tmp_path / "rows.csv")
    for row in script.peer_rows(json.dumps(PEER)):
        table.add(row, None)
    *_, line = table.lines([128, 8192])
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "gpt-oss-20b", "bf16", "128", "582", "600", "3.0 %", "560", "700", "970", "60 %", "316",
        "11.2 / - (12.8 / -) ms", "-",
    ]  # fmt: skip
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 5
    for context, metric, value in ((8192, "decode_tokens_per_s", 291.0),
                                   (128, "start_compile_s", 3.25)):  # fmt: skip
        table.add(script.Row(*head, context, metric, value, "x"), None)
    for row in script.peer_rows(json.dumps({**PEER, "context": 8192})):
        table.add(row, None)
    assert list(table.remarks([128, 8192])) == [
        "gpt-oss-20b bf16: context 8192 at 50.0 % of 128",
        "gpt-oss-20b bf16: behind the peer at context 8192",
        "gpt-oss-20b bf16: seconds of the start: compile 3.25",
    ]


def test_a_command_is_ended_when_the_time_is_up(script, capsys):
    deadline = script.Deadline(1.5)
    begin = time.monotonic()
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert list(deadline.lines(command, "sleeper")) == ["begun"]
    assert time.monotonic() - begin < 10
    assert "sleeper: ended with status -15 (the time is up)" in capsys.readouterr().err
    assert list(deadline.lines(command, "another")) == []
    assert "another: left out" in capsys.readouterr().err
