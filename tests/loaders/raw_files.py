"""Safetensors files byte by byte, right or wrong, and small edits of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def raw_safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file's bytes: header as JSON (or raw bytes), claiming `length` bytes if given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    return claimed.to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    """One tensor in a header; offsets count from the end of the header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a safetensors header in place; the data stays as it is."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    edit(header)
    path.write_bytes(raw_safetensors(header, raw[end:]))
