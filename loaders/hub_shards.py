"""Shards of a hub model one at a time: fetched into a folder of the caller's, dropped after use.

A shard that huggingface_hub's cache has already is read from there and stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from loaders.checkpoint import Checkpoint, open_files
from loaders.errors import CheckpointError
from loaders.hub import LARGEST_HTTP_FILE, cached_folder, find_repo, weight_files, weight_index
from loaders.hub_errors import hub_errors
from loaders.hub_fetch import BlobDownload, fetch
from loaders.hub_files import HubFiles, HubRepo


class HubShards:
    """The weight files of one commit."""

    def __init__(self, repo: HubRepo, files: HubFiles) -> None:
        self.repo = repo
        self.files = files

    def open(self) -> Checkpoint:
        """The checkpoint by its headers; its tensors cannot be read before they are fetched."""
        names = self.files.names()
        index = weight_index(names)
        self.files.read_headers(weight_files(names, self.files.text(index) if index else None))
        return open_files(self.files)

    def path(self, name: str, folder: Path) -> Path:
        """Where a shard is or will be: in the cache, or in `folder`."""
        cached = try_to_load_from_cache(self.repo.repo_id, name, revision=self.repo.commit)
        return Path(cached) if isinstance(cached, str) else self._download(name, folder).blob

    def fetch(self, name: str, folder: Path, on_bytes: Callable[[int], None]) -> None:
        """Bring one shard, going on from the part that an earlier run left in `folder`.

        Raises CheckpointError when the hub refuses, cannot be reached or sends other bytes.
        """
        if self.path(name, folder).exists():
            return
        if self.repo.files[name].size > LARGEST_HTTP_FILE:
            raise CheckpointError(
                f"{self.repo.repo_id}: {name} is too large to be fetched alone",
                hint="download the model first: hf download " + self.repo.repo_id,
            )
        with hub_errors(self.repo.repo_id, self.repo.revision):
            fetch(self._download(name, folder), on_bytes, threading.Event())

    def drop(self, name: str, folder: Path) -> None:
        """Delete a fetched shard; one in the cache stays."""
        download = self._download(name, folder)
        for path in (download.blob, download.lock):
            path.unlink(missing_ok=True)

    def _download(self, name: str, folder: Path) -> BlobDownload:
        file = self.repo.files[name]
        if file.sha256 is None:
            raise CheckpointError(f"{self.repo.repo_id}: the hub tells no hash of {name}")
        blob = folder / file.sha256
        lock = folder / f"{file.sha256}.lock"
        return BlobDownload(name, self.repo.url(name), blob, lock, file.size, file.sha256)


def hub_shards(repo_id: str, revision: str | None = None) -> HubShards | Path:
    """One commit of a hub model; the folder in the cache where that must do instead."""
    with hub_errors(repo_id, revision):
        repo = find_repo(repo_id, revision)
        if repo is None:
            return cached_folder(repo_id, revision)
    return HubShards(repo, HubFiles(repo))
