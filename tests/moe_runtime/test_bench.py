"""`bench` on a tiny checkpoint: every figure is there, rows have the project's columns."""

import csv
import json

import pytest

from moe_runtime import benchmark
from moe_runtime.cli import run
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    write_tiny_gpt_oss(path, layers=2, d=32, f=32, heads=2, kv=1, hd=16, experts=2, topk=1)
    return path


def test_json_and_csv(folder, tmp_path, capsys):
    rows_path = tmp_path / "rows.csv"
    arguments = ["--context", "9", "--tokens", "32", "--repeats", "1", "--prompt-tokens", "5"]
    arguments += ["--device", "cpu", "--csv", str(rows_path), "--name", "tiny", "--json"]
    assert run(["bench", str(folder), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader(rows_path.open()))
    assert tuple(rows[0]) == benchmark.COLUMNS
    found = {(m["metric"], m["context"]): m["value"] for m in report["measurements"]}
    assert set(found) == {
        ("start_s", 5), ("start_imports_s", 5), ("start_open_s", 5), ("start_device_s", 5),
        ("start_weights_s", 5),
        ("start_first_token_s", 5), ("first_token_ms", 5), ("decode_tokens_per_s", 9),
        ("decode_tokens_per_s_min", 9), ("decode_tokens_per_s_max", 9), ("bandwidth_share", 9),
    }  # fmt: skip
    parts = [found[f"start_{part}_s", 5] for part in ("imports", "open", "weights", "first_token")]
    assert min(parts) > 0 and found["first_token_ms", 5] > 0
    assert 0.8 * sum(parts) - 0.1 < found["start_s", 5]  # one after the other on a CPU
    # Decode speed is a difference of two times: on a busy machine it may be anything but absurd.
    speeds = [found[f"decode_tokens_per_s{end}", 9] for end in ("_min", "", "_max")]
    assert speeds == sorted(speeds) and all(abs(speed) < 1e5 for speed in speeds)
    assert [float(row["value"]) for row in rows] == pytest.approx(list(found.values()), rel=1e-4)
    assert {row["formats"] for row in rows} == {"dense=bf16 experts=mxfp4"}
    assert {row["runtime"] for row in rows} == {"moe_runtime 1.0.0"}


def test_rows_are_appended_without_a_second_header(folder, tmp_path):
    report = benchmark.BenchReport(
        "gpu", "triton", "dense=bf16", 3000.0, [benchmark.Measurement("start_s", 1, 2.0, "s")]
    )
    for _ in range(2):
        report.append_csv(tmp_path / "rows.csv", "m")
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3


def test_share_is_bytes_over_bandwidth(folder):
    class Plan:
        def decode_bytes(self, context):
            return {"experts": 10**9, "cache": context * 10**6}

    class Model:
        plan = Plan()

    decode = benchmark.Measurement("decode_tokens_per_s", 500, 1000.0, "tokens/s")
    assert benchmark.bandwidth_share(Model(), decode, 3000.0).value == pytest.approx(0.5)
