"""Name tables: which tensors of a checkpoint make up each of our weights, and their matching.

Names are those of an unquantized checkpoint (see loaders/logical.py), so one table serves every
number format. A shape is written in the letters of a model's dims: "E 2F D". `{i}` is the layer,
`{e}` the expert. Matching looks at headers alone, so a checkpoint that does not fit its config is
refused before anything is read or allocated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.json_text import listed
from loaders.logical import LogicalTensor
from loaders.logical_schemes import scale_shape
from loaders.safetensors_header import TensorInfo
from quant.formats import QuantFormat

DENSE_DTYPES = ("BF16", "F16", "F32")
_ONE_EXPERT = re.compile(r".*\bexperts\.\d+\.")
_MISMATCH = (
    "config.json and the weights do not belong together, or the checkpoint was sharded or "
    "converted: download the published one again"
)


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint."""

    name: str  # may hold {i} and {e}
    shape: str  # in letters


@dataclass(frozen=True)
class WeightSpec:
    """A weight: one tensor, or several that follow each other in memory."""

    sources: tuple[Source, ...]  # in order; with {e} the whole list is repeated for each expert
    shape: str  # of the weight, in letters; "" when rows follow each other
    any_format: bool  # False: plain numbers only
    dtypes: tuple[str, ...] = DENSE_DTYPES  # of plain numbers


@dataclass(frozen=True)
class NameTable:
    """All weights of a family in one layout."""

    weights: Mapping[str, WeightSpec]  # our name, which may hold {i} -> what it is of
    skip: Mapping[str, str] = field(default_factory=dict)  # regex of unused names -> reason


@dataclass(frozen=True)
class StoredTensor:
    """One tensor to be filled: the bytes of its sources follow each other."""

    sources: tuple[TensorInfo, ...]
    dtype: str  # as in the files
    shape: tuple[int, ...]  # as it is filled
    holds: str  # "floats" (finite), "scale" (and not 0), "e8m0", "e4m3" (not NaN) or "bytes"

    @property
    def nbytes(self) -> int:
        """Bytes of all sources."""
        return sum(source.nbytes for source in self.sources)


@dataclass(frozen=True)
class Piece:
    """Stored tensors that make one logical tensor, for loaders.logical.assembled."""

    tensor: LogicalTensor
    parts: Mapping[str, StoredTensor]  # by the keys of tensor.parts


@dataclass(frozen=True)
class PlannedWeight:
    """One of our weights and where its bytes are."""

    name: str
    shape: tuple[int, ...]  # logical
    pieces: tuple[Piece, ...]  # several only where blocks of scales do not line up: to be decoded

    @property
    def format(self) -> QuantFormat | None:
        """The format of all pieces; None for plain numbers."""
        return self.pieces[0].tensor.format

    @property
    def dtype(self) -> str:
        """The dtype of the values in the files."""
        return self.pieces[0].tensor.dtype

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Every tensor to fill, in order."""
        return tuple(part for piece in self.pieces for part in piece.parts.values())


@dataclass(frozen=True)
class LoadPlan:
    """All weights of a model, matched and checked against the headers."""

    weights: tuple[PlannedWeight, ...]
    skipped: Mapping[str, str]  # tensor -> why it is not used

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of each weight, by our name."""
        return {w.name: sum(part.nbytes for part in w.parts) for w in self.weights}

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.nbytes.values())


def dense(name: str, shape: str, dtypes: tuple[str, ...] = DENSE_DTYPES) -> WeightSpec:
    """A weight that is one tensor of plain numbers."""
    return WeightSpec((Source(name, shape),), shape, any_format=False, dtypes=dtypes)


def matrix(name: str, shape: str) -> WeightSpec:
    """A weight that is one tensor, plain or in any format that is read."""
    return WeightSpec((Source(name, shape),), shape, any_format=True)


def rows(*sources: tuple[str, str]) -> WeightSpec:
    """A weight whose rows are in several tensors of any format: (name, shape) of each, in order."""
    return WeightSpec(tuple(Source(name, shape) for name, shape in sources), "", any_format=True)


def stacked(shape: str, *sources: tuple[str, str]) -> WeightSpec:
    """[E, ..] from tensors of single experts, of any format: rows of one expert in order, {e} in
    their names."""
    return WeightSpec(tuple(Source(name, part) for name, part in sources), shape, any_format=True)


def match_names(
    tensors: Iterable[LogicalTensor], table: NameTable, dims: Mapping[str, int], num_layers: int
) -> LoadPlan:
    """Where each weight's bytes are.

    tensors: loaders.logical.logical_tensors of the checkpoint
    dims:    the letters of the table's shapes, e.g. {"D": 2880, ..}
    Raises CheckpointError when a tensor is missing, left over, or of another shape or format,
    UnsupportedModelError for single experts where the family has stacked ones.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    specs = dict(_expanded(table, dims, num_layers))
    wanted = {source.name for spec in specs.values() for source in spec.sources}
    skipped = _account_for_all(by_name.keys(), wanted, table.skip)
    weights = tuple(_plan_weight(name, spec, by_name, dims) for name, spec in specs.items())
    return LoadPlan(weights, skipped)


def resolve_shape(shape: str, dims: Mapping[str, int]) -> tuple[int, ...]:
    """Letters to sizes: "E 2F D/32 16" with dims E, 2F, D."""
    sizes = []
    for letter in shape.split():
        name, _, divisor = letter.partition("/")
        size = dims[name] if name in dims else int(name)
        sizes.append(size // int(divisor or 1))
    return tuple(sizes)


def _expanded(
    table: NameTable, dims: Mapping[str, int], num_layers: int
) -> Iterator[tuple[str, WeightSpec]]:
    """The table with a row for each layer, and a source for each expert."""
    for name, spec in table.weights.items():
        if any("{e}" in source.name for source in spec.sources):
            numbered = [_numbered(spec, "{e}", expert).sources for expert in range(dims["E"])]
            spec = replace(spec, sources=tuple(source for one in numbered for source in one))
        if "{i}" not in name:
            yield name, spec
            continue
        for layer in range(num_layers):
            yield name.replace("{i}", str(layer)), _numbered(spec, "{i}", layer)


def _numbered(spec: WeightSpec, letter: str, number: int) -> WeightSpec:
    sources = (Source(s.name.replace(letter, str(number)), s.shape) for s in spec.sources)
    return replace(spec, sources=tuple(sources))


def _account_for_all(
    names: Iterable[str], wanted: set[str], skip: Mapping[str, str]
) -> dict[str, str]:
    """Every tensor is wanted or skipped for a reason, and every wanted one is there."""
    missing = sorted(wanted - set(names))
    single = next((name for name in sorted(names) if _ONE_EXPERT.match(name)), None)
    if missing and single is not None and not any(map(_ONE_EXPERT.match, wanted)):
        raise UnsupportedModelError(
            f"experts that are stored one by one ({single}) are not supported for this family",
            hint="take a checkpoint whose experts are stacked, as the published one",
        )
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(wanted)} tensors are missing: {listed(missing)}",
            hint=_MISMATCH,
        )
    skipped = {}
    surplus = []
    for name in set(names) - wanted:
        reason = next((why for pattern, why in skip.items() if re.fullmatch(pattern, name)), None)
        if reason is None:
            surplus.append(name)
        else:
            skipped[name] = reason
    if surplus:
        raise CheckpointError(
            f"{len(surplus)} tensors are not part of this model: {listed(sorted(surplus))}",
            hint=_MISMATCH,
        )
    return skipped


def _plan_weight(
    name: str, spec: WeightSpec, tensors: Mapping[str, LogicalTensor], dims: Mapping[str, int]
) -> PlannedWeight:
    found = [_checked(tensors[source.name], source, dims, spec) for source in spec.sources]
    first = found[0]
    for other in found[1:]:  # what follows each other is of one kind
        if (other.format, other.dtype, other.transposed) != (first.format, first.dtype, False):
            raise _mismatch(other, _kind(first), _kind(other))
    if spec.shape:
        shape = resolve_shape(spec.shape, dims)
    else:
        shape = (sum(tensor.shape[0] for tensor in found), *first.shape[1:])
    if _line_up(found):
        return PlannedWeight(name, shape, (_joined(found, shape),))
    return PlannedWeight(name, shape, tuple(_joined([one], one.shape) for one in found))


def _checked(
    tensor: LogicalTensor, source: Source, dims: Mapping[str, int], spec: WeightSpec
) -> LogicalTensor:
    expected = resolve_shape(source.shape, dims)
    if tensor.shape != expected:
        raise _mismatch(tensor, f"shape {expected} ({source.shape})", str(tensor.shape))
    plain = tensor.format is None and tensor.dtype in spec.dtypes
    if not (plain or (tensor.format is not None and spec.any_format)):
        raise _mismatch(tensor, f"dtype {' or '.join(spec.dtypes)}", _kind(tensor))
    return tensor


def _mismatch(tensor: LogicalTensor, expected: str, found: str) -> CheckpointError:
    file = tensor.parts["values"].file
    return CheckpointError(
        f"{tensor.name}: expected {expected}, found {found} in {file}", hint=_MISMATCH
    )


def _kind(tensor: LogicalTensor) -> str:
    return tensor.format.name if tensor.format else tensor.dtype


def _line_up(found: list[LogicalTensor]) -> bool:
    """Whether codes and scales of tensors one after the other are those of one tensor."""
    format = found[0].format
    if len(found) == 1 or format is None:
        return True
    if format.tensor_scale:
        return False  # each has a scale of its own
    height = format.block[0] if format.block else 1
    return all(
        tensor.shape[-2] % height == 0
        and math.prod(tensor.parts["scales"].shape) == math.prod(scale_shape(format, tensor.shape))
        for tensor in found
    )


def _joined(found: list[LogicalTensor], shape: tuple[int, ...]) -> Piece:
    """Tensors that follow each other as one of `shape`."""
    first = found[0]
    parts = {}
    for part, info in first.parts.items():
        sources = tuple(tensor.parts[part] for tensor in found)
        part_shape = _part_shape(part, first, shape, info) if len(found) > 1 else info.shape
        parts[part] = StoredTensor(sources, info.dtype, part_shape, _holds(part, first, info))
    return Piece(replace(first, shape=shape), parts)


def _part_shape(
    part: str, first: LogicalTensor, shape: tuple[int, ...], info: TensorInfo
) -> tuple[int, ...]:
    if first.format is None:
        return shape
    if part == "scales":
        return scale_shape(first.format, shape)
    return (*shape[:-1], shape[-1] // first.format.values_per_byte)


def _holds(part: str, tensor: LogicalTensor, info: TensorInfo) -> str:
    if part == "tensor_scale":
        return "scale"  # a 0 that no tool ever wrote was seen to empty whole layers
    if info.dtype in DENSE_DTYPES:
        return "floats"
    if info.dtype == "F8_E4M3":
        return "e4m3"
    return "e8m0" if part == "scales" else "bytes"
