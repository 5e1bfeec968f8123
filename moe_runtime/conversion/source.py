"""Where the tensors of a conversion come from: a folder, or the hub shard by shard."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from loaders.checkpoint import Checkpoint, open_folder
from loaders.files import CheckpointFiles
from loaders.hub import local_folder
from loaders.hub_shards import HubShards, hub_shards
from moe_runtime.bundled import BUNDLED

_CACHE_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


class Source(Protocol):
    """Headers at once, weights when they are needed."""

    checkpoint: Checkpoint
    label: str  # how messages and the report call it
    hub_id: str | None
    revision: str | None  # commit of a hub model
    remote: bool  # whether weight files are fetched and dropped

    @property
    def files(self) -> CheckpointFiles:
        """Side files such as tokenizer.json."""
        ...

    def path(self, file: str) -> Path:
        """Where a fetched file lies."""
        ...

    def fetch(self, file: str, on_bytes: Callable[[int], None]) -> None:
        """Have a weight file at hand."""
        ...

    def drop(self, file: str) -> None:
        """Let go of a weight file."""
        ...

    def stamp(self, files: Sequence[str]) -> dict[str, list[object]]:
        """What changes when a weight file does."""
        ...

    def size(self, file: str) -> int:
        """Bytes of a weight file."""
        ...


class FolderSource:
    """A folder, or a hub model that is in the cache whole."""

    remote = False

    def __init__(self, folder: Path, label: str) -> None:
        self.folder = folder
        self.label = label
        self.checkpoint = open_folder(folder)
        cached = _CACHE_FOLDER.search(str(folder.resolve()))
        self.hub_id = f"{cached[1]}/{cached[2]}" if cached else None
        self.revision: str | None = folder.resolve().name if cached else None

    @property
    def files(self) -> CheckpointFiles:
        """Side files such as tokenizer.json."""
        return self.checkpoint.files

    def path(self, file: str) -> Path:
        """Where a file lies."""
        return self.checkpoint.path(file)

    def fetch(self, file: str, on_bytes: Callable[[int], None]) -> None:
        """Nothing: it is here."""

    def drop(self, file: str) -> None:
        """Nothing: it is the user's."""

    def stamp(self, files: Sequence[str]) -> dict[str, list[object]]:
        """Size and time of last change."""
        states = {file: self.path(file).stat() for file in files}
        return {file: [state.st_size, state.st_mtime_ns] for file, state in states.items()}

    def size(self, file: str) -> int:
        """Bytes of a weight file."""
        return self.path(file).stat().st_size


class HubSource:
    """A commit on the hub; `folder` holds the shards of the moment."""

    remote = True

    def __init__(self, shards: HubShards, folder: Path) -> None:
        self.shards = shards
        self.folder = folder
        self.label = shards.repo.repo_id
        self.hub_id: str | None = shards.repo.repo_id
        self.revision: str | None = shards.repo.commit
        self.checkpoint = shards.open()

    @property
    def files(self) -> CheckpointFiles:
        """Side files such as tokenizer.json."""
        return self.shards.files

    def path(self, file: str) -> Path:
        """Where a fetched file lies."""
        return self.shards.path(file, self.folder)

    def fetch(self, file: str, on_bytes: Callable[[int], None]) -> None:
        """Download a weight file, or what an interrupted run lacks of it."""
        self.shards.fetch(file, self.folder, on_bytes)

    def drop(self, file: str) -> None:
        """Delete a downloaded weight file."""
        self.shards.drop(file, self.folder)

    def stamp(self, files: Sequence[str]) -> dict[str, list[object]]:
        """Size and hash, as the hub tells them."""
        known = self.shards.repo.files
        return {file: [known[file].size, known[file].sha256] for file in files}

    def size(self, file: str) -> int:
        """Bytes of a weight file."""
        return self.shards.repo.files[file].size


def open_source(model: str, revision: str | None, download_folder: Path) -> Source:
    """The source that a user means: a bundled name, a folder or a hub id.

    download_folder: for shards of a hub model; made when the first one comes
    Raises CheckpointError when there is no such model or it is damaged.
    """
    folder = local_folder(model, revision=revision, bundled=BUNDLED)
    if folder is None:
        found = hub_shards(model, revision)
        if isinstance(found, HubShards):
            return HubSource(found, download_folder)
        folder = found
    return FolderSource(folder, model)
