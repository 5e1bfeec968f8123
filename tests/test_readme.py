"""README.md: its first two blocks are set-up and tests, .ci/run runs the second as it stands."""

import csv
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block_under(heading: str) -> str:
    found = re.search(rf"^## {heading}\n.*?^```bash\n(.*?)^```", README, re.S | re.M)
    assert found, f"no block under {heading}"
    return found[1]


def test_first_two_blocks_are_set_up_and_tests():
    headings = re.findall(r"^## (.*)", README, re.M)
    assert headings[:2] == ["Quick start", "Tests"]
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.S | re.M)
    assert blocks[:2] == [block_under("Quick start"), block_under("Tests")]
    assert "moe-runtime generate demo" in blocks[0]
    assert "python -m pytest" in blocks[1]


def test_ci_runs_the_block_as_it_stands(tmp_path):
    """The script of CI, with a README whose block says what it ran."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    text = README.replace(block_under("Tests"), "echo one\nfalse || echo two\nexit 5\n")
    (tmp_path / "README.md").write_text(text)
    done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("one\ntwo\n", 5)
    (tmp_path / "README.md").write_text("# nothing here\n")
    done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "no command block" in done.stderr


def test_speeds_are_those_of_the_results():
    """Every figure of the table of speeds is a row of the CSV, rounded."""
    rows = list(csv.DictReader((ROOT / "benchmarks" / "results" / "h100.csv").open()))
    value = {  # the last of each
        (r["runtime"].split()[0], r["model"], r["formats"].split()[0], int(r["context"]),
         r["metric"]): float(r["value"])
        for r in rows if r["context"] and r["formats"].endswith("experts=mxfp4")
    }  # fmt: skip
    tables = re.findall(r"^\| (gpt-oss-\w+), (.*?) \|(.*)", README, re.M)
    checked = 0
    for model, what, cells in tables:
        length = (
            int(re.search(r"(?:context |of a )([\d,]+)", what)[1].replace(",", ""))
            if (re.search(r"(?:context |of a )([\d,]+)", what))
            else 128
        )
        metric = (
            "decode_tokens_per_s" if "tokens/s" in what
            else "start_s" if "start" in what else "first_token_ms"
        )  # fmt: skip
        numbers = [re.sub(r"[^\d.]", "", cell) for cell in cells.split("|")[:5]]
        columns = (
            ("moe_runtime", "bf16", metric), ("moe_runtime", "bf16", "bandwidth_share"),
            ("moe_runtime", "fp8", metric), ("moe_runtime", "fp8", "bandwidth_share"),
            ("vllm", "bf16", metric),
        )  # fmt: skip
        for (runtime, dense, name), cell in zip(columns, numbers, strict=True):
            if cell:
                scale = 100 if name == "bandwidth_share" else 1
                found = scale * value[runtime, model, f"dense={dense}", length, name]
                assert float(cell) == round(found), (model, what, dense)
                checked += 1
    assert checked >= 39


def test_speeds_on_an_h200_are_those_of_the_results():
    rows = list(csv.DictReader((ROOT / "benchmarks" / "results" / "h200.csv").open()))
    value = {
        (r["formats"].split()[0], r["context"]): float(r["value"])
        for r in rows if r["metric"] == "decode_tokens_per_s"
    }  # fmt: skip
    lines = re.findall(r"^\| gpt-oss-120b \| (FP8|bf16) \|(.*)\|$", README, re.M)
    shown = {
        (f"dense={dense.lower()}", context): int(cell)
        for dense, cells in lines
        for context, cell in zip(("128", "8192", "65536"), cells.split("|"), strict=True)
        if cell.strip()
    }
    assert shown == {key: round(found) for key, found in value.items()}


def test_speeds_of_deepseek_are_those_of_the_results():
    """Every figure of DeepSeek's table is a row of the CSV; what is computed follows from them."""
    rows = list(csv.DictReader((ROOT / "benchmarks" / "results" / "h100.csv").open()))
    value = {
        (r["model"], "bf16" in r["formats"].split()[0], int(r["context"]), r["metric"]):
            float(r["value"])
        for r in rows if r["context"] and r["model"].startswith("deepseek")
    }  # fmt: skip
    table = re.findall(r"^\| (deepseek-\S+) \| (bf16|FP8 .*?) \| (.*) \|$", README, re.M)
    models = [(model, weights.startswith("bf16")) for model, weights, _ in table]
    assert set(models) == {key[:2] for key in value} and len(models) == len(set(models)) == 5
    columns = [
        (context, metric)
        for context in (1024, 32768)
        for metric in ("decode_tokens_per_s", "bandwidth_share")
    ]
    for (model, is_bf16), (_, _, cells) in zip(models, table, strict=True):
        for (context, metric), cell in zip(columns, cells.split("|"), strict=True):
            scale = 100 if metric == "bandwidth_share" else 1
            found = scale * value[model, is_bf16, context, metric]
            assert int(re.sub(r"\D", "", cell)) == round(found), (model, context, metric)

    def of_v4(metric):
        return value["deepseek-v4-flash-22-layers", False, 1024, metric]

    step, head = 1e6 / of_v4("decode_tokens_per_s"), 337
    whole = (step - head) / 22 * 43 + head
    assert f"({step:,.0f} us at context 1,024)" in README and f"are {whole:,.0f} us" in README
    assert f"{1e6 / whole:.0f} tokens/s on one GPU" in README
    parts = ("qkv", "attention", "output_projection", "experts_gate_up", "experts_down")
    stamped = {key[3]: of_v4(key[3]) for key in value if re.match("step_.+_us", key[3])
               and key[:3] == ("deepseek-v4-flash-22-layers", False, 1024)}  # fmt: skip
    share = sum(stamped[f"step_{part}_us"] for part in parts) / sum(stamped.values())
    halved = whole - (share * step / 22 * 43 + head) / 2
    assert f"are bounded by {1e6 / halved:.0f} tokens/s" in README


def test_formats_are_those_of_the_results():
    """The table of formats: each figure is a row of the CSV, rounded as it stands there."""
    rows = list(csv.DictReader((ROOT / "benchmarks" / "results" / "cpu_2core.csv").open()))
    found = {(row["formats"].removeprefix("experts="), row["metric"]): row["value"] for row in rows}
    metrics = ("sqnr_normal", "sqnr_heavy_tails", "perplexity", "kl", "top1_agreement",
               "encode_mb_per_s")  # fmt: skip
    labels = ("bf16", "MXFP4 floor", "MXFP4 even", "MXFP4 rceil", "MXFP4 even search", "NVFP4",
              "NVFP4 search", "MXFP8 even", "FP8 128x128", "FP8 128x128 powers of two",
              "FP8 by row")  # fmt: skip
    table = re.search(r"^\| to \| bits a weight.*?\n\n", README, re.S | re.M)[0]
    lines = table.strip().splitlines()[2:]
    checked = 0
    for label, line in zip(labels, lines, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")][2:]
        for metric, cell in zip(metrics, cells, strict=True):
            value = found.get((label, metric))
            if not cell or (label == "bf16" and metric != "perplexity"):
                continue
            shown = cell.removesuffix(" %")
            digits = len(shown.partition(".")[2])
            scale = 100 if metric == "top1_agreement" else 1
            difference = abs(float(shown) - scale * float(value))
            assert difference <= 0.501 * 10.0**-digits, (label, metric, value)
            checked += 1
    assert checked == 61
