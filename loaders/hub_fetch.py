"""Bytes from the hub by HTTP range request: parts of a file, and whole files that resume.

huggingface_hub (1.33 and 2.4) retries a dropped connection but throws the part away when the
process ends, so an interrupted 5 GB shard would start again from zero. Large files therefore come
through here, into the place where huggingface_hub's own cache keeps them: blobs/<sha256>.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import (
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from loaders.errors import CheckpointError

_MAX_FAILURES = 5  # connections in a row that brought no byte
_RETRY_WAIT_S = 1.0
_HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class BlobDownload:
    """One file to fetch into the cache."""

    name: str  # as in the repository, for messages
    url: str
    blob: Path  # where the finished file goes
    lock: Path  # huggingface_hub's own lock of that blob
    size: int  # bytes
    sha256: str

    @property
    def partial(self) -> Path:
        """Where the part received so far is kept."""
        return self.blob.with_name(self.blob.name + ".incomplete")

    @property
    def missing_bytes(self) -> int:
        """Bytes still to come."""
        if self.blob.exists():
            return 0
        received = self.partial.stat().st_size if self.partial.exists() else 0
        return self.size - received if received <= self.size else self.size


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file on the hub, fewer where the file ends before.

    No more than that is received, even from a server that ignores ranges.
    """
    failures = 0
    while True:
        try:
            return _read_range_once(url, start, stop)
        except HTTPError as error:
            failures += 1
            if failures >= _MAX_FAILURES or _was_answered(error):
                raise
            time.sleep(_RETRY_WAIT_S)


def fetch_all(
    downloads: Sequence[BlobDownload], on_bytes: Callable[[int], None], *, workers: int = 4
) -> None:
    """Fetch several files at once; the first failure stops the rest and is raised.

    on_bytes: called from the workers with the count of each piece received

    The threads are daemons: Ctrl-C must end the program even while a connection hangs.
    """
    pending: queue.SimpleQueue[BlobDownload] = queue.SimpleQueue()
    for download in downloads:
        pending.put(download)
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                fetch(pending.get_nowait(), on_bytes, stop)
        except queue.Empty:
            done.put(None)
        except BaseException as error:
            done.put(error)

    threads = [
        threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(downloads)))
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            error = done.get()
            if error is not None:
                raise error
    finally:
        stop.set()


def fetch(download: BlobDownload, on_bytes: Callable[[int], None], stop: threading.Event) -> None:
    """Fetch one file, going on from the part an earlier run left; returns early once `stop` is set.

    Raises CheckpointError when the bytes are not the ones the hub's listing promised.
    """
    download.lock.parent.mkdir(parents=True, exist_ok=True)
    download.blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(download.lock):
        if download.blob.exists():  # another process was faster
            return
        with _PartialFile(download.partial) as part:
            if part.size > download.size:
                part.restart()
            failures = 0
            while part.size < download.size and not stop.is_set():
                before = part.size
                try:
                    _receive(download.url, part, on_bytes, stop)
                except HTTPError as error:
                    failures = 0 if part.size > before else failures + 1
                    if failures >= _MAX_FAILURES or _was_answered(error):
                        raise
                    time.sleep(_RETRY_WAIT_S)
        if not stop.is_set():
            _finish(download, part)


class _PartialFile:
    """A file being received: appended to, hashed on the way, kept when the connection breaks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.digest = hashlib.sha256()

    def __enter__(self) -> _PartialFile:
        self.file = self.path.open("a+b")
        self.file.seek(0)
        while chunk := self.file.read(_HASH_CHUNK_BYTES):
            self.digest.update(chunk)
            self.size += len(chunk)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()

    def append(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.file.flush()  # a killed process leaves what arrived
        self.digest.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        self.file.truncate(0)
        self.digest = hashlib.sha256()
        self.size = 0


def _read_range_once(url: str, start: int, stop: int) -> bytes:
    received = bytearray()
    with _get(url, start, stop) as response:
        skip = 0 if response.status_code == 206 else start
        for chunk in response.iter_bytes():
            received += chunk
            if len(received) >= skip + stop - start:
                break
    return bytes(received[skip : skip + stop - start])


def _receive(
    url: str, part: _PartialFile, on_bytes: Callable[[int], None], stop: threading.Event
) -> None:
    """One connection: everything the part lacks, or what comes before the connection drops."""
    with _get(url, part.size, None) as response:
        if part.size and response.status_code != 206:  # the server does not know ranges
            on_bytes(-part.size)
            part.restart()
        for chunk in response.iter_bytes():
            part.append(chunk)
            on_bytes(len(chunk))
            if stop.is_set():
                return


@contextmanager
def _get(url: str, start: int, stop: int | None) -> Iterator[Any]:
    """An open httpx response for bytes [start, stop), or to the file's end when stop is None."""
    headers = build_hf_headers()
    headers["Accept-Encoding"] = "identity"  # ranges count bytes of the file, not of a compression
    if start or stop is not None:
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),  # dropped connections are the caller's: it goes on from there
    ) as response:
        hf_raise_for_status(response)
        yield response


def _was_answered(error: Exception) -> bool:
    """Whether the server said no, as opposed to a connection that broke."""
    return getattr(error, "response", None) is not None


def _finish(download: BlobDownload, part: _PartialFile) -> None:
    if part.size != download.size or part.digest.hexdigest() != download.sha256:
        download.partial.unlink()
        raise CheckpointError(
            f"{download.name}: what arrived ({part.size} bytes) does not match the hub's listing "
            f"({download.size} bytes, sha256 {download.sha256[:12]}...); the part was deleted",
            hint="run the same command again; if it happens twice, a proxy changes the data",
        )
    os.replace(download.partial, download.blob)
