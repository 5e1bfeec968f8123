"""The quality report of a conversion: conversion_report.json and a page that anybody can open.

Both say what became of every tensor of the source: converted with its errors, copied, or skipped
with the reason. The page is one file without scripts or links, its figures inline SVG.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loaders.errors import CheckpointError
from moe_runtime.conversion.report_html import page
from quant.quality import TensorQuality, merge

REPORT_JSON = "conversion_report.json"
REPORT_HTML = "conversion_report.html"
NUM_WORST = 10


@dataclass(frozen=True)
class TensorRecord:
    """What became of one tensor of the source."""

    name: str  # of the logical tensor
    component: str  # such as "experts" or "attention"
    action: str  # "converted", "copied" or "skipped"
    shape: tuple[int, ...]
    source_format: str  # such as "bf16"
    format: str  # as written; "" for a skipped tensor
    source_bytes: int
    bytes: int  # as written
    quality: TensorQuality | None = None  # of a converted tensor
    reason: str = ""  # why it was copied or skipped

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, from which `from_dict` makes an equal record."""
        quality = None if self.quality is None else self.quality.as_dict()
        return {**self.__dict__, "shape": list(self.shape), "quality": quality}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> TensorRecord:
        """The record that `as_dict` described."""
        quality = saved["quality"]
        quality = None if quality is None else TensorQuality.from_dict(quality)
        return cls(**{**saved, "shape": tuple(saved["shape"]), "quality": quality})


def write_report(
    folder: Path, records: Sequence[TensorRecord], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """Write both files into `folder`; returns what conversion_report.json holds.

    meta: what was asked for, in words and numbers: source, revision, format, scale rule, version,
          and with an evaluation "evaluation": {"perplexity": ..., "kl": ..., ...}

    The same records and meta give the same bytes.
    """
    report = summarize(records, meta)
    text = json.dumps(report, indent=1, allow_nan=False)
    (folder / REPORT_JSON).write_text(text + "\n", encoding="utf-8")
    (folder / REPORT_HTML).write_text(page(report), encoding="utf-8")
    return report


def read_report(folder: Path) -> tuple[list[TensorRecord], dict[str, Any]]:
    """Records and meta of the report in `folder`; CheckpointError when there is none."""
    try:
        saved = json.loads((folder / REPORT_JSON).read_text(encoding="utf-8"))
        return [TensorRecord.from_dict(entry) for entry in saved["tensors"]], dict(saved["meta"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: no {REPORT_JSON} that can be read",
            hint="`moe-runtime convert` leaves one beside the weights",
        ) from error


def summarize(records: Sequence[TensorRecord], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The report as plain data: meta, totals, components, the worst tensors, every tensor."""
    converted = [record for record in records if record.quality is not None]
    worst = sorted(converted, key=_loss, reverse=True)[:NUM_WORST]
    return {
        "meta": dict(meta),
        "totals": _totals(records),
        "components": [
            {"component": name, **_totals([r for r in records if r.component == name])}
            for name in dict.fromkeys(record.component for record in records)
        ],
        "worst": [record.name for record in worst],
        "tensors": [record.as_dict() for record in records],
    }


def _loss(record: TensorRecord) -> float:
    return record.quality.relative_mse if record.quality else 0.0


def _totals(records: Sequence[TensorRecord]) -> dict[str, Any]:
    measured = [record.quality for record in records if record.quality is not None]
    counts = {
        action: sum(record.action == action for record in records)
        for action in ("converted", "copied", "skipped")
    }
    return {
        **counts,
        "source_bytes": sum(record.source_bytes for record in records),
        "bytes": sum(record.bytes for record in records),
        "formats": sorted({record.format for record in records if record.format}),
        "quality": merge(measured).as_dict() if measured else None,
    }
