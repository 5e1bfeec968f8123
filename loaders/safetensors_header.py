"""The header of a safetensors file, parsed strictly: nothing it claims is believed unchecked.

    bytes 0..8     length n of the header, little endian
    bytes 8..8+n   JSON: {"name": {"dtype": "BF16", "shape": [..], "data_offsets": [a, b]}, ..}
    then           the tensors' bytes; offsets count from here, without holes, to the file's end

No torch here: `inspect` reads headers of remote files, and of no more than headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from loaders.errors import CheckpointError
from loaders.json_text import parse_json_object, shown

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMENSIONS = 16
_MAX_TENSOR_BYTES = 1 << 50
_AGAIN = "the file is damaged or incomplete: download it again"

# Bits of one element, by the names that the format uses.
DTYPE_BITS: Mapping[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is."""

    name: str
    dtype: str  # a key of DTYPE_BITS
    shape: tuple[int, ...]
    file: str  # relative to the checkpoint's folder
    start: int  # first byte in the file
    end: int  # one past the last byte in the file

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.end - self.start


def header_bytes(first: bytes, *, file: str, file_size: int | None) -> int:
    """Bytes from the file's start to the end of its header, given at least the first 8.

    file_size: size of the whole file, None if it is not known
    Raises CheckpointError when the length cannot be true.
    """
    if len(first) < LENGTH_BYTES:
        raise CheckpointError(
            f"{file}: not a safetensors file: expected at least {LENGTH_BYTES} bytes, "
            f"found {len(first)}",
            hint=_AGAIN,
        )
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if length < 2 or length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: not a safetensors file: its header claims {length} bytes, "
            f"expected 2 to {MAX_HEADER_BYTES}",
            hint=_AGAIN,
        )
    if file_size is not None and LENGTH_BYTES + length > file_size:
        raise CheckpointError(
            f"{file}: the header claims {LENGTH_BYTES + length} bytes, the file has {file_size}",
            hint=_AGAIN,
        )
    return LENGTH_BYTES + length


def parse_header(raw: bytes, *, file: str, file_size: int | None) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name.

    raw:       the file's first bytes: the length, the whole JSON header, and any more
    file:      the file's name, for messages and for TensorInfo.file
    file_size: size of the whole file; None if it is not known, then its end is not checked
    Raises CheckpointError for anything that the format does not allow.
    """
    end = header_bytes(raw, file=file, file_size=file_size)
    if len(raw) < end:
        raise CheckpointError(
            f"{file}: the header claims {end} bytes, only {len(raw)} were read", hint=_AGAIN
        )
    entries = parse_json_object(raw[LENGTH_BYTES:end], file=f"{file}: header")
    entries.pop("__metadata__", None)
    tensors = {name: _tensor_info(name, entry, file, end) for name, entry in entries.items()}
    _check_spans(tensors, file, data_start=end, file_size=file_size)
    return tensors


def _tensor_info(name: str, entry: Any, file: str, data_start: int) -> TensorInfo:
    if not name or not name.isprintable() or len(name) > 1000:
        raise CheckpointError(f"{file}: tensor name {shown(name)} is not usable", hint=_AGAIN)
    where = f"{file}: {name}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {shown(entry)}", hint=_AGAIN)
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {shown(dtype)}", hint=_AGAIN)
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: {shown(shape)} is not a shape", hint=_AGAIN)
    offsets = entry.get("data_offsets")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: {shown(offsets)} are not data offsets", hint=_AGAIN)
    expected = _stored_bytes(dtype, shape)
    if expected != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shown(tuple(shape))} needs {expected or 'other'} bytes, "
            f"its offsets span {offsets[1] - offsets[0]}",
            hint=_AGAIN,
        )
    return TensorInfo(
        name, dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1]
    )


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= _MAX_TENSOR_BYTES
        for v in values
    )


def _stored_bytes(dtype: str, shape: list[int]) -> int | None:
    """Bytes that a tensor takes; None when they are enormous or no whole number."""
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        if bits > 8 * _MAX_TENSOR_BYTES and 0 not in shape:
            return None
    return bits // 8 if bits % 8 == 0 else None


def _check_spans(
    tensors: Mapping[str, TensorInfo], file: str, *, data_start: int, file_size: int | None
) -> None:
    """Tensors must follow each other without a hole or an overlap, from the header to the end."""
    position = data_start
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if info.start != position:
            problem = "overlaps the tensor before it" if info.start < position else "follows a hole"
            raise CheckpointError(
                f"{file}: {info.name} {problem}: expected it at byte {position}, "
                f"found {info.start}",
                hint=_AGAIN,
            )
        position = info.end
    if file_size is None or position == file_size:
        return
    state = "truncated" if file_size < position else "too long"
    raise CheckpointError(
        f"{file} is {state}: expected {position} bytes, found {file_size}",
        hint="the download is incomplete: download the file again"
        if state == "truncated"
        else _AGAIN,
    )
