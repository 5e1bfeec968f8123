"""GPT-OSS of random weights at batch 1: decode speed, its parts, the start, a peer beside it.

    python benchmarks/bench_decode.py --csv benchmarks/results/h100.csv
    python benchmarks/bench_decode.py --shape 120b --dense fp8 --context 128 --limit-s 240
    python benchmarks/bench_decode.py --shape 20b --experts nvfp4
    python benchmarks/bench_decode.py --peer "python3 peer.py --model {shape} --context {contexts}"

Each shape and dense format is opened once, in a process of its own, so the start is that of a
process, and what fails takes nothing else with it. A figure is printed and written as soon as it is
there. Checkpoints are written to --folder unless they are there, and removed again.

Decoding is sampled (temperature 1), the end token ignored, prompts are fresh random tokens. The
rate is that of model.generate, by difference (see moe_runtime/benchmark.py); the step alone is the
captured graph, timed by the GPU. Every figure is a median of --repeats.

A peer's lines on stdout are rows of CSV in the columns of benchmarks/results, or JSON objects with
runtime, version, gpu, model, context, tokens_per_s (and _min, _max), start_s and
time_to_first_token_ms by prompt length; other lines are ignored.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
HERE = Path(__file__).resolve().parent
SHAPES = ("20b", "120b")
DENSE = ("as-published", "fp8")
EXPERTS = ("mxfp4", "nvfp4", "mxfp8", "fp8-channel", "fp8-block")
PROMPTS = (128, 2048)  # of first-token times
# (GPU, shape, dense) -> tokens a second at context 128: what must be reached, and the aim.
TARGETS = {
    ("H100", "20b", "bf16"): (560, 700),
    ("H100", "20b", "fp8"): (750, 1050),
    ("H100", "120b", "bf16"): (420, 520),
    ("H100", "120b", "fp8"): (530, 740),
    ("H200", "120b", "fp8"): (620, 1000),
}


@dataclass
class Row:
    """One figure, ours or a peer's; the columns of benchmarks/results but date and commit."""

    gpu: str
    runtime: str
    model: str
    formats: str
    context: int
    metric: str
    value: float
    unit: str


@dataclass
class Table:
    """All figures so far."""

    experts: str = "mxfp4"  # format of the experts; targets are for the published one
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row, csv_path: Path | None) -> None:
        """Keep a figure, print it and append it to the file."""
        self.rows.append(row)
        print(f"{row.model} {row.formats} {row.runtime}: {row.metric} @ {row.context}"
              f" {row.value:.4g} {row.unit}", file=sys.stderr, flush=True)  # fmt: skip
        if csv_path:
            from moe_runtime.benchmark import Measurement, append_rows  # slow import: torch

            figure = Measurement(row.metric, row.context, row.value, row.unit)
            append_rows(csv_path, row.gpu, row.runtime, row.model, row.formats, [figure])

    def find(self, model: str, dense: str, peer: bool, metric: str, context: int) -> float | None:
        """The last value of a metric; a peer has one dense format, whatever it says."""
        for row in reversed(self.rows):
            ours = row.runtime.startswith("moe_runtime")
            if (row.model, row.metric, row.context) != (model, metric, context) or ours is peer:
                continue
            if peer or f"dense={dense} " in row.formats + " ":
                return row.value
        return None

    def lines(self, contexts: list[int]) -> Iterator[str]:
        """A Markdown table, one row a model, dense format and context."""
        yield ("| model | dense | context | tokens/s | step alone | apart | must | aim | roofline |"
               " of it | peer | first token 128 / 2048 (peer) | start |")  # fmt: skip
        yield "|" + " --- |" * 13
        for model, gpu, dense in self._ours():
            for context in contexts:
                if line := self._line(model, gpu, dense, context):
                    yield line

    def remarks(self, contexts: list[int]) -> Iterator[str]:
        """What the table does not say: long contexts against the shortest, the parts of a start."""
        for model, _, dense in self._ours():
            found = {c: self.find(model, dense, False, "decode_tokens_per_s", c) for c in contexts}
            rates = {context: rate for context, rate in found.items() if rate}
            for context, rate in list(rates.items())[1:]:
                share = 100 * rate / next(iter(rates.values()))
                yield f"{model} {dense}: context {context} at {share:.1f} % of {next(iter(rates))}"
            for context, rate in rates.items():
                theirs = self.find(model, dense, True, "decode_tokens_per_s", context)
                if theirs and theirs > rate:
                    yield f"{model} {dense}: behind the peer at context {context}"
            parts = [
                f"{row.metric[6:-2].replace('_', ' ')} {row.value:.2f}"
                for row in self.rows
                if row.metric.startswith("start_") and row.metric != "start_s"
                and (row.model, _dense_of(row.formats)) == (model, dense)
            ]  # fmt: skip
            if parts:
                yield f"{model} {dense}: seconds of the start: {', '.join(parts)}"

    def _ours(self) -> list[tuple[str, str, str]]:
        """(model, GPU, dense) of our rows, in order."""
        found = (
            (row.model, row.gpu, _dense_of(row.formats))
            for row in self.rows
            if row.runtime.startswith("moe_runtime")
        )
        return list(dict.fromkeys(found))

    def _line(self, model: str, gpu: str, dense: str, context: int) -> str | None:
        def ours(metric: str, at: int = context) -> float | None:
            return self.find(model, dense, False, metric, at)

        def peers(metric: str, at: int = context) -> float | None:
            return self.find(model, dense, True, metric, at)

        rate, step = ours("decode_tokens_per_s"), ours("step_tokens_per_s")
        if rate is None:
            return None
        share = ours("bandwidth_share")
        shape = model.removeprefix("gpt-oss-")
        named = next((g for g in ("H200", "H100") if g in gpu), "")
        targets = TARGETS if context == 128 and self.experts == "mxfp4" else {}
        must, aim = targets.get((named, shape, dense), (None, None))
        first = [shown(ours("first_token_ms", n), ".1f") for n in PROMPTS]
        theirs = [shown(peers("first_token_ms", n), ".1f") for n in PROMPTS]
        cells = [
            model, dense, str(context), shown(rate, ".0f"), shown(step, ".0f"),
            shown(100 * (1 - rate / step) if step else None, ".1f", " %"),
            shown(must, ".0f"), shown(aim, ".0f"),
            shown(rate / share if share else None, ".0f"),
            shown(100 * share if share else None, ".0f", " %"),
            shown(peers("decode_tokens_per_s"), ".0f"),
            f"{' / '.join(first)} ({' / '.join(theirs)}) ms",
            shown(ours("start_s", PROMPTS[0]), ".1f", " s"),
        ]  # fmt: skip
        return "| " + " | ".join(cells) + " |"


def shown(value: float | None, spec: str, unit: str = "") -> str:
    """A number, or a dash for none."""
    return "-" if value is None else f"{value:{spec}}{unit}"


def _dense_of(formats: str) -> str:
    return next((p.removeprefix("dense=") for p in formats.split() if p.startswith("dense=")), "")


def peer_rows(line: str) -> list[Row]:
    """The figures of one line of a peer's output; [] if it is something else."""
    line = line.strip()
    if line.startswith("{"):
        try:
            return _rows_of_json(json.loads(line))
        except (ValueError, KeyError, AttributeError, TypeError):
            return []
    cells = next(csv.reader([line]), [])
    try:
        _, _, gpu, runtime, model, formats, context, metric, value, unit = cells
        return [Row(gpu, runtime, model, formats, int(context), metric, float(value), unit)]
    except ValueError:  # another number of columns, or the header
        return []


def _rows_of_json(found: dict[str, Any]) -> list[Row]:
    runtime = f"{found['runtime']} {found.get('version', '')}".strip()
    formats = found.get("formats", "dense=bf16 experts=mxfp4")
    head = (found["gpu"], runtime, found["model"], formats)
    rows = []
    for ending in ("", "_min", "_max"):
        if (value := found.get(f"tokens_per_s{ending}")) is not None:
            metric = f"decode_tokens_per_s{ending}"
            rows.append(Row(*head, found["context"], metric, float(value), "tokens/s"))
    for length, value in (found.get("time_to_first_token_ms") or {}).items():
        rows.append(Row(*head, int(length), "first_token_ms", float(value), "ms"))
    if found.get("start_s") is not None:
        rows.append(Row(*head, PROMPTS[0], "start_s", float(found["start_s"]), "s"))
    return rows


def run_child(options: argparse.Namespace) -> None:
    """Measure one checkpoint in one dense format; a JSON line a figure on stdout."""
    from kernels.read_bandwidth import read_bandwidth
    from moe_runtime import MoeModel, benchmark

    longest = max(max(PROMPTS) + 1, max(options.context) + benchmark.SHORT_TOKENS + options.tokens)
    with MoeModel.from_pretrained(
        options.folder,
        device=options.device,
        backend=options.backend,
        dense_format=options.dense[0],
        max_context=longest,
        progress=False,
    ) as model:
        head = (benchmark.device_name(model.device), benchmark.RUNTIME, options.name)

        def give(found: list[benchmark.Measurement]) -> None:
            for m in found:
                row = Row(*head, model.plan.format_label, m.context, m.metric, m.value, m.unit)
                print(json.dumps(asdict(row)), flush=True)

        def nothing() -> None:
            pass

        def decode(context: int) -> None:
            amount = (context, options.tokens, options.repeats)
            found = benchmark.measure_decode(model, *amount, nothing, temperature=1.0)
            give([*found, benchmark.bandwidth_share(model, found[0], gbps)])
            give(benchmark.measure_step(model, *amount))

        give(benchmark.measure_start(model, PROMPTS[0]))
        gbps = read_bandwidth(model.device).gbps
        give([benchmark.Measurement("read_gbps", 0, gbps, "GB/s")])
        sections = [(f"decoding at {c}", lambda c=c: decode(c)) for c in options.context]
        for n in PROMPTS:
            sections.append((f"first token after {n}", lambda n=n: give(
                [benchmark.measure_first_token(model, n, max(5, options.repeats), nothing)]
            )))  # fmt: skip
        for name, section in sections:
            try:
                section()
            except Exception as error:  # the other sections go on
                print(json.dumps({"failed": name, "why": f"{type(error).__name__}: {error}"}))


class Deadline:
    """Runs commands until the time is up."""

    def __init__(self, limit_s: float) -> None:
        self.end = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def lines(self, command: list[str] | str, what: str) -> Iterator[str]:
        """Lines of a command's stdout as they come; it is ended when the time is up."""
        if self.left_s < 1:
            report(f"{what}: left out, the time is up")
            return
        process = subprocess.Popen(
            command, shell=isinstance(command, str), stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        timer = threading.Timer(self.left_s, os.killpg, (process.pid, signal.SIGTERM))
        timer.daemon = True
        timer.start()
        try:
            for line in process.stdout:
                yield line.rstrip("\n")
        finally:
            status = process.wait()
            timer.cancel()
        if status:
            late = " (the time is up)" if self.left_s < 1 else ""
            report(f"{what}: ended with status {status}{late}")


def report(problem: str) -> None:
    """One line about what went wrong, on stderr."""
    print(f"PROBLEM {problem}", file=sys.stderr, flush=True)


def measure_shape(
    options: argparse.Namespace, shape: str, table: Table, deadline: Deadline
) -> None:
    """Write the checkpoint if it is not there, measure it in each dense format, then the peer."""
    ending = "" if options.experts == "mxfp4" else f"-{options.experts}"
    folder = options.folder / f"gpt-oss-{shape}{ending}"
    written = not (folder / "model.safetensors.index.json").exists()
    layers = ["--layers", str(options.layers)] if options.layers else []
    name = f"gpt-oss-{shape}" + (f" of {options.layers} layers" if options.layers else "")
    try:
        if written:
            writer = [sys.executable, str(HERE / "write_random_checkpoint.py"), "--shape", shape]
            writer += ["--format", options.experts, *layers, "--output", str(folder)]
            for line in deadline.lines(writer, "writing"):
                print(line)
        for dense in options.dense:
            command = [sys.executable, __file__, "--child", "--folder", str(folder)]
            command += ["--name", name, "--dense", dense, "--device", options.device]
            command += ["--backend", options.backend, "--tokens", str(options.tokens)]
            command += ["--repeats", str(options.repeats)]
            for context in options.context:
                command += ["--context", str(context)]
            for line in deadline.lines(command, f"{name} {dense}"):
                found = json.loads(line)
                if "failed" in found:
                    report(f"{name} {dense}: {found['failed']}: {found['why']}")
                else:
                    table.add(Row(**found), options.csv)
    finally:
        if written and not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if options.peer:
        amounts = {"contexts": " ".join(map(str, options.context)), "tokens": options.tokens}
        filled = options.peer
        for key, value in {"shape": shape, "repeats": options.repeats, **amounts}.items():
            filled = filled.replace(f"{{{key}}}", str(value))
        for line in deadline.lines(filled, f"peer of {name}"):
            for row in peer_rows(line):
                table.add(row, options.csv)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: both")
    parser.add_argument("--dense", action="append", choices=DENSE, help="default: both")
    parser.add_argument("--experts", choices=EXPERTS, default="mxfp4", help="format of the experts")
    parser.add_argument("--context", action="append", type=int, help="default: 128 and 8192")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="of checkpoints")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints written here")
    parser.add_argument("--layers", type=int, help="fewer layers, to try it out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--peer", metavar="COMMAND",
                        help="run by the shell once a shape, with {shape} {contexts} {tokens} "
                        "{repeats} filled in")  # fmt: skip
    parser.add_argument("--limit-s", type=float, default=3600.0, help="seconds for all of it")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.shape = options.shape or list(SHAPES)
    options.dense = options.dense or list(DENSE)
    options.context = sorted(set(options.context or [128, 8192]))
    return options


def main() -> None:
    options = parse_arguments()
    if options.child:
        run_child(options)
        return
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    table, deadline = Table(options.experts), Deadline(options.limit_s)
    try:
        for shape in options.shape:
            try:
                measure_shape(options, shape, table, deadline)
            except Exception as error:  # the other shape goes on
                report(f"{shape}: {type(error).__name__}: {error}")
    finally:
        print("\n".join([*table.lines(options.context), "", *table.remarks(options.context)]))


if __name__ == "__main__":
    main()
