"""Conversions in processes that may be killed: torch is imported once, each conversion is a fork.

Reads one JSON request a line: {"source", "output", "to", "shard_bytes", "overwrite", "kill_at"}.
The fork counts the calls that reach the disk and kills itself with SIGKILL at the one numbered
kill_at, in the middle of it if it is a write; answers {"killed": bool, "status": int, "calls": int}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_runtime.conversion.convert import convert
from moe_runtime.conversion.options import ConversionOptions

_COUNTED = ("pwrite", "fsync", "replace", "rename", "ftruncate", "mkdir", "unlink")


class Doors:
    """Counts the calls of os that change the disk; ends the process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.calls = 0
        self.lock = threading.Lock()

    def guard(self, name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            with self.lock:
                self.calls += 1
                last = self.calls == self.kill_at
            if not last:
                return original(*arguments, **more)
            if name == "pwrite":
                file, memory, position = arguments
                original(file, bytes(memory[: len(memory) // 2]), position)
            os.kill(os.getpid(), signal.SIGKILL)

        return call


def run(request: dict[str, Any]) -> int:
    """In the fork: convert; returns the number of calls."""
    doors = Doors(request["kill_at"])
    for name in _COUNTED:
        setattr(os, name, doors.guard(name))
    options = ConversionOptions(request["to"], shard_bytes=request["shard_bytes"])
    overwrite = request["overwrite"]
    convert(
        request["source"], Path(request["output"]), options, overwrite=overwrite, progress=False
    )
    return doors.calls


def main() -> None:
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            calls = run(json.loads(line))
            os.write(write, str(calls).encode())
            os._exit(0)
        os.close(write)
        _, status = os.waitpid(child, 0)
        told = os.read(read, 20)
        os.close(read)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        answer = {"killed": killed, "status": status, "calls": int(told or 0)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
