"""Measuring a loaded model: start, decode speed by context, time to first token, bandwidth's share.

Decode speed is taken by difference: SHORT_TOKENS, then SHORT_TOKENS + N after the same length of
fresh random prompt, end token ignored; prefill and the cost of a request cancel out. The captured
step alone is timed by the GPU: what decoding loses besides is the difference.
"""

from __future__ import annotations

import csv
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from kernels.read_bandwidth import read_bandwidth
from moe_runtime import __version__
from moe_runtime.model import MoeModel
from moe_runtime.roofline import Roofline, measure_roofline
from moe_runtime.start_times import process_age_s
from moe_runtime.timeline import timeline_svg
from moe_runtime.triton_backend import TritonBackend

RUNTIME = f"moe_runtime {__version__}"
SHORT_TOKENS = 8
COLUMNS = (
    "date",
    "commit",
    "gpu",
    "runtime",
    "model",
    "formats",
    "context",
    "metric",
    "value",
    "unit",
)


@dataclass(frozen=True)
class Measurement:
    """One figure with the context it was taken at."""

    metric: str  # the unit is its last word or words: decode_tokens_per_s, first_token_ms
    context: int  # tokens in the cache or the prompt when the measurement began
    value: float
    unit: str


def measure_start(model: MoeModel, prompt_tokens: int) -> list[Measurement]:
    """A first request: seconds from the process's start to its token, then by part.

    Of a process whose first model this is. Reading weights and compiling go on at the same time.
    """
    first_s = _generate_s(model, prompt_tokens, 1)
    parts = {"": process_age_s(), **model.start_times, "first_token": first_s}
    names = {part: f"start_{part}_s" if part else "start_s" for part in parts}
    return [Measurement(names[part], prompt_tokens, parts[part], "s") for part in parts]


def measure_decode(
    model: MoeModel,
    context: int,
    tokens: int,
    repeats: int,
    on_step: Callable[[], None],
    *,
    temperature: float = 0.0,
) -> list[Measurement]:
    """Decode speed after `context` tokens over `tokens` new ones: median, least and most."""
    _generate_s(model, context, SHORT_TOKENS + tokens, temperature)
    on_step()
    speeds = []
    for _ in range(repeats):
        short = _generate_s(model, context, SHORT_TOKENS, temperature)
        long = _generate_s(model, context, SHORT_TOKENS + tokens, temperature)
        speeds.append(tokens / (long - short))
        on_step()
    return [
        Measurement("decode_tokens_per_s", context, statistics.median(speeds), "tokens/s"),
        Measurement("decode_tokens_per_s_min", context, min(speeds), "tokens/s"),
        Measurement("decode_tokens_per_s_max", context, max(speeds), "tokens/s"),
    ]


def measure_step(model: MoeModel, context: int, tokens: int, repeats: int) -> list[Measurement]:
    """The same rate of the captured step alone; [] where nothing is captured.

    To be called after a request of that length, whose cache is read again.
    """
    backend = model.open_backend
    if not isinstance(backend, TritonBackend) or backend.device.type != "cuda":
        return []
    seconds = [backend.time_steps(context + SHORT_TOKENS, tokens) for _ in range(repeats)]
    return [Measurement("step_tokens_per_s", context, 1 / statistics.median(seconds), "tokens/s")]


def measure_first_token(
    model: MoeModel, prompt_tokens: int, repeats: int, on_step: Callable[[], None]
) -> Measurement:
    """Median time of a whole request of one new token, in ms."""
    _generate_s(model, prompt_tokens, 1)
    times = []
    for _ in range(repeats):
        times.append(_generate_s(model, prompt_tokens, 1))
        on_step()
    return Measurement("first_token_ms", prompt_tokens, 1e3 * statistics.median(times), "ms")


def bandwidth_share(model: MoeModel, decode: Measurement, gbps: float) -> Measurement:
    """Bytes read a second while decoding over the measured read bandwidth (GB/s)."""
    read = sum(model.plan.decode_bytes(decode.context).values())
    share = read * decode.value / (gbps * 1e9)
    return Measurement("bandwidth_share", decode.context, share, "share")


def run_bench(
    model_name: str,
    *,
    revision: str | None,
    device: str,
    backend: str,
    dense_format: str,
    contexts: Sequence[int],
    prompts: Sequence[int],
    tokens: int,
    repeats: int,
    max_context: int | None,
    on_step: Callable[[], None],
    with_roofline: bool = False,
    timeline: Path | None = None,
) -> BenchReport:
    """Load a model and take every figure; on_step is called after each timed run.

    with_roofline: where the time of a step goes too, at each context (a GPU alone)
    timeline:      an SVG of the step at the first context
    """
    longest = max(max(prompts) + 1, max(contexts) + SHORT_TOKENS + tokens)
    with MoeModel.from_pretrained(
        model_name,
        revision=revision,
        device=device,
        backend=backend,
        dense_format=dense_format,
        max_context=max_context or longest,
    ) as model:
        found = measure_start(model, min(prompts))
        for length in prompts:
            found.append(measure_first_token(model, length, repeats, on_step))
        bandwidth = read_bandwidth(model.device)
        rooflines = []
        for context in contexts:
            decode = measure_decode(model, context, tokens, repeats, on_step)
            found += [*decode, *measure_step(model, context, tokens, repeats)]
            found.append(bandwidth_share(model, decode[0], bandwidth.gbps))
            if with_roofline:
                parts, trace = measure_roofline(model, context, bandwidth.gbps)
                rooflines.append(parts)
                if timeline and context == contexts[0]:
                    title = f"{model_name}, {model.plan.format_label}, context {context}, "
                    title += device_name(model.device)
                    timeline.write_text(timeline_svg(trace, title), encoding="utf-8")
        return BenchReport(
            gpu=device_name(model.device),
            backend=model.backend,
            formats=model.plan.format_label,
            read_gbps=bandwidth.gbps,
            measurements=found,
            rooflines=rooflines,
        )


@dataclass(frozen=True)
class BenchReport:
    """All figures of one run and what they were taken on."""

    gpu: str
    backend: str
    formats: str
    read_gbps: float  # measured read bandwidth of the device
    measurements: list[Measurement]
    rooflines: list[Roofline] = field(default_factory=list)  # one a context, if asked for

    def table(self) -> str:
        """Aligned lines for a person."""
        lines = [f"{self.gpu}, {self.backend} backend, {self.formats}, batch 1",
                 f"{'measured read bandwidth':32}{self.read_gbps:10.0f} GB/s"]  # fmt: skip
        for m in self.measurements:
            label = f"{m.metric} @ {m.context}"
            digits = 2 if m.unit == "s" else 1
            value = f"{m.value:10.{digits}f} {m.unit}"
            if m.unit == "share":
                value = f"{100 * m.value:10.1f} %"
            lines.append(f"{label:32}{value}")
        tables = [roofline.table() for roofline in self.rooflines]
        return "\n\n".join(["\n".join(lines), *tables])

    def as_dict(self, model: str) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return {"model": model, "runtime": RUNTIME, **asdict(self)}

    def append_csv(self, path: Path, model: str) -> None:
        """Append one row a figure and one a component of a roofline; a new file gets the header."""
        parts = [
            Measurement(f"step_{part.component.replace(' ', '_')}_us", one.context, part.us, "us")
            for one in self.rooflines
            for part in one.components
        ]
        figures = [*self.measurements, *parts]
        append_rows(path, self.gpu, RUNTIME, model, self.formats, figures)


def append_rows(
    path: Path,
    gpu: str,
    runtime: str,
    model: str,
    formats: str,
    measurements: Iterable[Measurement],
) -> None:
    """Append one row a figure, with today's date and the commit; a new file gets the header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for m in measurements:
            row = [date.today().isoformat(), commit(), gpu, runtime, model, formats]
            writer.writerow([*row, m.context, m.metric, f"{m.value:.6g}", m.unit])


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()} x{torch.get_num_threads()}"


def commit() -> str:
    """Short hash of the source tree's commit, or "unknown" outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _generate_s(model: MoeModel, context: int, tokens: int, temperature: float = 0.0) -> float:
    """Seconds of one request on a fresh random prompt."""
    vocab_size = model.config.vocab_size
    prompt = [random.randrange(vocab_size) for _ in range(context)]
    begin = time.perf_counter()
    generation = model.generate(
        prompt, max_new_tokens=tokens, temperature=temperature, top_p=1.0, top_k=0, ignore_eos=True
    )
    seconds = time.perf_counter() - begin
    if len(generation.token_ids) != tokens:
        raise RuntimeError(f"asked for {tokens} tokens, got {len(generation.token_ids)}")
    return seconds
