"""The files of a checkpoint as the rest sees them, and a folder as one such source. No torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from loaders.errors import CheckpointError
from loaders.safetensors_header import LENGTH_BYTES, TensorInfo, header_bytes, parse_header

MAX_TEXT_BYTES = 100_000_000  # of a side file; a large tokenizer.json has 30 MB


class CheckpointFiles(Protocol):
    """Where files come from: a folder here, or a repository elsewhere for headers alone.

    Names are relative, with "/" between parts, as in "original/config.json".
    """

    label: str  # how messages call the whole: the folder or the hub id

    def names(self) -> Collection[str]:
        """Names of all files in the root and in original/."""
        ...

    def text(self, name: str, *, max_bytes: int = MAX_TEXT_BYTES) -> bytes | None:
        """Content of a small file; None if there is none, CheckpointError if it is larger."""
        ...

    def header(self, name: str) -> dict[str, TensorInfo]:
        """The tensors of a safetensors file, by name; CheckpointError if it is not sound."""
        ...


class FolderFiles:
    """The files of a local folder. Symbolic links work: the hub's cache is made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.label = str(folder)

    def names(self) -> list[str]:
        """Names of all files in the root and in original/, sorted."""
        found = []
        try:
            for entry in self.folder.iterdir():
                if entry.name == "original" and entry.is_dir():
                    found += [f"original/{inner.name}" for inner in entry.iterdir()]
                else:
                    found.append(entry.name)
        except OSError as error:
            raise _unreadable(str(self.folder), error) from error
        return sorted(found)

    def text(self, name: str, *, max_bytes: int = MAX_TEXT_BYTES) -> bytes | None:
        """Content of a small file; None if there is none, CheckpointError if it is larger."""
        path = self.folder / name
        try:
            if not path.exists():
                return None
            size = regular_file_size(path, name)
            if size > max_bytes:
                raise CheckpointError(f"{name}: expected at most {max_bytes} bytes, found {size}")
            return path.read_bytes()
        except OSError as error:
            raise _unreadable(name, error) from error

    def header(self, name: str) -> dict[str, TensorInfo]:
        """The tensors of a safetensors file, by name; CheckpointError if it is not sound."""
        path = self.folder / name
        try:
            size = regular_file_size(path, name)
            with path.open("rb") as file:
                first = file.read(LENGTH_BYTES)
                end = header_bytes(first, file=name, file_size=size)
                raw = first + file.read(end - LENGTH_BYTES)
        except OSError as error:
            raise _unreadable(name, error) from error
        return parse_header(raw, file=name, file_size=size)


def regular_file_size(path: Path, name: str) -> int:
    """Bytes of a file; CheckpointError for anything but a file (opening a pipe would wait)."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{name}: expected a file, found something else of that name")
    return status.st_size


def _unreadable(name: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"{name} cannot be read: {error.strerror or error}")
