"""Name tables: which tensors of a file make up each of our weights, as data; and their matching.

A shape is written in the letters of a model's dims: "E 2F D/32 16". `{i}` is the layer. Matching
looks at headers alone, so a checkpoint that does not fit its config is refused before anything is
read or allocated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from loaders.errors import CheckpointError
from loaders.json_text import listed
from loaders.safetensors_header import TensorInfo
from quant.formats import MXFP4, QuantFormat

DENSE_DTYPES = ("BF16", "F16", "F32")
_MISMATCH = (
    "config.json and the weights do not belong together, or the checkpoint was sharded or "
    "converted: download the published one again"
)


@dataclass(frozen=True)
class Source:
    """One tensor of the file."""

    name: str  # may hold {i}
    shape: str  # in letters


@dataclass(frozen=True)
class DenseSpec:
    """A weight in plain floats: one tensor, or several whose rows follow each other."""

    sources: tuple[Source, ...]


@dataclass(frozen=True)
class QuantSpec:
    """A quantized weight: codes and scales, two tensors of bytes."""

    values: Source
    scales: Source
    shape: str  # the logical shape, in letters
    format: QuantFormat


@dataclass(frozen=True)
class NameTable:
    """All weights of a family in one layout."""

    weights: Mapping[str, DenseSpec | QuantSpec]  # our name, which may hold {i} -> what it is of
    skip: Mapping[str, str] = field(default_factory=dict)  # regex of unused names -> reason


@dataclass(frozen=True)
class StoredTensor:
    """One tensor to be filled: the bytes of its sources follow each other."""

    sources: tuple[TensorInfo, ...]
    dtype: str  # as in the files
    shape: tuple[int, ...]  # as we hold it
    holds: str  # "floats" (must be finite), "codes" (any byte) or "e8m0" (255 is NaN)

    @property
    def nbytes(self) -> int:
        """Bytes of all sources."""
        return sum(source.nbytes for source in self.sources)


@dataclass(frozen=True)
class PlannedWeight:
    """One of our weights and where its bytes are; scales, format and shape if it is quantized."""

    name: str
    values: StoredTensor
    scales: StoredTensor | None = None
    format: QuantFormat | None = None
    shape: tuple[int, ...] = ()  # logical; values.shape holds for plain floats

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The tensors to fill: one, or values and scales."""
        return (self.values,) if self.scales is None else (self.values, self.scales)


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


def dense(name: str, shape: str) -> DenseSpec:
    """A weight that is one tensor of the file."""
    return DenseSpec((Source(name, shape),))


def rows(*sources: tuple[str, str]) -> DenseSpec:
    """A weight whose rows are in several tensors: (name, shape) of each, in order."""
    return DenseSpec(tuple(Source(name, shape) for name, shape in sources))


def mxfp4_blocks(values: str, scales: str, shape: str) -> QuantSpec:
    """MXFP4 in blocks of 16 bytes, [.., rows, columns / 32, 16], with a scale byte for each."""
    leading, _, columns = shape.rpartition(" ")
    return QuantSpec(
        Source(values, f"{leading} {columns}/32 16"),
        Source(scales, f"{leading} {columns}/32"),
        shape,
        MXFP4,
    )


def match_names(
    tensors: Mapping[str, TensorInfo], table: NameTable, dims: Mapping[str, int], num_layers: int
) -> LoadPlan:
    """Where each weight's bytes are.

    tensors: what the headers say
    dims:    the letters of the table's shapes, e.g. {"D": 2880, ..}
    Raises CheckpointError when a tensor is missing, left over, or of another shape or dtype.
    """
    specs = dict(_expanded(table, num_layers))
    wanted = {source.name for spec in specs.values() for source in _sources(spec)}
    skipped = _account_for_all(tensors, wanted, table.skip)
    weights = tuple(_plan_weight(name, spec, tensors, dims) for name, spec in specs.items())
    return LoadPlan(weights, skipped)


def resolve_shape(shape: str, dims: Mapping[str, int]) -> tuple[int, ...]:
    """Letters to sizes: "E 2F D/32 16" with dims E, 2F, D."""
    sizes = []
    for letter in shape.split():
        name, _, divisor = letter.partition("/")
        size = dims[name] if name in dims else int(name)
        sizes.append(size // int(divisor or 1))
    return tuple(sizes)


def _expanded(table: NameTable, num_layers: int) -> Iterator[tuple[str, DenseSpec | QuantSpec]]:
    """The table with a row for each layer."""
    for name, spec in table.weights.items():
        if "{i}" not in name:
            yield name, spec
            continue
        for layer in range(num_layers):
            yield name.replace("{i}", str(layer)), _of_layer(spec, layer)


def _of_layer(spec: DenseSpec | QuantSpec, layer: int) -> DenseSpec | QuantSpec:
    def numbered(source: Source) -> Source:
        return Source(source.name.replace("{i}", str(layer)), source.shape)

    if isinstance(spec, DenseSpec):
        return DenseSpec(tuple(map(numbered, spec.sources)))
    return QuantSpec(numbered(spec.values), numbered(spec.scales), spec.shape, spec.format)


def _sources(spec: DenseSpec | QuantSpec) -> tuple[Source, ...]:
    return spec.sources if isinstance(spec, DenseSpec) else (spec.values, spec.scales)


def _account_for_all(
    tensors: Mapping[str, TensorInfo], wanted: set[str], skip: Mapping[str, str]
) -> dict[str, str]:
    """Every tensor is wanted or skipped for a reason, and every wanted one is there."""
    missing = sorted(wanted - tensors.keys())
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(wanted)} tensors are missing: {listed(missing)}",
            hint=_MISMATCH,
        )
    skipped = {}
    surplus = []
    for name in tensors.keys() - wanted:
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
    name: str,
    spec: DenseSpec | QuantSpec,
    tensors: Mapping[str, TensorInfo],
    dims: Mapping[str, int],
) -> PlannedWeight:
    if isinstance(spec, QuantSpec):
        shape = resolve_shape(spec.shape, dims)
        packed = (*shape[:-1], shape[-1] // spec.format.values_per_byte)
        values = _checked(tensors[spec.values.name], spec.values, dims, ("U8",))
        scales = _checked(tensors[spec.scales.name], spec.scales, dims, ("U8",))
        return PlannedWeight(
            name,
            StoredTensor((values,), "U8", packed, "codes"),
            StoredTensor((scales,), "U8", scales.shape, "e8m0"),
            spec.format,
            shape,
        )
    allowed: tuple[str, ...] = DENSE_DTYPES
    found = []
    for source in spec.sources:
        found.append(_checked(tensors[source.name], source, dims, allowed))
        allowed = (found[0].dtype,)  # rows of one weight are of one dtype
    num_rows = sum(info.shape[0] for info in found)
    return PlannedWeight(
        name, StoredTensor(tuple(found), allowed[0], (num_rows, *found[0].shape[1:]), "floats")
    )


def _checked(
    info: TensorInfo, source: Source, dims: Mapping[str, int], allowed: tuple[str, ...]
) -> TensorInfo:
    expected = resolve_shape(source.shape, dims)
    if info.shape != expected:
        raise CheckpointError(
            f"{info.name}: expected shape {expected} ({source.shape}), found {info.shape} "
            f"in {info.file}",
            hint=_MISMATCH,
        )
    if info.dtype not in allowed:
        raise CheckpointError(
            f"{info.name}: expected dtype {' or '.join(allowed)}, found {info.dtype} "
            f"in {info.file}",
            hint=_MISMATCH,
        )
    return info
