"""Which tensor of the source becomes what, decided from headers and config before anything is read.

    source weights -> tasks (converted or copied) -> output tensors -> shards with fixed offsets
                   -> skipped, with the reason

Everything about the result but the numbers themselves is fixed here, so an interrupted conversion
goes on to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loaders.checkpoint import Checkpoint
from loaders.errors import UnsupportedModelError
from loaders.logical import LogicalTensor, logical_tensors
from moe_runtime.conversion.decisions import Decision, decide, skip_reason
from moe_runtime.conversion.inventory import check_source
from moe_runtime.conversion.layouts import (
    COMPRESSED_TENSORS,
    DEEPSEEK,
    GPT_OSS,
    Part,
    part,
    written_parts,
)
from moe_runtime.conversion.options import ConversionOptions
from moe_runtime.conversion.roles import DENSE_ROLES, EXPERTS, expert_of, hidden_size, role_of
from moe_runtime.models.gpt_oss_original import as_huggingface
from quant.formats import BF16, NVFP4, QuantFormat

# Names of one expert's gate -> its up: what is used side by side shares one NVFP4 tensor scale.
_GATE_UP = {"gate_proj.weight": "up_proj.weight", "w1.weight": "w3.weight"}


@dataclass(frozen=True)
class Output:
    """One weight of the result, and the rows of the source that it is made of."""

    name: str
    source: LogicalTensor
    matrices: tuple[int, int]  # [first, last) of the source's leading axes
    rows: tuple[int, int]  # of each matrix
    format: QuantFormat | None  # None: the bytes as they are
    converts: bool  # whether numbers are rounded again
    transposed: bool  # whether each matrix is written [columns, rows]
    layout: str
    parts: Mapping[str, Part]

    @property
    def source_bytes(self) -> int:
        """Bytes of the source that it takes, scales included."""
        if len(self.source.shape) < 2:
            return self.source.nbytes
        *leading, rows, _ = self.source.shape
        total = rows
        for size in leading:
            total *= size
        taken = (self.matrices[1] - self.matrices[0]) * (self.rows[1] - self.rows[0])
        return self.source.nbytes * taken // total if total else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(one.nbytes for one in self.parts.values())


@dataclass(frozen=True)
class Task:
    """Outputs that are made together: one, or gate and up with one tensor scale between them."""

    outputs: tuple[Output, ...]
    role: str
    reason: str

    @property
    def files(self) -> set[str]:
        """Files of the source that must be at hand."""
        return {info.file for output in self.outputs for info in output.source.parts.values()}

    @property
    def nbytes(self) -> int:
        """Bytes to be written."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def source_bytes(self) -> int:
        """Bytes to be read."""
        return sum(output.source_bytes for output in self.outputs)


@dataclass(frozen=True)
class Shard:
    """One output file: its tasks, and where each tensor lies."""

    file: str
    tasks: tuple[Task, ...]

    @cached_property
    def header(self) -> bytes:
        """The file's first bytes: length, and the JSON header padded to 8."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for one in self.parts:
            entries[one.name] = {
                "dtype": one.dtype,
                "shape": list(one.shape),
                "data_offsets": [position, position + one.nbytes],
            }
            position += one.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Its tensors in the order of the file: the widest elements first, so that all align."""
        found = [p for task in self.tasks for out in task.outputs for p in out.parts.values()]
        return tuple(sorted(found, key=lambda one: -_element_bytes(one)))

    @cached_property
    def offsets(self) -> dict[str, int]:
        """First byte of each tensor in the file."""
        position, found = len(self.header), {}
        for one in self.parts:
            found[one.name] = position
            position += one.nbytes
        return found

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(one.nbytes for one in self.parts)


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that will be written, and what will not."""

    options: ConversionOptions
    layout: str
    shards: tuple[Shard, ...]
    skipped: tuple[tuple[LogicalTensor, str], ...]
    left_out: tuple[str, ...]  # files with weights that the index does not name
    files: tuple[str, ...]  # of the source, in the order of use
    config: Mapping[str, Any]  # of the source

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks in the order of the result."""
        return tuple(task for shard in self.shards for task in shard.tasks)

    @property
    def outputs(self) -> Iterator[tuple[Task, Output]]:
        """Every output weight with its task."""
        return ((task, output) for task in self.tasks for output in task.outputs)

    @property
    def source_bytes(self) -> int:
        """Bytes to be read."""
        return sum(task.source_bytes for task in self.tasks)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors of the result: the index's total_size."""
        return sum(task.nbytes for task in self.tasks)

    @property
    def output_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def identity(self) -> str:
        """Equal for equal plans: 32 hexadecimal digits over options and every output tensor.

        Without what is allowed: where that matters, a conversion without it would have stopped,
        and the next try may well allow more.
        """
        asked = {k: v for k, v in self.options.as_dict().items() if k != "allow"}
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards:
            digest.update(shard.file.encode() + shard.header)
        for weight, reason in self.skipped:
            digest.update(f"{weight.name}: {reason}".encode())
        return digest.hexdigest()[:32]


def plan_conversion(checkpoint: Checkpoint, options: ConversionOptions) -> ConversionPlan:
    """Plan from headers and config alone; `checkpoint` may be a remote one.

    Raises ConversionError for a refusal, CheckpointError for files that do not fit each other,
    UnsupportedModelError for weights that cannot be told apart.
    """
    renamed = checkpoint.layout == "original"
    checkpoint = as_huggingface(checkpoint)
    weights = logical_tensors(checkpoint)
    config = checkpoint.config
    roles = {weight.name: role_of(weight, config) for weight in weights}
    skipped = [(weight, why) for weight in weights if (why := skip_reason(weight))]
    kept = [weight for weight in weights if not skip_reason(weight)]
    check_source(checkpoint, kept, roles, options)
    layout = choose_layout(kept, roles, config, options)
    tasks = list(_tasks(kept, roles, config, options, layout))
    if not renamed and not changes_anything(output for task in tasks for output in task.outputs):
        raise _nothing_to_do(tasks, layout, options)
    files = _files_in_order(tasks)
    order = {file: number for number, file in enumerate(files)}
    tasks.sort(key=lambda task: _position(task, order))
    shards = _shards(tasks, options.shard_bytes)
    left_out = unlisted_files(checkpoint)
    return ConversionPlan(options, layout, shards, tuple(skipped), left_out, files, config)


def changes_anything(outputs: Iterable[Output]) -> bool:
    """Whether the result is more than the source again.

    The same numbers in another form are: FP4 experts of DeepSeek V4 as compressed-tensors.
    """
    return any(
        output.converts
        or {part.name: part.shape for part in output.parts.values()}
        != {info.name: info.shape for info in output.source.parts.values()}
        for output in outputs
    )


def unlisted_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Files with weights beside the checkpoint's own, such as a copy in the vendor's layout."""
    used = {info.file for info in checkpoint.tensors.values()}
    prefixes = {file.rpartition("/")[0] for file in used}
    names = [name for name in checkpoint.files.names() if name.endswith(".safetensors")]
    return tuple(sorted(n for n in names if n not in used and n.rpartition("/")[0] in prefixes))


def _nothing_to_do(
    tasks: Sequence[Task], layout: str, options: ConversionOptions
) -> UnsupportedModelError:
    dense = any(
        task.role in DENSE_ROLES and output.source.format is None
        for task in tasks
        for output in task.outputs
    )
    helps = dense and layout != GPT_OSS and options.target != "bf16"
    return UnsupportedModelError(
        f"nothing to convert to {options.target}: no weight of routed experts that is not in it "
        "already",
        hint="--dense fp8-block converts attention and dense matrices" if helps else None,
    )


def choose_layout(
    weights: Sequence[LogicalTensor],
    roles: Mapping[str, str],
    config: Mapping[str, Any],
    options: ConversionOptions,
) -> str:
    """The layout that `options` means for this family; UnsupportedModelError if there is none."""
    stacked = any(roles[w.name] == EXPERTS and len(w.shape) == 3 for w in weights)
    if config.get("model_type") == "gpt_oss" and stacked:
        if options.layout == COMPRESSED_TENSORS:
            raise UnsupportedModelError(
                "GPT-OSS has no compressed-tensors form that other engines open",
                hint="leave --layout out: its experts are written in their native form",
            )
        if options.dense != "keep":
            raise UnsupportedModelError(
                "--dense fp8-block: the form of GPT-OSS has no place for scales of dense weights",
                hint="dense weights can be packed at load: --dense-format fp8 of generate",
            )
        return GPT_OSS
    if options.layout != "native":
        return COMPRESSED_TENSORS
    if options.target not in ("fp8-block", "bf16"):
        raise UnsupportedModelError(
            f"--layout native is defined for fp8-block, and for GPT-OSS; not for {options.target}",
            hint="leave --layout out: compressed-tensors is what other engines open",
        )
    return DEEPSEEK


def _tasks(
    weights: Sequence[LogicalTensor],
    roles: Mapping[str, str],
    config: Mapping[str, Any],
    options: ConversionOptions,
    layout: str,
) -> Iterator[Task]:
    outputs: dict[str, tuple[Output, str, str]] = {}
    for weight in weights:
        decision = decide(weight, roles[weight.name], options)
        for output in outputs_of(weight, decision, config, layout):
            if output.name in outputs:
                raise UnsupportedModelError(f"two weights would be written as {output.name}")
            outputs[output.name] = (output, roles[weight.name], decision.reason)
    paired: set[str] = set()
    for name, (output, role, reason) in outputs.items():
        if name in paired:
            continue
        partner = _partner(name, output, outputs)
        if partner is not None:
            paired.add(partner.name)
        group = (output,) if partner is None else (output, partner)
        yield Task(group, role, reason)


def _partner(
    name: str, output: Output, outputs: Mapping[str, tuple[Output, str, str]]
) -> Output | None:
    """Up of a gate (and gate of an up, when it comes first) where both share a tensor scale."""
    parsed = expert_of(name)
    if NVFP4 not in (output.format, output.source.format) or parsed is None:
        return None
    prefix, expert, rest = parsed
    both = {**_GATE_UP, **{up: gate for gate, up in _GATE_UP.items()}}
    other = outputs.get(f"{prefix}.{expert}.{both.get(rest)}")
    if other is None or other[0].format is not output.format:
        return None
    return other[0] if other[0].source.format is output.source.format else None


def outputs_of(
    weight: LogicalTensor, decision: Decision, config: Mapping[str, Any], layout: str
) -> Iterator[Output]:
    """What a weight becomes: one output, or for stacked experts one for each matrix."""
    format = decision.format
    stacked = len(weight.shape) == 3 and ".experts." in weight.name
    split = stacked and layout != GPT_OSS and format is not None and format is not BF16
    if not split:
        matrices = (0, weight.shape[0]) if len(weight.shape) == 3 else (0, 1)
        rows = (0, weight.shape[-2]) if len(weight.shape) > 1 else (0, 1)
        yield _output(weight.name, weight.shape, weight, matrices, rows, decision, layout)
        return
    for name, expert, rows in _expert_rows(weight, config):
        height = format.block[0] if format is not None and format.block else 1
        if not decision.converts and rows[0] % height:
            raise UnsupportedModelError(f"{weight.name}: blocks reach over gate and up")
        shape = (rows[1] - rows[0], weight.shape[-1])
        yield _output(name, shape, weight, (expert, expert + 1), rows, decision, layout)


def _output(
    name: str,
    shape: tuple[int, ...],
    weight: LogicalTensor,
    matrices: tuple[int, int],
    rows: tuple[int, int],
    decision: Decision,
    layout: str,
) -> Output:
    transposed = False
    parts: Mapping[str, Part]
    if decision.format is None:  # the tensor of the file, untouched
        info = weight.parts["values"]
        parts = {"values": Part(name, info.dtype, info.shape, info.nbytes)}
    elif decision.format is BF16:
        transposed = layout == GPT_OSS and len(shape) == 3
        written = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
        parts = {"values": part(name, "BF16", written)}
    else:
        layout = DEEPSEEK if layout == GPT_OSS and len(shape) == 2 else layout
        parts = written_parts(layout, name, shape, decision.format)
    return Output(
        name,
        weight,
        matrices,
        rows,
        decision.format,
        decision.converts,
        transposed,
        layout,
        parts,
    )


def _expert_rows(
    weight: LogicalTensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """Names and rows of one expert's weights in a stacked tensor: gate rows first, then up."""
    base = weight.name.removesuffix(".weight")
    prefix, _, last = base.rpartition(".")
    num_experts, rows, columns = weight.shape
    width = hidden_size(config)
    fits = {"gate_up_proj": columns == width and rows % 2 == 0, "down_proj": rows == width}
    if last not in fits or not fits[last]:
        raise UnsupportedModelError(
            f"{weight.name}: stacked experts of shape {weight.shape} are not understood",
            hint=f"expected gate_up_proj [E, 2F, D] and down_proj [E, D, F] with D {width}",
        )
    for expert in range(num_experts):
        if last == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", expert, (0, rows)
            continue
        half = rows // 2
        yield f"{prefix}.{expert}.gate_proj.weight", expert, (0, half)
        yield f"{prefix}.{expert}.up_proj.weight", expert, (half, rows)


def _files_in_order(tasks: Sequence[Task]) -> tuple[str, ...]:
    return tuple(sorted({file for task in tasks for file in task.files}))


def _position(task: Task, order: Mapping[str, int]) -> tuple[int, int, str]:
    """After the last file that the task needs, by its place in that file."""
    last = max(order[file] for file in task.files)
    starts = [
        info.start
        for output in task.outputs
        for info in output.source.parts.values()
        if order[info.file] == last
    ]
    first = task.outputs[0]
    return last, min(starts), f"{first.matrices[0]:06d}{first.rows[0]:09d}"


def _shards(tasks: Sequence[Task], most_bytes: int) -> tuple[Shard, ...]:
    groups: list[list[Task]] = [[]]
    size = 0
    for task in tasks:
        if groups[-1] and size + task.nbytes > most_bytes:
            groups.append([])
            size = 0
        groups[-1].append(task)
        size += task.nbytes
    total = len(groups)
    return tuple(
        Shard(f"model-{number:05d}-of-{total:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    )


def _element_bytes(one: Part) -> int:
    return {"I64": 8, "F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}.get(one.dtype, 1)
