"""The model card of a conversion: where it comes from, what was done, and the measured errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loaders.files import CheckpointFiles
from moe_runtime.conversion.layouts import COMPRESSED_TENSORS, DEEPSEEK, GPT_OSS
from moe_runtime.conversion.planning import ConversionPlan

_LICENCE = re.compile(r"^(license|license_name|license_link): *(.+)$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
# transformers 5.23 decodes experts of these; of the others it reads the scales wrong.
_TRANSFORMERS = ("mxfp4", "fp8-channel")
_EVALUATION = "## Evaluation\n"


def model_card(
    plan: ConversionPlan,
    report: Mapping[str, Any],
    files: CheckpointFiles,
    *,
    source: str,
    hub_id: str | None,
    revision: str | None,
) -> str:
    """README.md of the result.

    report: what conversion_report.json holds
    """
    lines = ["---", *_front_matter(plan, files, plan.options.base_model or hub_id), "---", ""]
    lines += [f"# {source.rpartition('/')[2]}, {plan.options.target}", ""]
    at = f" at {revision}" if revision else ""
    lines += [
        f"Converted from {hub_id or source}{at} by `moe-runtime convert --to "
        f"{plan.options.target}`. {_opened_by(plan)}",
        "",
        "| component | tensors | formats | bytes | SQNR dB | largest error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(component) for component in report["components"]]
    lines += [
        "",
        "SQNR is the ratio of the source weights' energy to that of the error, over the converted "
        "weights of a component. Figures of every tensor, copied and skipped ones with the reason, "
        "are in `conversion_report.json` and `conversion_report.html`.",
        "",
    ]
    return "\n".join(lines)


def _front_matter(plan: ConversionPlan, files: CheckpointFiles, base: str | None) -> list[str]:
    lines = [f"base_model: {base}", "base_model_relation: quantized"] if base else []
    raw = files.text("README.md") if "README.md" in files.names() else None
    matter = _FRONT_MATTER.search(raw.decode("utf-8", "replace")) if raw else None
    if matter:
        lines += [f"{key}: {value.strip()}" for key, value in _LICENCE.findall(matter[1])]
    lines += [f"library_name: {_library(plan)}", "pipeline_tag: text-generation", "tags:"]
    tags = [plan.options.target, "moe", "moe-runtime"]
    tags += ["compressed-tensors"] if plan.layout == COMPRESSED_TENSORS else []
    return lines + [f"- {tag}" for tag in tags]


def with_evaluation(card: str, figures: Mapping[str, Any]) -> str:
    """The card with the figures of `eval` at its end, in place of earlier ones.

    figures: of Evaluation.as_dict, with "text" and "against"
    """
    lines = [
        _EVALUATION,
        f"On {figures['tokens']} tokens of `{Path(figures['text']).name}`:",
        "",
        f"- perplexity {figures['perplexity']:.4f}",
    ]
    if figures["kl"] is not None:
        lines += [
            f"- perplexity of {figures['against']} {figures['reference_perplexity']:.4f}",
            f"- KL from it {figures['kl']:.3e} nats a token",
            f"- the same best token {100 * figures['top1_agreement']:.2f} %",
        ]
    return "\n".join([card.partition(_EVALUATION)[0].rstrip("\n") + "\n", *lines, ""])


def _library(plan: ConversionPlan) -> str:
    """What opens the result, as the hub calls it."""
    target = plan.options.target
    if plan.layout == COMPRESSED_TENSORS and target not in (*_TRANSFORMERS, "bf16"):
        return "vllm"
    if plan.layout == GPT_OSS and target not in ("mxfp4", "bf16"):
        return "moe-runtime"
    return "transformers"


def _opened_by(plan: ConversionPlan) -> str:
    target = plan.options.target
    if target == "bf16":
        return "Opened by whatever opens the unquantized model."
    if plan.layout == DEEPSEEK:
        return (
            "In the form of DeepSeek's FP8 checkpoints, which vLLM, SGLang and transformers open."
        )
    if plan.layout == COMPRESSED_TENSORS:
        if target in _TRANSFORMERS:
            return "In the compressed-tensors form that vLLM, SGLang and transformers open."
        return (
            "In the compressed-tensors form that vLLM and SGLang open. transformers (5.23) does "
            f"not read experts in {target} rightly."
        )
    if target == "mxfp4":
        return "Opened by whatever opens GPT-OSS as published."
    return "Opened by moe-runtime alone: GPT-OSS has no form in this format that others read."


def _row(component: Mapping[str, Any]) -> str:
    quality = component["quality"]
    count = component["converted"] + component["copied"]
    sqnr = error = "-"
    if quality is not None:
        sqnr = "exact" if quality["sqnr_db"] is None else f"{quality['sqnr_db']:.2f}"
        error = f"{quality['max_abs_error']:.3g}"
    formats = ", ".join(component["formats"])
    name = component["component"]
    return f"| {name} | {count} | {formats} | {component['bytes']} | {sqnr} | {error} |"
