"""A checkpoint on the hub by its headers alone: no weight is downloaded, nothing is stored."""

from __future__ import annotations

from loaders.checkpoint import Checkpoint, open_files, open_folder
from loaders.hub import cached_folder, find_repo, weight_files, weight_index
from loaders.hub_errors import hub_errors
from loaders.hub_files import HubFiles


def remote_headers(repo_id: str, revision: str | None = None) -> Checkpoint:
    """Open a hub model by its configs and the headers of its shards.

    Offline, or when the hub does not answer, the copy in the cache is opened instead.
    Raises CheckpointError or UnsupportedModelError.
    """
    with hub_errors(repo_id, revision):
        repo = find_repo(repo_id, revision)
        if repo is None:
            return open_folder(cached_folder(repo_id, revision))
    files = HubFiles(repo)
    names = files.names()
    index = weight_index(names)
    files.read_headers(weight_files(names, files.text(index) if index else None))
    return open_files(files)
