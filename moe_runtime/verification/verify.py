"""Re-reading a checkpoint of any family in the formats that we read, and comparing it with another.

Every tensor of the files is read once, some rows at a time, by plain reads: memory stays within a
few hundred megabytes however large the checkpoint is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loaders.checkpoint import Checkpoint, open_folder
from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.json_text import listed, parse_json_object
from loaders.logical import LogicalTensor, logical_tensors
from loaders.tensor_rows import RowReader
from moe_runtime.allocator import keep_freed_memory
from moe_runtime.conversion.decisions import skip_reason
from moe_runtime.conversion.inventory import check_inventory, different_experts
from moe_runtime.conversion.options import ConversionOptions
from moe_runtime.conversion.planning import unlisted_files
from moe_runtime.conversion.report import REPORT_JSON
from moe_runtime.conversion.roles import role_of, source_format
from moe_runtime.models.gpt_oss_original import as_huggingface
from moe_runtime.models.registry import plan_model
from moe_runtime.verification.against import (
    Comparison,
    SourceRows,
    compare,
    compare_vectors,
    find_source,
    judge_comparison,
)
from moe_runtime.verification.numbers import Facts, judge, look_at, merge_facts
from moe_runtime.verification.result import CheckedTensor, Finding, Verification
from quant.quality import TensorQuality, merge
from quant.tensor import QuantTensor
from quant.tiles import for_each

# Weights read at once by one core.
_PIECE_WEIGHTS = 1 << 20
# Pieces in hand: bounds memory, and keeps the cores busy.
_BATCH_PIECES = 64
_GATE_UP = {"gate_proj.weight": "up_proj.weight", "w1.weight": "w3.weight"}
# Keys of config.json that a conversion changes.
_CHANGING_KEYS = {
    *("quantization_config", "compression_config", "torch_dtype", "dtype"),
    *("transformers_version", "_name_or_path", "expert_dtype"),
}


@dataclass(frozen=True)
class Piece:
    """Rows of one weight; of a vector or a scalar, all of it."""

    weight: LogicalTensor
    matrix: int
    start: int
    stop: int
    nbytes: int


@dataclass(frozen=True)
class Seen:
    """What was found in a piece."""

    facts: Facts
    comparison: Comparison | None


def verify(
    folder: Path,
    source: Path | None = None,
    *,
    on_total: Callable[[int], None] = lambda total: None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Verification:
    """Check the checkpoint in a folder, and compare it with the one in `source`.

    on_total: told the bytes to read, before any is read
    on_bytes: told of bytes read, from any thread

    What is wrong with the folder becomes findings; what is wrong with the source raises
    CheckpointError or UnsupportedModelError.
    """
    started = time.perf_counter()
    keep_freed_memory()
    with ExitStack() as stack:
        theirs = None if source is None else stack.enter_context(_open(source))
        try:
            ours = stack.enter_context(_open(folder))
            weights = logical_tensors(ours)
        except CheckpointError as error:
            return Verification((Finding("files", error.message),), compared=theirs is not None)
        on_total(sum(weight.nbytes for weight in weights))
        run = _Run(ours, weights, theirs, on_bytes)
        findings = [*check_names(ours, weights), *run.pairing(), *run.check_numbers()]
    seconds = time.perf_counter() - started
    return Verification(
        tuple(findings), tuple(run.checked), theirs is not None, seconds, run.bytes_read
    )


def _open(folder: Path) -> Checkpoint:
    return as_huggingface(open_folder(folder))


def check_names(checkpoint: Checkpoint, weights: Sequence[LogicalTensor]) -> Iterator[Finding]:
    """What headers, names and config.json say together."""
    config = checkpoint.config
    try:
        plan_model(checkpoint)
    except UnsupportedModelError as error:
        note = f"{error.message}: shapes were checked against each other only"
        yield Finding("config", note, is_error=False)
    except CheckpointError as error:
        yield Finding("config", error.message)
    try:
        roles = {weight.name: role_of(weight, config) for weight in weights}
        check_inventory(weights, roles, config, ConversionOptions("mxfp4"))
    except CheckpointError as error:
        yield Finding("names", error.message)
    yield from _quantization_claims(config, weights)
    extra = unlisted_files(checkpoint)
    if extra:
        message = f"{listed(list(extra))}: in the folder, but no tensor of it is in the index"
        yield Finding("files", message, is_error=False)
    for name, message in different_experts(weights):
        yield Finding("names", message, name)


def _quantization_claims(
    config: Mapping[str, Any], weights: Sequence[LogicalTensor]
) -> Iterator[Finding]:
    quantized = [weight for weight in weights if weight.format is not None]
    claimed = config.get("quantization_config") or config.get("compression_config")
    if quantized and not claimed:
        message = (
            f"no quantization_config, but {quantized[0].name} is {source_format(quantized[0])}"
        )
        yield Finding("config", message, is_error=False)
    if claimed and not quantized:
        yield Finding("config", "quantization_config, but no weight is quantized", is_error=False)


class _Run:
    """One pass over the files."""

    def __init__(
        self,
        ours: Checkpoint,
        weights: Sequence[LogicalTensor],
        theirs: Checkpoint | None,
        on_bytes: Callable[[int], object],
    ) -> None:
        self.ours = ours
        self.weights = weights
        self.reader = RowReader(ours.path)
        self.theirs = theirs
        self.sources: dict[str, SourceRows] = {}
        self.source_reader = None if theirs is None else RowReader(theirs.path)
        self.on_bytes = on_bytes
        self.checked: list[CheckedTensor] = []

    @property
    def bytes_read(self) -> int:
        """From all files."""
        theirs = 0 if self.source_reader is None else self.source_reader.bytes_read
        return self.reader.bytes_read + theirs

    def pairing(self) -> Iterator[Finding]:
        """Weights that the source does not have, and of the source that are missing here."""
        if self.theirs is None:
            return
        yield from _config_changes(self.ours.config, self.theirs.config)
        sources = {weight.name: weight for weight in logical_tensors(self.theirs)}
        used = set()
        for weight in self.weights:
            found = find_source(weight, sources)
            if found is None:
                same = sources.get(weight.name)
                expected = "" if same is None else f", which has shape {same.shape}"
                message = f"of shape {weight.shape} has no counterpart in the source{expected}"
                yield Finding("source", message, weight.name)
            else:
                self.sources[weight.name] = found
                used.add(found.weight.name)
        reported = _skipped_by_report(self.ours)
        for name in sorted(sources.keys() - used):
            if not skip_reason(sources[name]) and name not in reported:
                message = f"of shape {sources[name].shape} is in the source and not here"
                yield Finding("source", message, name)

    def check_numbers(self) -> Iterator[Finding]:
        """Read every weight; the weights themselves go to `checked`."""
        batch: list[Piece] = []
        for weight in self.weights:
            batch += pieces_of(weight)
            if len(batch) >= _BATCH_PIECES:
                yield from self._check(batch)
                batch = []
        yield from self._check(batch)
        yield from _gate_and_up(self.weights, self.reader)
        for reader in (self.reader, self.source_reader):
            if reader is not None:
                reader.close()

    def _check(self, batch: Sequence[Piece]) -> Iterator[Finding]:
        seen = for_each(batch, self._look, torch.device("cpu"))
        by_weight: dict[str, list[Seen]] = {}
        for piece, found in zip(batch, seen, strict=True):
            by_weight.setdefault(piece.weight.name, []).append(found)
        for weight in {piece.weight.name: piece.weight for piece in batch}.values():
            yield from self._conclude(weight, by_weight[weight.name])

    def _look(self, piece: Piece) -> Seen:
        weight = piece.weight
        values = self._read(self.reader, piece)
        where = f"expert {piece.matrix} " if len(weight.shape) > 2 else ""
        where += f"row {piece.start} and on, " if piece.start else ""
        facts = look_at(values, where)
        comparison = self._compare(values, piece)
        self.on_bytes(piece.nbytes)
        return Seen(facts, comparison)

    def _read(self, reader: RowReader, piece: Piece) -> Tensor | QuantTensor:
        weight = piece.weight
        if len(weight.shape) < 2:
            return reader.tensor(weight.parts["values"])
        return reader.rows(weight, piece.matrix, piece.start, piece.stop)

    def _compare(self, values: Tensor | QuantTensor, piece: Piece) -> Comparison | None:
        source = self.sources.get(piece.weight.name)
        if source is None or self.source_reader is None:
            return None
        if len(piece.weight.shape) < 2:
            assert isinstance(values, Tensor)
            theirs = self.source_reader.tensor(source.weight.parts["values"])
            return compare_vectors(values, theirs)
        return compare(values, self.source_reader, source, piece.matrix, piece.start)

    def _conclude(self, weight: LogicalTensor, seen: Sequence[Seen]) -> Iterator[Finding]:
        yield from judge(weight, merge_facts(one.facts for one in seen))
        found = [one.comparison for one in seen if one.comparison is not None]
        quality: TensorQuality | None = None
        measured = [one.quality for one in found if one.quality is not None]
        if measured:
            quality = merge(measured)
        differing = sum(one.differing for one in found)
        equal = all(one.equal for one in found) if found else None
        self.checked.append(
            CheckedTensor(
                weight.name,
                role_of(weight, self.ours.config),
                source_format(weight),
                weight.shape,
                weight.nbytes,
                equal,
                quality,
            )
        )
        yield from judge_comparison(weight, differing, quality)


def pieces_of(weight: LogicalTensor) -> Iterator[Piece]:
    """Rows that cover a weight, each piece whole blocks and about a million numbers."""
    if len(weight.shape) < 2 or 0 in weight.shape:
        yield Piece(weight, 0, 0, 1, weight.nbytes)
        return
    *leading, rows, columns = weight.shape
    height = weight.format.block[0] if weight.format and weight.format.block else 1
    step = max(1, _PIECE_WEIGHTS // (columns * height)) * height
    if weight.transposed:
        step = rows  # a reader of transposed rows reads the whole matrix each time
    count = 1
    for size in leading:
        count *= size
    for matrix in range(count):
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield Piece(
                weight, matrix, start, stop, weight.nbytes * (stop - start) // (rows * count)
            )


def _gate_and_up(weights: Sequence[LogicalTensor], reader: RowReader) -> Iterator[Finding]:
    """NVFP4: engines fuse gate and up and keep one tensor scale for both."""
    by_name = {weight.name: weight for weight in weights}
    for weight in weights:
        if weight.format is None or not weight.format.tensor_scale:
            continue
        scale = reader.tensor_scale(weight)
        if scale is not None and not (scale > 0 and scale.isfinite()):
            yield Finding("scales", f"its tensor scale is {float(scale)}", weight.name)
        prefix, _, last = weight.name.rpartition(".experts.")
        number, _, rest = last.partition(".")
        up = by_name.get(f"{prefix}.experts.{number}.{_GATE_UP.get(rest)}")
        if up is None or scale is None:
            continue
        other = reader.tensor_scale(up)
        if other is not None and float(other) != float(scale):
            message = f"tensor scale {float(scale):.9g}, and {up.name} has {float(other):.9g}"
            yield Finding("gate and up", message, weight.name)


def _config_changes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    keys = (ours.keys() | theirs.keys()) - _CHANGING_KEYS
    changed = sorted(key for key in keys if ours.get(key) != theirs.get(key))
    if changed:
        message = f"config.json differs from the source's in {listed(changed)}"
        yield Finding("config", message, is_error=False)


def _skipped_by_report(checkpoint: Checkpoint) -> set[str]:
    """Weights that the conversion's own report says were left out, each with its reason."""
    raw = checkpoint.files.text(REPORT_JSON)
    if raw is None:
        return set()
    tensors = parse_json_object(raw, file=REPORT_JSON).get("tensors")
    entries = tensors if isinstance(tensors, list) else []
    return {
        str(entry.get("name"))
        for entry in entries
        if isinstance(entry, dict) and entry.get("action") == "skipped" and entry.get("reason")
    }
