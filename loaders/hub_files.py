"""A repository on the hub as a source of files: names, small files, and safetensors headers.

Headers come by range request, a few at once, so that a checkpoint of any size is seen whole for a
few MB. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from huggingface_hub import hf_hub_url

from loaders.errors import CheckpointError
from loaders.files import MAX_TEXT_BYTES
from loaders.hub_errors import hub_errors
from loaders.hub_fetch import read_range
from loaders.safetensors_header import TensorInfo, header_bytes, parse_header

FIRST_READ_BYTES = 100_000  # holds most headers whole
_WORKERS = 8


@dataclass(frozen=True)
class HubFile:
    """One file of a repository."""

    size: int  # bytes
    sha256: str | None  # None for small files kept in git itself


@dataclass(frozen=True)
class HubRepo:
    """What the hub says about one revision of a model."""

    repo_id: str
    revision: str  # as asked for
    commit: str  # what it stands for now
    files: Mapping[str, HubFile]

    def url(self, name: str) -> str:
        """Where a file of exactly this commit is served."""
        return hf_hub_url(self.repo_id, name, revision=self.commit)


class HubFiles:
    """The files of a repository, for loaders.checkpoint.open_files; nothing is stored."""

    def __init__(self, repo: HubRepo) -> None:
        self.repo = repo
        self.label = repo.repo_id
        self._texts: dict[str, bytes] = {}
        self._headers: dict[str, dict[str, TensorInfo]] = {}

    def names(self) -> list[str]:
        """Names of all files in the root and in original/, sorted."""
        return sorted(n for n in self.repo.files if "/" not in n.removeprefix("original/"))

    def text(self, name: str, *, max_bytes: int = MAX_TEXT_BYTES) -> bytes | None:
        """Content of a small file; None if there is none, CheckpointError if it is larger."""
        if name not in self.repo.files:
            return None
        size = self.repo.files[name].size
        if size > max_bytes:
            raise CheckpointError(f"{name}: expected at most {max_bytes} bytes, found {size}")
        if name not in self._texts:
            self._texts[name] = self._read(name, 0, size)
        return self._texts[name]

    def header(self, name: str) -> dict[str, TensorInfo]:
        """The tensors of a safetensors file, by name; CheckpointError if it is not sound."""
        if name not in self._headers:
            self._headers[name] = self._read_header(name)
        return self._headers[name]

    def read_headers(self, names: Sequence[str]) -> None:
        """Read the headers of several files at once; `header` then has them."""
        with ThreadPoolExecutor(_WORKERS) as pool:
            self._headers.update(zip(names, pool.map(self._read_header, names), strict=True))

    def _read_header(self, name: str) -> dict[str, TensorInfo]:
        size = self.repo.files[name].size
        raw = self._read(name, 0, min(size, FIRST_READ_BYTES))
        end = header_bytes(raw, file=name, file_size=size)
        if end > len(raw):
            raw += self._read(name, len(raw), end)
        return parse_header(raw, file=name, file_size=size)

    def _read(self, name: str, start: int, stop: int) -> bytes:
        with hub_errors(self.repo.repo_id, self.repo.revision):
            return read_range(self.repo.url(name), start, stop) if stop > start else b""
