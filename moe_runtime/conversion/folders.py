"""The folders of a conversion: where it may write, its lock, and the move into place."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loaders.safetensors_index import INDEX
from moe_runtime.conversion.errors import ConversionError
from moe_runtime.conversion.journal import JOURNAL, Journal, sync_folder
from moe_runtime.conversion.planning import ConversionPlan
from moe_runtime.conversion.report import REPORT_JSON


def partial_folder(output: Path) -> Path:
    """Where a conversion into `output` is kept until it is whole."""
    return output.with_name(output.name + ".partial")


def already_converted(
    output: Path, plan: ConversionPlan, source_fingerprint: str, *, overwrite: bool
) -> dict[str, Any] | None:
    """The report in `output` when exactly this conversion was finished before.

    Raises ConversionError when its source or its files have changed since. With `overwrite` it
    counts only if the process was killed before it had said that all is done.
    """
    try:
        report = json.loads((output / REPORT_JSON).read_text(encoding="utf-8"))
        meta = report["meta"]
        if meta["identity"] != plan.identity or not (output / INDEX).is_file():
            return None
    except (OSError, KeyError, TypeError, ValueError):
        return None
    if overwrite and not (output / JOURNAL).exists():
        return None
    problem = _changed_since(output, plan, meta, source_fingerprint)
    if problem:
        if overwrite:
            return None
        raise ConversionError(problem, hint="--overwrite converts it again")
    _tidy_up(output)
    return dict(report)


def _changed_since(
    output: Path, plan: ConversionPlan, meta: Mapping[str, Any], source_fingerprint: str
) -> str | None:
    if meta.get("source_fingerprint") != source_fingerprint:
        return f"{output} holds this conversion of a source that has changed since"
    for shard in plan.shards:
        path = output / shard.file
        found = path.stat().st_size if path.is_file() else "no file"
        if found != shard.nbytes:
            return f"{path}: expected the {shard.nbytes} bytes that were written, found {found}"
    return None


def check_output(output: Path, source: Path | None, *, overwrite: bool) -> None:
    """Raise ConversionError unless `output` may be made, or replaced."""
    if source is not None and output.exists() and output.resolve() == source.resolve():
        raise ConversionError(f"{output} is the source itself", hint="give another --output")
    if not output.exists():
        return
    if not output.is_dir():
        raise ConversionError(f"{output} is a file", hint="give the name of a new folder")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise ConversionError(
            f"{output} is not empty",
            hint="give the name of a new folder, or --overwrite to replace a checkpoint there",
        )
    if not (output / "config.json").is_file():
        raise ConversionError(
            f"{output} holds something that is no checkpoint: --overwrite does not replace it",
            hint="give the name of a new folder",
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Errors of the disk as one line that says what to do."""
    try:
        yield
    except ConversionError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConversionError(
                f"the disk of {folder} is full",
                hint="free some space and run the same command: it goes on where it stopped",
            ) from error
        if error.errno == errno.EFBIG:
            raise ConversionError(
                f"a file in {folder} would be larger than its file system or a limit allows",
                hint="give --no-resume and a smaller --shard-size",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ConversionError(
                f"{error.filename or folder} cannot be written: {error.strerror}",
                hint="give an --output where you may write",
            ) from error
        raise


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Hold the folder `partial` (made if it is not there) alone; the lock dies with the process.

    Raises ConversionError when another conversion holds it.
    """
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        opened = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConversionError(
                f"another conversion is writing into {partial}",
                hint="wait for it, or give another --output",
            ) from error
        # The other one may have finished and moved the folder away between open and lock.
        if not partial.exists() or os.stat(partial).st_ino != os.fstat(opened).st_ino:
            raise ConversionError(
                f"another conversion has just finished in {partial}",
                hint="run the command again to see its result",
            )
        yield
    finally:
        os.close(opened)


def prepare_partial(
    partial: Path, identity: str, stamp: Mapping[str, Any], *, resume: bool
) -> Journal:
    """The journal to go on with, or a fresh one in an emptied folder.

    Raises ConversionError when the folder holds something else, or shards of another conversion.
    """
    journal = Journal.load(partial)
    others = {path.name for path in partial.iterdir()} - {JOURNAL}
    if journal is None and others:
        raise ConversionError(
            f"{partial} holds {sorted(others)[0]} and no journal of a conversion",
            hint="delete it, or give another --output",
        )
    problem = None if journal is None else _difference(journal, partial, identity, stamp)
    if resume and journal is not None and problem is not None and journal.done:
        raise problem
    if resume and journal is not None and problem is None:
        with writing(partial):
            for path in partial.glob("*.unfinished"):
                path.unlink()
            journal.rewrite()
        return journal
    with writing(partial):
        for path in partial.iterdir():
            if path.name != JOURNAL:  # last: without it the folder is nobody's
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return Journal.begin(partial, identity, dict(stamp))


def move_into_place(partial: Path, output: Path) -> None:
    """The finished folder under its name; what was there is removed once the new one is."""
    replaced = _replaced_folder(output)
    with writing(output):
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(output, replaced)
        os.rename(partial, output)
        sync_folder(output.parent)
        _tidy_up(output)


def _tidy_up(output: Path) -> None:
    """Remove what a finished conversion no longer needs; the journal last, by which it is known."""
    shutil.rmtree(_replaced_folder(output), ignore_errors=True)
    (output / JOURNAL).unlink(missing_ok=True)


def _replaced_folder(output: Path) -> Path:
    return output.with_name(output.name + ".replaced")


def _difference(
    journal: Journal, partial: Path, identity: str, stamp: Mapping[str, Any]
) -> ConversionError | None:
    """Why what a journal tells of is not the beginning of this conversion; None where it is."""
    if journal.identity != identity:
        return ConversionError(
            f"{partial} holds an unfinished conversion with other options or of another source",
            hint="finish it with the same command, or drop it with --no-resume",
        )
    changed = [file for file in stamp if journal.source.get(file) != stamp[file]]
    if changed:
        return ConversionError(
            f"{changed[0]} of the source changed since the conversion began",
            hint="start again with --no-resume",
        )
    return None
