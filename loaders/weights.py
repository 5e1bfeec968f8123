"""Weights of a planned checkpoint, on the CPU over mapped files or on a GPU through staging.

What comes in is checked on the way: floats must be finite, E8M0 and E4M3 bytes not NaN,
scales of whole tensors not 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from loaders.checkpoint import TORCH_DTYPES, Checkpoint
from loaders.errors import CheckpointError
from loaders.logical import assembled, logical_tensors
from loaders.names.table import LoadPlan, NameTable, PlannedWeight, StoredTensor, match_names
from loaders.staging import Span, copy_spans
from quant.codecs import decode
from quant.tensor import QuantTensor

_E8M0_NAN = 255
_E4M3_NAN = 127  # with either sign
_CHECK_CHUNK = 1 << 24  # elements checked at once on the CPU
_BAR_DELAY_S = 1.0  # a small model needs no bar


@dataclass(frozen=True)
class Relayout:
    """Weights that are laid out anew on the device as they come, a few at a time.

    groups: names of weights that are there together; all others come before them
    take:   what stands for a group's weights, by the same names; theirs is freed
    """

    groups: Sequence[Sequence[str]]
    take: Callable[[dict[str, Tensor | QuantTensor]], dict[str, Any]]


def load_weights(
    checkpoint: Checkpoint,
    table: NameTable,
    dims: Mapping[str, int],
    num_layers: int,
    *,
    device: torch.device | str,
    relayout: Relayout | None = None,
    progress: bool = True,
) -> dict[str, Tensor | QuantTensor]:
    """All weights of a model by our names, plain ones in the dtype of the files.

    dims:     the letters of the table's shapes
    device:   "cpu" maps the files and copies only what is made of several tensors; "cuda" reads
              them through pinned buffers
    relayout: on a GPU, which weights are handed on to be laid out anew
    progress: a bar with bytes on stderr
    Raises CheckpointError when tensors do not fit the table (before anything is read or allocated),
    or hold NaN or infinity.
    """
    plan = match_names(logical_tensors(checkpoint), table, dims, num_layers)
    device = torch.device(device)
    with tqdm(
        desc="Loading weights",
        total=plan.total_bytes,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        delay=_BAR_DELAY_S,
        disable=None if progress else True,  # None: off unless stderr is a terminal
    ) as bar:
        if device.type == "cpu":
            return load_mapped(checkpoint, plan, device, bar.update)
        return load_staged(checkpoint, plan, device, bar.update, relayout)


def load_mapped(
    checkpoint: Checkpoint,
    plan: LoadPlan,
    device: torch.device,
    on_bytes: Callable[[int], object],
) -> dict[str, Tensor | QuantTensor]:
    """Tensors over the mapped files, on the CPU; the check reads everything but FP4 codes once."""
    weights = {}
    for planned in plan.weights:
        tensors = []
        for part in planned.parts:
            pieces = [checkpoint.read(source.name) for source in part.sources]
            tensors.append(_joined(pieces).view(part.shape))
            if any(bool(bad) for bad in _bad_flags(tensors[-1], part.holds)):
                raise _bad_tensor(tensors[-1], part)
            on_bytes(part.nbytes)
        weights[planned.name] = _weight(planned, iter(tensors))
    return weights


def _joined(pieces: list[Tensor]) -> Tensor:
    """The bytes of tensors of one dtype one after the other; a single one as it is."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([p.view(-1).view(torch.uint8) for p in pieces]).view(pieces[0].dtype)


def load_staged(
    checkpoint: Checkpoint,
    plan: LoadPlan,
    device: torch.device,
    on_bytes: Callable[[int], object],
    relayout: Relayout | None = None,
) -> dict[str, Tensor | QuantTensor]:
    """Tensors on `device`, filled through staging buffers and checked there."""
    groups = [] if relayout is None else [frozenset(group) for group in relayout.groups]
    later = frozenset().union(*groups)
    first = [planned for planned in plan.weights if planned.name not in later]
    weights = _staged(checkpoint, first, device, on_bytes)
    for group in groups:
        part = [planned for planned in plan.weights if planned.name in group]
        assert relayout is not None
        weights |= relayout.take(_staged(checkpoint, part, device, on_bytes))
    return weights


def _staged(
    checkpoint: Checkpoint,
    planned_weights: Sequence[PlannedWeight],
    device: torch.device,
    on_bytes: Callable[[int], object],
) -> dict[str, Tensor | QuantTensor]:
    parts = [part for planned in planned_weights for part in planned.parts]
    targets = [
        torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype], device=device) for part in parts
    ]
    spans = [
        span
        for part, target in zip(parts, targets, strict=True)
        for span in _spans(checkpoint, part, target)
    ]
    spans.sort(key=lambda span: (span.path, span.start))
    copy_spans(spans, device=device, on_bytes=on_bytes)
    _check_all(parts, targets)
    filled = iter(targets)
    return {planned.name: _rows_in_order(_weight(planned, filled)) for planned in planned_weights}


def _spans(checkpoint: Checkpoint, part: StoredTensor, target: Tensor) -> Iterator[Span]:
    """Where each source of a tensor goes: one after the other."""
    flat = target.view(-1).view(torch.uint8)
    position = 0
    for source in part.sources:
        piece = flat[position : position + source.nbytes]
        yield Span(checkpoint.path(source.file), source.start, piece)
        position += source.nbytes


def _weight(planned: PlannedWeight, filled: Iterator[Tensor]) -> Tensor | QuantTensor:
    """One weight from its stored tensors, the next ones of `filled`."""
    made = [
        assembled(piece.tensor, {part: next(filled) for part in piece.parts})
        for piece in planned.pieces
    ]
    if len(made) == 1:
        return made[0]
    decoded = [decode(piece) for piece in made if isinstance(piece, QuantTensor)]
    return torch.cat(decoded, dim=-2).view(planned.shape)


def _rows_in_order(weight: Tensor | QuantTensor) -> Tensor | QuantTensor:
    """A stack of matrices that lie transposed, put into rows within its own memory."""
    if isinstance(weight, QuantTensor) or weight.is_contiguous():
        return weight
    for matrix in weight:
        matrix.mT.view(-1).copy_(matrix.reshape(-1))
    return weight.mT.view(weight.shape)


def _check_all(parts: list[StoredTensor], targets: list[Tensor]) -> None:
    """The same check as on the CPU with one synchronisation in all."""
    owners, flags = [], []
    for index, (part, target) in enumerate(zip(parts, targets, strict=True)):
        for flag in _bad_flags(target, part.holds):
            owners.append(index)
            flags.append(flag)
    bad = torch.stack(flags).tolist() if flags else []
    if True in bad:
        index = owners[bad.index(True)]
        raise _bad_tensor(targets[index], parts[index])


def _bad_flags(tensor: Tensor, holds: str) -> Iterator[Tensor]:
    """Booleans on the tensor's device, one a chunk: whether it holds what it must not."""
    if holds == "bytes":
        return
    flat = tensor.view(-1)
    plain = holds in ("floats", "scale")
    for chunk in (flat if plain else flat.view(torch.uint8)).split(_CHECK_CHUNK):
        if chunk.numel() == 0:
            continue
        if holds == "scale":
            yield _is_bad(chunk, holds).any()
        elif holds == "floats":
            # NaN and infinity both show in the extremes, which need no array of booleans.
            low, high = torch.aminmax(chunk)
            yield ~(low.isfinite() & high.isfinite())
        elif holds == "e8m0":
            yield chunk.amax() == _E8M0_NAN
        else:
            yield (chunk & _E4M3_NAN).amax() == _E4M3_NAN


def _bad_tensor(tensor: Tensor, part: StoredTensor) -> CheckpointError:
    """The error for a tensor whose flag is set: which source, and the first bad element in it."""
    position = 0
    flat = tensor.view(-1)
    for source in part.sources:
        count = source.nbytes // tensor.element_size()
        values = flat[position : position + count]
        position += count
        where = _is_bad(values, part.holds).nonzero()
        if len(where):
            first = int(where[0])
            found = _shown(values[first], part.holds)
            index = _unravel(first, source.shape)
            return CheckpointError(
                f"{source.name}: found {found} at {index} in {source.file}, "
                f"{len(where)} such values in all",
                hint="the weights are damaged: download the file again",
            )
    raise AssertionError(f"no bad value in {part}")


def _is_bad(values: Tensor, holds: str) -> Tensor:
    if holds == "floats":
        return ~values.isfinite()
    if holds == "scale":
        return ~values.isfinite() | (values == 0)
    codes = values.view(torch.uint8)
    return codes == _E8M0_NAN if holds == "e8m0" else (codes & _E4M3_NAN) == _E4M3_NAN


def _shown(value: Tensor, holds: str) -> str:
    if holds == "e8m0":
        return "scale byte 255 (NaN)"
    return "an FP8 NaN" if holds == "e4m3" else str(value.item())


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        index.append(rest)
    return tuple(reversed(index))
