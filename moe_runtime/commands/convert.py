"""`moe-runtime convert`: a checkpoint in another number format, with every tensor accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe_runtime.commands.common import (
    json_option,
    model_argument,
    print_json,
    revision_option,
    verb,
)
from moe_runtime.conversion.errors import REFUSALS
from moe_runtime.conversion.options import (
    DENSE,
    LAYOUTS,
    SCALE_RULES,
    SCALE_SEARCHES,
    TARGETS,
    ConversionOptions,
    parse_size,
)

if TYPE_CHECKING:
    from moe_runtime.conversion.planning import ConversionPlan
    from moe_runtime.conversion.source import Source


@verb(
    "convert",
    examples="""
    moe-runtime convert Qwen/Qwen3-30B-A3B --to mxfp4 --output ./qwen3-mxfp4
    moe-runtime convert deepseek-ai/DeepSeek-V3 --to nvfp4 --output /data/v3 --dry-run
    moe-runtime convert ./finetuned --to fp8-block --dense fp8-block --output ./finetuned-fp8
    moe-runtime convert ./mine --to mxfp4 --keep 'layers.0.' --output ./mine-mxfp4
    """,
)
@model_argument
@click.option("--to", "target", required=True, type=click.Choice(TARGETS), help="Format.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A new folder.")
@revision_option
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    help="compressed-tensors for all families but GPT-OSS, whose own form is native; native "
    "fp8-block is DeepSeek's form.",
)
@click.option(
    "--scale-rule",
    type=click.Choice(SCALE_RULES),
    help="How mxfp4 and mxfp8 choose the power of two of a block; default: even.",
)
@click.option(
    "--scale-search",
    type=click.Choice(SCALE_SEARCHES),
    default="none",
    show_default=True,
    help="mse tries neighbouring scales and keeps the best; mxfp4, mxfp8 and nvfp4.",
)
@click.option(
    "--power-of-two-scales", is_flag=True, help="fp8-block with scales that are powers of two."
)
@click.option(
    "--keep",
    multiple=True,
    metavar="PATTERN",
    help="Weights that stay as they are: part of a name, or a glob. May be given again.",
)
@click.option(
    "--dense",
    type=click.Choice(DENSE),
    default="keep",
    show_default=True,
    help="Attention, dense MLP and shared experts.",
)
@click.option(
    "--shard-size", default="5GB", show_default=True, metavar="SIZE", help="Of an output file."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--allow",
    multiple=True,
    type=click.Choice(tuple(REFUSALS)),
    help="Go on in spite of a refusal; the refusal says its name. May be given again.",
)
@click.option(
    "--base-model", metavar="ORG/NAME", help="For the model card; default: MODEL if it is a hub id."
)
@click.option("--dry-run", is_flag=True, help="Show what would be done; nothing is written.")
@click.option("--no-resume", is_flag=True, help="Drop what an interrupted conversion left.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in the output folder.")
@json_option
def command(
    model: str,
    target: str,
    output: Path,
    revision: str | None,
    layout: str | None,
    scale_rule: str | None,
    scale_search: str,
    power_of_two_scales: bool,
    keep: tuple[str, ...],
    dense: str,
    shard_size: str,
    device: str,
    allow: tuple[str, ...],
    base_model: str | None,
    dry_run: bool,
    no_resume: bool,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Convert the experts of MODEL to an FP8 or FP4 format, or all of it to bf16.

    Router, norms, embeddings, head, indexer, biases and multi-token prediction stay as they are.
    Works from tensor names and shapes, so families that this version cannot run convert too. Reads
    bf16, fp16, fp32, FP8 and FP4 of DeepSeek, compressed-tensors and ModelOpt, and GPT-OSS.

    Writes compressed-tensors, which vLLM and SGLang open; transformers (5.23) opens mxfp4 and
    fp8-channel of it, and fp8-block with --layout native. GPT-OSS keeps its own form: mxfp4 and
    bf16 open everywhere, its other formats in moe-runtime alone.

    Nothing is written into the output folder before the result is whole. The same command goes on
    after an interruption, also after kill -9, and comes to the same bytes.
    """
    # Slow imports: torch.
    from moe_runtime.conversion.convert import convert, open_for_conversion
    from moe_runtime.conversion.planning import plan_conversion

    try:
        shard_bytes = parse_size(shard_size)
        options = ConversionOptions(
            target,
            layout,
            scale_rule,
            scale_search,
            power_of_two_scales,
            keep,
            dense,
            shard_bytes,
            frozenset(allow),
            base_model,
        )
    except ValueError as error:
        raise click.UsageError(str(error), click.get_current_context()) from error
    output = output.expanduser()
    if dry_run:
        source = open_for_conversion(model, output, revision)
        found = plan_facts(plan_conversion(source.checkpoint, options), source)
        _print(found, f"would write {output}", as_json)
        return 0
    report = convert(
        model,
        output,
        options,
        revision=revision,
        device=_device(device),
        resume=not no_resume,
        overwrite=overwrite,
    )
    _print(report_facts(report), str(output), as_json)
    return 0


def plan_facts(plan: ConversionPlan, source: Source) -> dict[str, Any]:
    """What --dry-run tells."""
    # Slow import: torch.
    from moe_runtime.conversion.needs import disk_bytes, memory_bytes, most_held_bytes
    from moe_runtime.conversion.records import plan_records
    from moe_runtime.conversion.report import summarize

    report = summarize(plan_records(plan), {"files_left_out": list(plan.left_out)})
    held = most_held_bytes(plan.tasks, source)
    return {
        **report_facts(report),
        "layout": plan.layout,
        "shards": len(plan.shards),
        "disk_bytes": disk_bytes(plan.output_bytes, held),
        "memory_bytes": memory_bytes([output for _, output in plan.outputs]),
    }


def report_facts(report: dict[str, Any]) -> dict[str, Any]:
    """Of a report what is worth a few lines."""
    # Slow import: torch.
    from moe_runtime.verification.against import LEAST_SQNR_DB
    from quant.formats import FORMATS

    poor = {}
    for tensor in report["tensors"]:
        decibels = tensor["quality"] and tensor["quality"]["sqnr_db"]
        if decibels is not None and decibels < LEAST_SQNR_DB[FORMATS[tensor["format"]].value_bits]:
            poor[tensor["name"]] = decibels
    reasons: dict[str, int] = {}
    for tensor in report["tensors"]:
        if tensor["action"] == "skipped":
            reasons[tensor["reason"]] = reasons.get(tensor["reason"], 0) + 1
    components = [
        {
            "component": part["component"],
            **{key: part[key] for key in ("converted", "copied", "skipped", "bytes", "formats")},
            "source_bytes": part["source_bytes"],
            **{
                key: part["quality"][key] if part["quality"] else None
                for key in ("sqnr_db", "plain_sqnr_db")
            },
        }
        for part in report["components"]
    ]
    totals = report["totals"]
    return {
        "components": components,
        "source_bytes": totals["source_bytes"],
        "bytes": totals["bytes"],
        "skipped": reasons,
        "poor": dict(sorted(poor.items(), key=lambda item: item[1])),
        "files_left_out": report["meta"]["files_left_out"],
    }


def _print(facts: dict[str, Any], headline: str, as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    lines = [headline, f"  {'':18}{'converted':>10}{'copied':>8}{'bytes':>12}  formats"]
    for part in facts["components"]:
        sqnr = f", SQNR {part['sqnr_db']:.2f} dB" if part["sqnr_db"] is not None else ""
        if part["plain_sqnr_db"] is not None:
            sqnr += f" ({part['plain_sqnr_db']:.2f} dB by the plain rule)"
        formats = ", ".join(part["formats"]) + sqnr
        lines.append(
            f"  {part['component']:18}{part['converted']:>10}{part['copied']:>8}"
            f"{_gigabytes(part['bytes']):>12}  {formats}"
        )
    lines.append(f"  {_gigabytes(facts['source_bytes'])} become {_gigabytes(facts['bytes'])}")
    lines += [f"  {count} skipped: {why}" for why, count in facts["skipped"].items()]
    if facts["poor"]:
        name, decibels = next(iter(facts["poor"].items()))
        lines.append(
            f"  weights that lost more than sound ones do: {len(facts['poor'])}, worst {name} with "
            f"{decibels:.2f} dB; see conversion_report.html"
        )
    lines += [f"  left out: {name}, not in the index" for name in facts["files_left_out"]]
    if "disk_bytes" in facts:
        files = "1 file" if facts["shards"] == 1 else f"{facts['shards']} files"
        lines.append(
            f"  {files}; needs {_gigabytes(facts['disk_bytes'])} of disk and up to "
            f"{_gigabytes(facts['memory_bytes'])} of memory"
        )
    click.echo("\n".join(lines))


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def _device(name: str) -> str:
    # Slow import: torch.
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    # Slow import: the kernels.
    from moe_runtime.backends import parse_device

    return str(parse_device(name))
