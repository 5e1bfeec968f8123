"""One call of loaders.hub in a process of its own: huggingface_hub reads its settings on import.

Usage: hub_client.py CALL ARGUMENTS, both JSON; prints one JSON object.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import loaders.hub
from loaders import hub_fetch
from loaders.errors import CheckpointError
from loaders.files import CheckpointFiles
from loaders.hub import find_repo, resolve, weight_files
from loaders.hub_errors import hub_errors
from loaders.hub_files import HubFiles


def main() -> None:
    call, arguments = sys.argv[1], json.loads(sys.argv[2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            result = CALLS[call](**arguments)
        except CheckpointError as error:
            result = {"error": error.message, "hint": error.hint}
    result["warnings"] = [str(w.message) for w in caught if w.category is UserWarning]
    print(json.dumps(result))


def call_resolve(
    *,
    reject_type: str | None = None,
    free_bytes: int | None = None,
    fail_after_bytes: int | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """resolve, with faults of the machine if asked: a small disk, or one that fills up."""
    if reject_type is not None:
        arguments["before_weights"] = lambda files: reject(files, reject_type)
    if free_bytes is not None:
        loaders.hub.shutil = SimpleNamespace(  # type: ignore[assignment]
            disk_usage=lambda path: SimpleNamespace(free=free_bytes)
        )
    if fail_after_bytes is not None:
        fill_disk_after(fail_after_bytes)
    folder = resolve(**arguments)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return {"folder": str(folder), "files": sorted(files)}


def reject(files: CheckpointFiles, model_type: str) -> None:
    """A caller that reads the config and does not like it."""
    if json.loads(files.text("config.json") or b"")["model_type"] == model_type:
        raise CheckpointError(f"{model_type} is not supported")


def fill_disk_after(limit: int) -> None:
    """Let each weight file grow to `limit` bytes and then fail as a full disk does."""
    append = hub_fetch._PartialFile.append

    def limited(part: hub_fetch._PartialFile, chunk: bytes) -> None:
        if part.size + len(chunk) > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(part, chunk)

    hub_fetch._PartialFile.append = limited  # type: ignore[method-assign, assignment]


def call_headers(repo_id: str) -> dict[str, Any]:
    """The tensors of every shard, as HubFiles reads them: remote_headers without torch."""
    with hub_errors(repo_id, None):
        repo = find_repo(repo_id, None)
    assert repo is not None
    files = HubFiles(repo)
    shards = weight_files(files.names(), files.text("model.safetensors.index.json"))
    files.read_headers(shards)
    headers = [files.header(shard) for shard in shards]
    return {"tensors": {name: info.nbytes for part in headers for name, info in part.items()}}


def call_remote_headers(**arguments: Any) -> dict[str, Any]:
    """remote_headers, and what its checkpoint says."""
    from loaders.hub_headers import remote_headers  # slow import: torch

    checkpoint = remote_headers(**arguments)
    name = next(iter(checkpoint.tensors))
    read_error = ""
    try:
        checkpoint.read(name)
    except CheckpointError as error:
        read_error = error.message
    return {
        "tensors": {name: info.nbytes for name, info in checkpoint.tensors.items()},
        "config": checkpoint.config,
        "template": checkpoint.file_text("chat_template.jinja"),
        "read_error": read_error,
    }


CALLS: dict[str, Callable[..., dict[str, Any]]] = {
    "resolve": call_resolve,
    "headers": call_headers,
    "remote_headers": call_remote_headers,
}

if __name__ == "__main__":
    main()
