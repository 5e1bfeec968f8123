"""From files to preallocated tensors through a few pinned buffers, at the disk's speed.

Each reader thread owns two buffers and one stream. It takes the next chunk of the list, waits until
the copy that last used its buffer is done, reads the file into the buffer and starts the copy to
the device. Reads and copies of all threads overlap; host memory is the buffers and no more.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loaders.errors import CheckpointError

NUM_READERS = 8
BUFFERS_PER_READER = 2
BUFFER_BYTES = 16 << 20  # 8 readers with 2 buffers each: 256 MB


@dataclass(frozen=True)
class Span:
    """Bytes of a file and where they go."""

    path: Path
    start: int  # first byte in the file
    target: Tensor  # [n] uint8 on the device, n bytes from `start`


def copy_spans(
    spans: Sequence[Span],
    *,
    device: torch.device,
    on_bytes: Callable[[int], object],
    num_readers: int = NUM_READERS,
    buffer_bytes: int = BUFFER_BYTES,
) -> None:
    """Fill the targets; on return all of them are complete and visible to every stream.

    spans:    in the order of the files, so that the disk is read in sequence
    on_bytes: called with the count of each piece, by one thread at a time
    Raises CheckpointError when a file cannot be read or ends early; the targets are undefined then.
    """
    total = sum(len(span.target) for span in spans)
    num_readers = max(1, min(num_readers, os.cpu_count() or 1, -(-total // buffer_bytes)))
    buffer_bytes = min(buffer_bytes, max((len(span.target) for span in spans), default=0))
    if not buffer_bytes:
        return
    with contextlib.ExitStack() as stack:
        files = {path: _open(path, stack) for path in dict.fromkeys(s.path for s in spans)}
        chunks = _Chunks(spans, buffer_bytes)
        readers = [
            _Reader(device, files, chunks, on_bytes, buffer_bytes) for _ in range(num_readers)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(num_readers))
        try:
            for future in as_completed([pool.submit(reader.run) for reader in readers]):
                future.result()
        finally:
            chunks.stop()  # after a failure or Ctrl-C the other readers end with their chunk


class _Chunks:
    """Pieces of the spans no larger than a buffer, given out to whoever asks."""

    def __init__(self, spans: Sequence[Span], most_bytes: int) -> None:
        self.lock = threading.Lock()
        self._pieces = self._cut(spans, most_bytes)
        self._stopped = False

    def next(self) -> Span | None:
        """The next piece; None when there is none or the work was stopped."""
        with self.lock:
            return None if self._stopped else next(self._pieces, None)

    def stop(self) -> None:
        """Give out nothing more."""
        self._stopped = True

    @staticmethod
    def _cut(spans: Sequence[Span], most_bytes: int) -> Iterator[Span]:
        for span in spans:
            for offset in range(0, len(span.target), most_bytes):
                piece = span.target[offset : offset + most_bytes]
                yield Span(span.path, span.start + offset, piece)


class _Reader:
    """One thread's buffers and stream; made by the thread that owns the targets."""

    def __init__(
        self,
        device: torch.device,
        files: dict[Path, int],
        chunks: _Chunks,
        on_bytes: Callable[[int], object],
        buffer_bytes: int,
    ) -> None:
        self.files, self.chunks, self.on_bytes = files, chunks, on_bytes
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            # The allocator may hand out memory that the current stream is not done with.
            self.stream.wait_stream(torch.cuda.current_stream(device))
        pinned = device.type == "cuda"
        self.buffers = [_Buffer(buffer_bytes, pinned=pinned) for _ in range(BUFFERS_PER_READER)]

    def run(self) -> None:
        """Read chunks until there are none, then wait for the copies."""
        buffers = itertools.cycle(self.buffers)
        try:
            while (chunk := self.chunks.next()) is not None:
                buffer = next(buffers)
                buffer.wait()
                _read(self.files[chunk.path], chunk, buffer.memory)
                buffer.send(chunk.target, self.stream)
                with self.chunks.lock:
                    self.on_bytes(len(chunk.target))
        finally:  # after a failure too: the targets are freed while copies would still run
            if self.stream is not None:
                self.stream.synchronize()


class _Buffer:
    """Host memory that a file is read into and a copy to the device starts from."""

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self.tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        # A view for preadv without numpy, which is not among our dependencies.
        raw = (ctypes.c_ubyte * nbytes).from_address(self.tensor.data_ptr())
        self.memory = memoryview(raw).cast("B")
        self.sent: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until the buffer may be written again."""
        if self.sent is not None:
            self.sent.synchronize()

    def send(self, target: Tensor, stream: torch.cuda.Stream | None) -> None:
        """Copy the first len(target) bytes to the device; on the CPU at once."""
        source = self.tensor[: len(target)]
        if stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            self.sent = torch.cuda.Event()
            self.sent.record(stream)


def _open(path: Path, stack: contextlib.ExitStack) -> int:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    stack.callback(os.close, file)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # reads further ahead
    return file


def _read(file: int, chunk: Span, memory: memoryview) -> None:
    """Fill memory[:n] with the chunk's n bytes."""
    done, wanted = 0, len(chunk.target)
    while done < wanted:
        try:
            count = os.preadv(file, [memory[done:wanted]], chunk.start + done)
        except OSError as error:
            raise CheckpointError(f"{chunk.path} cannot be read: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(
                f"{chunk.path} is truncated: expected {chunk.start + wanted} bytes, "
                f"found {chunk.start + done}",
                hint="the download is incomplete: download the file again",
            )
        done += count
