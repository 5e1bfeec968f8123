"""`moe-runtime plan`: what a model takes and how fast it would be, before any download."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from moe_runtime.commands.common import (
    json_option,
    model_argument,
    print_json,
    revision_option,
    verb,
)
from moe_runtime.commands.headers import open_headers
from moe_runtime.machines import DEFAULT_GPU, GPUS, Machine, find_gpu, gpu_here

if TYPE_CHECKING:
    from moe_runtime.planning.report import FitRow, PlanReport


@verb(
    "plan",
    examples="""
    moe-runtime plan openai/gpt-oss-120b
    moe-runtime plan openai/gpt-oss-120b --gpu rtx-5090 --context 32768
    moe-runtime plan deepseek-ai/DeepSeek-V4-Flash --gpu h200
    moe-runtime plan ./checkpoint --json
    """,
)
@model_argument
@revision_option
@click.option(
    "--gpu", metavar="NAME", help=f"Plan for this GPU: {', '.join(row.key for row in GPUS)}."
)
@click.option(
    "--context", type=int, metavar="N", help="Tokens in the cache; default 1024 where possible."
)
@json_option
def command(
    model: str, revision: str | None, gpu: str | None, context: int | None, as_json: bool
) -> None:
    """Plan for MODEL from its headers: memory, tokens a second, what fits where, conversions.

    Nothing is downloaded but headers. Without --gpu the plan is for the GPU here, whose read
    bandwidth is measured. Models that this version cannot run can be planned too.
    """
    named = find_gpu(gpu) if gpu else None
    # Slow import: torch.
    from moe_runtime.planning.report import plan_checkpoint

    with open_headers(model, revision) as checkpoint:
        machine = named or gpu_here()
        missing = machine is None
        others = [row.machine for row in GPUS]
        report = plan_checkpoint(
            checkpoint, machine or find_gpu(DEFAULT_GPU), others, context=context
        )
    if as_json:
        print_json({"model": model, **report.as_dict()})
        return
    click.echo("\n".join(describe(model, report)))
    if missing:
        click.echo(f"note: no GPU here: planned for {DEFAULT_GPU}; --gpu names another", err=True)


def describe(model: str, report: PlanReport) -> list[str]:
    """The report in lines."""
    machine = report.machine
    routing = f"{report.experts_per_token} of {report.experts} experts a token"
    parameters = f"{_count(report.parameters)} parameters, {_count(report.active_parameters)}"
    return [
        f"{model}: {report.architecture}, {report.layers} layers, {routing}",
        f"{parameters} for a token",
        "",
        *_components(report),
        "",
        f"On {_machine(machine)}, tokens/s predicted as a band",
        *_contexts(report),
        "",
        f"What if, after {report.context} tokens",
        *_what_if(report),
        "",
        f"What fits where, on one GPU: longest context and tokens/s after {report.context} tokens",
        *_fits(report),
        "",
        "Conversion: moe-runtime convert --to",
        *_conversions(report),
        *([""] if report.notes else []),
        *(f"note: {note}" for note in report.notes),
    ]


def _machine(machine: Machine) -> str:
    memory = f"{machine.memory_bytes / 1e9:.1f} GB"
    return f"{machine.name} ({memory}, reads {machine.read_gbps:.0f} GB/s, {machine.source})"


def _components(report: PlanReport) -> list[str]:
    read = dict(report.read_by_component)
    rows = [["component", "tensors", "parameters", "bytes", "read a token", "formats"]]
    for part in report.components:
        formats = ", ".join(f"{name} {_size(size)}" for name, size in part.formats.items())
        size, seen = _size(part.nbytes), _size(read.pop(part.name, 0))
        rows.append([part.name, str(part.tensors), _count(part.parameters), size, seen, formats])
    rows += [[name, "-", "-", "-", _size(size), ""] for name, size in read.items()]
    tensors = str(sum(part.tensors for part in report.components))
    total, seen = _size(report.total_bytes), _size(report.token_bytes)
    rows.append(["total", tensors, _count(report.parameters), total, seen, ""])
    return _table(rows, left=(0, 5))


def _contexts(report: PlanReport) -> list[str]:
    rows = [["context", "cache", "buffers", "memory", "read a token", "tokens/s", "bound", ""]]
    for row in report.contexts:
        rows.append(
            [
                str(row.context),
                _size(row.cache_bytes),
                _size(row.workspace_bytes),
                _size(row.total_bytes),
                _size(row.token_bytes),
                row.speed.text(),
                f"{row.speed.bound:.0f}",
                "" if row.fits else "does not fit",
            ]
        )
    return _table(rows, left=(7,))


def _what_if(report: PlanReport) -> list[str]:
    rows = [["", "weights", "memory", "read a token", "tokens/s", "longest context"]]
    for row in report.what_if:
        sizes = [_size(n) for n in (row.weight_bytes, row.total_bytes, row.token_bytes)]
        longest = str(row.longest_context) if row.longest_context else "does not fit"
        rows.append([row.name, *sizes, row.speed.text(), longest])
    return _table(rows, left=(0,))


def _fits(report: PlanReport) -> list[str]:
    names = list(dict.fromkeys(row.variant for row in report.fits))
    rows = [["GPU", *names]]
    by_gpu: dict[str, list[FitRow]] = {}
    for row in report.fits:
        by_gpu.setdefault(row.gpu, []).append(row)
    rows += [[gpu, *(_fit(row) for row in found)] for gpu, found in by_gpu.items()]
    return _table(rows, left=tuple(range(len(names) + 1)))


def _fit(row: FitRow) -> str:
    if row.longest_context:
        return f"{row.longest_context}: {row.speed.text()}"
    if row.gpus_needed > 1:
        return f"no: weights of {row.gpus_needed} GPUs"
    return "no: no room for a cache"


def _conversions(report: PlanReport) -> list[str]:
    rows = [["format", "weights", "result", "free disk", "memory", ""]]
    for row in report.conversions:
        if row.problem:
            rows.append([row.target, "-", "-", "-", "-", row.problem])
            continue
        sizes = [_size(n) for n in (row.output_bytes, row.disk_bytes, row.memory_bytes)]
        rows.append([row.target, str(row.converted), *sizes, ""])
    return _table(rows, left=(0, 5))


def _table(rows: list[list[str]], *, left: tuple[int, ...]) -> list[str]:
    """Aligned columns, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{width}}" if i in left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _count(number: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _size(nbytes: int) -> str:
    """Bytes with a unit that leaves digits to read."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B" if nbytes else "-"
