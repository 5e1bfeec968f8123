"""A weight beside the source's: the same bytes, or how much was lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.logical import LogicalTensor
from loaders.tensor_rows import RowReader
from moe_runtime.conversion.roles import expert_of
from moe_runtime.verification.result import Finding
from quant.formats import BF16
from quant.quality import TensorQuality, measure
from quant.tensor import QuantTensor

# Below these a weight is not what a sound encoder makes of its source, by bits of a code. Gaussian
# weights have 19 dB in MXFP4 and 31 dB in FP8; heavy tails take a few dB.
LEAST_SQNR_DB = {4: 10.0, 8: 20.0, 16: 40.0}


@dataclass(frozen=True)
class SourceRows:
    """Where the source has a weight: as a weight of its own, or as rows of stacked experts."""

    weight: LogicalTensor
    matrix: int | None = None  # of the stack; None: the same one as in the weight
    first_row: int = 0


def find_source(weight: LogicalTensor, sources: Mapping[str, LogicalTensor]) -> SourceRows | None:
    """The rows of a weight in the source; None if it has none of that name and shape."""
    same = sources.get(weight.name)
    if same is not None:
        return SourceRows(same) if same.shape == weight.shape else None
    parsed = expert_of(weight.name)
    if parsed is None:
        return None
    prefix, expert, rest = parsed
    projection = rest.removesuffix(".weight")
    stack = "down_proj" if projection == "down_proj" else "gate_up_proj"
    stacked = sources.get(f"{prefix}.{stack}") or sources.get(f"{prefix}.{stack}.weight")
    if stacked is None or len(stacked.shape) != 3 or expert >= stacked.shape[0]:
        return None
    rows, columns = weight.shape
    height = rows if projection == "down_proj" else 2 * rows
    if stacked.shape[1:] != (height, columns):
        return None
    return SourceRows(stacked, expert, rows if projection == "up_proj" else 0)


@dataclass(frozen=True)
class Comparison:
    """Some rows of a weight beside the source's."""

    equal: bool
    differing: int = 0  # numbers that are not the source's, of plain weights of one dtype
    quality: TensorQuality | None = None


def compare(
    piece: Tensor | QuantTensor, reader: RowReader, source: SourceRows, matrix: int, start: int
) -> Comparison:
    """Rows of a weight beside the same rows of the source.

    reader:        of the source
    matrix, start: of the piece in its own weight
    """
    rows = piece.shape[0]
    first = source.first_row + start
    matrix = matrix if source.matrix is None else source.matrix
    if _same_format(piece, source):
        theirs = reader.rows(source.weight, matrix, first, first + rows)
        if _same_bytes(piece, theirs):
            return Comparison(equal=True)
        if isinstance(piece, Tensor) and isinstance(theirs, Tensor) and piece.dtype == theirs.dtype:
            return Comparison(equal=False, differing=int((_bits(piece) != _bits(theirs)).sum()))
    numbers = reader.decoded_rows(source.weight, matrix, first, first + rows)
    return Comparison(equal=False, quality=measure(numbers, _stored(piece)))


def compare_vectors(ours: Tensor, theirs: Tensor) -> Comparison:
    """The same for plain weights of any shape, read whole."""
    if ours.dtype == theirs.dtype:
        differing = int((_bits(ours) != _bits(theirs)).sum())
        return Comparison(equal=not differing, differing=differing)
    quality = measure(theirs.reshape(1, -1).float(), _stored(ours.reshape(1, -1)))
    return Comparison(equal=False, quality=quality)


def judge_comparison(
    weight: LogicalTensor, differing: int, quality: TensorQuality | None
) -> Iterator[Finding]:
    """What is wrong with a weight beside its source."""
    if differing:
        total = 1
        for size in weight.shape:
            total *= size
        message = f"{differing} of {total} numbers differ from the source's, in the same format"
        yield Finding("source", message, weight.name)
    if quality is None or quality.exact or quality.signal == 0:
        return
    bits = 16 if weight.format is None else weight.format.value_bits
    least, found = LEAST_SQNR_DB[bits], quality.sqnr_db
    if found is None or found < least:
        shown = "no number" if found is None else f"{found:.2f} dB"
        message = f"signal to noise against the source is {shown}, expected at least {least:g} dB"
        yield Finding("source", message, weight.name)


def _same_format(piece: Tensor | QuantTensor, source: SourceRows) -> bool:
    if not isinstance(piece, QuantTensor):
        return source.weight.format is None
    height = piece.format.block[0] if piece.format.block else 1
    return source.weight.format is piece.format and source.first_row % height == 0


def _stored(piece: Tensor | QuantTensor) -> QuantTensor:
    """Plain numbers of any dtype decode as bf16 does: they are what they are."""
    if isinstance(piece, QuantTensor):
        return piece
    return QuantTensor(piece, None, BF16, tuple(piece.shape))


def _same_bytes(ours: Tensor | QuantTensor, theirs: Tensor | QuantTensor) -> bool:
    return all(
        a is b or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(_raw_parts(ours), _raw_parts(theirs), strict=True)
    )


def _raw_parts(piece: Tensor | QuantTensor) -> tuple[Tensor | None, ...]:
    stored = _stored(piece)
    parts = (stored.values, stored.scales, stored.tensor_scale)
    return tuple(None if part is None else _bits(part) for part in parts)


def _bits(values: Tensor) -> Tensor:
    """As bytes, so that NaN equals itself and the sign of zero counts."""
    size = values.element_size()
    wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return values.contiguous().view(wide)
