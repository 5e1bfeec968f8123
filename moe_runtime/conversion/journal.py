"""What of a conversion is done, on disk: one line of JSON for each finished shard.

    {"identity": .., "source": {file: [size, time or hash]}}     first line
    {"shard": "model-00001-of-00004.safetensors", "bytes": n, "quality": [..]}

A shard gets its line once its bytes are on the disk under their final name, so a line is always
true; a process killed in the middle of a line leaves a last line that is no JSON, which is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JOURNAL = "conversion_journal.jsonl"


@dataclass
class Journal:
    """The journal of a folder; `done` maps a shard to what was recorded with it."""

    path: Path
    identity: str
    source: dict[str, Any]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Journal | None:
        """The journal that an earlier run left, shards that are not there as recorded left out."""
        path = folder / JOURNAL
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            first = json.loads(lines[0])
            journal = cls(path, first["identity"], first["source"])
        except (OSError, IndexError, KeyError, TypeError, ValueError):
            return None
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            shard = folder / entry["shard"]
            if shard.is_file() and shard.stat().st_size == entry["bytes"]:
                journal.done[entry["shard"]] = entry
        return journal

    @classmethod
    def begin(cls, folder: Path, identity: str, source: dict[str, Any]) -> Journal:
        """An empty journal in a folder."""
        journal = cls(folder / JOURNAL, identity, source)
        journal.path.unlink(missing_ok=True)
        journal._append({"identity": identity, "source": source})
        return journal

    def rewrite(self) -> None:
        """Only whole lines again, so that the next one does not continue a torn one."""
        fresh = self.path.with_suffix(".new")
        lines = [{"identity": self.identity, "source": self.source}, *self.done.values()]
        with fresh.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path)

    def add(self, shard: str, nbytes: int, quality: list[Any]) -> None:
        """Record a finished shard."""
        entry = {"shard": shard, "bytes": nbytes, "quality": quality}
        self._append(entry)
        self.done[shard] = entry

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def fingerprint(stamp: Mapping[str, Any]) -> str:
    """Of a source's files as they are: 16 hexadecimal digits, equal as long as none changes."""
    return hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:16]


def sync_folder(folder: Path) -> None:
    """Make names of files in a folder last through a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
