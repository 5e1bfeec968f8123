"""The report's records: what became of each tensor of the source, in the order of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loaders.logical import LogicalTensor
from moe_runtime.conversion.planning import ConversionPlan
from moe_runtime.conversion.report import TensorRecord
from moe_runtime.conversion.roles import plain_format, role_of, source_format
from quant.quality import TensorQuality, merge


@dataclass
class _Gathered:
    role: str
    reason: str
    converts: bool = False
    format: str = ""
    nbytes: int = 0
    quality: list[TensorQuality] = field(default_factory=list)


def tensor_records(
    plan: ConversionPlan, quality: Mapping[str, Sequence[Any]]
) -> list[TensorRecord]:
    """One record for each weight of the source, skipped ones at the end.

    quality: shard file -> for each of its tasks, for each output, TensorQuality.as_dict() or None
    """
    gathered: dict[str, _Gathered] = {}
    sources: dict[str, LogicalTensor] = {}
    for shard in plan.shards:
        for task, found in zip(shard.tasks, quality[shard.file], strict=True):
            for output, saved in zip(task.outputs, found, strict=True):
                name = output.source.name
                sources[name] = output.source
                entry = gathered.setdefault(name, _Gathered(task.role, task.reason))
                entry.converts |= output.converts
                entry.format = output.format.name if output.format else plain_format(output.source)
                entry.nbytes += output.nbytes
                if saved is not None:
                    entry.quality.append(TensorQuality.from_dict(saved))
    records = [_record(sources[name], entry) for name, entry in gathered.items()]
    return records + [_skipped(weight, reason, plan) for weight, reason in plan.skipped]


def plan_records(plan: ConversionPlan) -> list[TensorRecord]:
    """The records of a conversion that has not been done: without qualities."""
    nothing = {s.file: [[None for _ in task.outputs] for task in s.tasks] for s in plan.shards}
    return tensor_records(plan, nothing)


def _record(weight: LogicalTensor, entry: _Gathered) -> TensorRecord:
    return TensorRecord(
        name=weight.name,
        component=entry.role,
        action="converted" if entry.converts else "copied",
        shape=weight.shape,
        source_format=source_format(weight),
        format=entry.format,
        source_bytes=weight.nbytes,
        bytes=entry.nbytes,
        quality=merge(entry.quality) if entry.quality else None,
        reason="" if entry.converts else entry.reason,
    )


def _skipped(weight: LogicalTensor, reason: str, plan: ConversionPlan) -> TensorRecord:
    return TensorRecord(
        name=weight.name,
        component=role_of(weight, plan.config),
        action="skipped",
        shape=weight.shape,
        source_format=source_format(weight),
        format="",
        source_bytes=weight.nbytes,
        bytes=0,
        reason=reason,
    )
