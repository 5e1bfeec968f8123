"""One call of loaders.hub in a process of its own: huggingface_hub reads its settings on import.

Usage: hub_client.py CALL ARGUMENTS, both JSON; prints one JSON object.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import loaders.hub
from loaders import hub_fetch
from loaders.errors import CheckpointError
from loaders.hub import resolve


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
    reject_config: str | None = None,
    free_bytes: int | None = None,
    fail_after_bytes: int | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """resolve, with faults of the machine if asked: a small disk, or one that fills up."""
    if reject_config is not None:
        arguments["before_weights"] = lambda folder: reject(folder, reject_config)
    if free_bytes is not None:
        loaders.hub.shutil = SimpleNamespace(  # type: ignore[assignment]
            disk_usage=lambda path: SimpleNamespace(free=free_bytes)
        )
    if fail_after_bytes is not None:
        fill_disk_after(fail_after_bytes)
    folder = resolve(**arguments)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return {"folder": str(folder), "files": sorted(files)}


def reject(folder: Path, message: str) -> None:
    """A caller that reads the config and does not like it."""
    assert (folder / "config.json").is_file()
    raise CheckpointError(message)


def fill_disk_after(limit: int) -> None:
    """Let each weight file grow to `limit` bytes and then fail as a full disk does."""
    append = hub_fetch._PartialFile.append

    def limited(part: hub_fetch._PartialFile, chunk: bytes) -> None:
        if part.size + len(chunk) > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(part, chunk)

    hub_fetch._PartialFile.append = limited  # type: ignore[method-assign, assignment]


CALLS = {"resolve": call_resolve}

if __name__ == "__main__":
    main()
