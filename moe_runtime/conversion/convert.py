"""A conversion from beginning to end: plan, lock, shards with a journal, side files, index, rename.

DIR.partial/   everything until it is whole: shards, journal, fetched source shards
DIR            the result, renamed into place when the last byte is on the disk
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from loaders.tensor_rows import RowReader
from moe_runtime import __version__
from moe_runtime.allocator import keep_freed_memory
from moe_runtime.conversion.card import model_card
from moe_runtime.conversion.errors import ConversionError
from moe_runtime.conversion.folders import (
    already_converted,
    check_output,
    locked,
    move_into_place,
    partial_folder,
    prepare_partial,
    writing,
)
from moe_runtime.conversion.journal import Journal, fingerprint, sync_folder
from moe_runtime.conversion.needs import disk_bytes, most_held_bytes, num_threads
from moe_runtime.conversion.options import ConversionOptions
from moe_runtime.conversion.planning import ConversionPlan, Shard, Task, plan_conversion
from moe_runtime.conversion.records import tensor_records
from moe_runtime.conversion.report import write_report
from moe_runtime.conversion.side_files import write_index, write_side_files
from moe_runtime.conversion.source import Source, open_source
from moe_runtime.conversion.work import CHUNK_WEIGHTS, ShardFile, Workshop
from quant.quality import TensorQuality

DOWNLOADS = "source_shards"
_LARGE_TASK_WEIGHTS = 16 * CHUNK_WEIGHTS  # worth several threads


def convert(
    model: str,
    output: Path,
    options: ConversionOptions,
    *,
    revision: str | None = None,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    progress: bool = True,
    threads: int | None = None,
) -> dict[str, Any]:
    """Convert a model into the folder `output`; returns the report's data.

    model:       a bundled name, a folder or a hub id; shards of the latter are fetched one at a
                 time and dropped
    resume:      go on with what an interrupted conversion left in `output`.partial
    overwrite:   replace a checkpoint that `output` holds, once the new one is whole
    threads:     default one a core, fewer where memory would not do

    Raises ConversionError, CheckpointError or UnsupportedModelError with what to do. After any
    error or kill the same call goes on with the shard that was being written, to the same bytes.
    """
    keep_freed_memory()
    output = output.expanduser().resolve()  # a link may lead to another disk
    partial = partial_folder(output)
    source = open_for_conversion(model, output, revision)
    plan = plan_conversion(source.checkpoint, options)
    stamp = source.stamp(plan.files)
    finished = already_converted(output, plan, fingerprint(stamp), overwrite=overwrite)
    if finished is not None:
        if progress:
            print(f"{output} holds this conversion already", file=sys.stderr)
        return finished
    check_output(output, source.checkpoint.folder, overwrite=overwrite)
    with locked(partial):
        journal = prepare_partial(partial, plan.identity, stamp, resume=resume)
        conversion = _Conversion(source, plan, partial, journal, torch.device(device))
        outputs = [output for _, output in plan.outputs]
        conversion.write_shards(progress, threads or num_threads(outputs))
        _require_unchanged(source, plan, stamp)
        report = conversion.write_the_rest(fingerprint(stamp))
        move_into_place(partial, output)
    return report


def open_for_conversion(model: str, output: Path, revision: str | None) -> Source:
    """The headers of a model; its shards, if it is on the hub, will come beside the result."""
    return open_source(model, revision, partial_folder(output.resolve()) / DOWNLOADS)


class _Conversion:
    def __init__(
        self,
        source: Source,
        plan: ConversionPlan,
        folder: Path,
        journal: Journal,
        device: torch.device,
    ) -> None:
        self.source = source
        self.plan = plan
        self.folder = folder
        self.journal = journal
        self.reader = RowReader(source.path)
        self.workshop = Workshop(self.reader, plan.options, device)
        self.held: set[str] = set()  # source files at hand
        self.place = {id(task): number for number, task in enumerate(plan.tasks)}
        self.last_use = {
            file: number for number, task in enumerate(plan.tasks) for file in task.files
        }

    def write_shards(self, progress: bool, threads: int) -> None:
        """All shards that the journal does not have."""
        todo = [shard for shard in self.plan.shards if shard.file not in self.journal.done]
        self._drop_all_but({file for shard in todo for task in shard.tasks for file in task.files})
        done = sum(t.source_bytes for s in self.plan.shards if s not in todo for t in s.tasks)
        threads_before = torch.get_num_threads()
        torch.set_num_threads(1)  # each of our threads works on a chunk of its own
        pool = ThreadPoolExecutor(threads)
        started = time.perf_counter()
        try:
            with _bar(self.plan.source_bytes, done, progress) as bar:
                update = _locked_update(bar)
                for number, shard in enumerate(todo):
                    self._require_space(todo[number:])
                    self._write_shard(shard, pool, update)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self.reader.close()
            torch.set_num_threads(threads_before)
        if progress:
            seconds, nbytes = time.perf_counter() - started, self.plan.source_bytes - done
            size = f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
            rate = f"{nbytes / 1e6 / seconds:.0f} MB/s"
            print(f"read {size} in {seconds:.1f} s ({rate})", file=sys.stderr)

    def write_the_rest(self, source_fingerprint: str) -> dict[str, Any]:
        """Config, tokenizer, report, card and, last of all, the index."""
        quality = {shard: entry["quality"] for shard, entry in self.journal.done.items()}
        records = tensor_records(self.plan, quality)
        name = self.source.hub_id or Path(self.source.label).resolve().name
        with writing(self.folder):
            write_side_files(self.folder, self.plan, self.source.files)
            meta = {
                "source": name,
                "revision": self.source.revision,
                "source_fingerprint": source_fingerprint,
                "files_left_out": list(self.plan.left_out),
                "layout": self.plan.layout,
                **self.plan.options.as_dict(),
                "identity": self.plan.identity,
                "moe_runtime": __version__,
            }
            report = write_report(self.folder, records, meta)
            card = model_card(
                self.plan,
                report,
                self.source.files,
                source=name,
                hub_id=self.source.hub_id,
                revision=self.source.revision,
            )
            (self.folder / "README.md").write_text(card, encoding="utf-8")
            shutil.rmtree(self.folder / DOWNLOADS, ignore_errors=True)
            write_index(self.folder, self.plan)
            sync_folder(self.folder)
        return report

    def _write_shard(
        self, shard: Shard, pool: ThreadPoolExecutor, on_bytes: Callable[[int], None]
    ) -> None:
        unfinished = self.folder / f"{shard.file}.unfinished"
        with writing(self.folder):
            file = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                os.ftruncate(file, shard.nbytes)
                os.pwrite(file, shard.header, 0)
                quality = self._run_tasks(shard, ShardFile(file, shard.offsets), pool, on_bytes)
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(unfinished, self.folder / shard.file)
            sync_folder(self.folder)
            self.journal.add(shard.file, shard.nbytes, quality)

    def _run_tasks(
        self,
        shard: Shard,
        file: ShardFile,
        pool: ThreadPoolExecutor,
        on_bytes: Callable[[int], None],
    ) -> list[list[Any]]:
        """Run a shard's tasks; for each, what each of its outputs lost."""
        found: dict[int, list[TensorQuality | None]] = {}
        pending: dict[int, Future[list[TensorQuality | None]]] = {}

        def settle() -> None:
            for number, future in pending.items():
                found[number] = future.result()
            pending.clear()

        for number, task in enumerate(shard.tasks):
            if not task.files <= self.held:
                settle()
                self._bring(task)
            if _num_weights(task) > _LARGE_TASK_WEIGHTS:
                settle()
                found[number] = self.workshop.run(task, file, on_bytes, pool.map)
            else:
                pending[number] = pool.submit(self.workshop.run, task, file, on_bytes)
        settle()
        return [
            [None if q is None else q.as_dict() for q in found[number]]
            for number in range(len(shard.tasks))
        ]

    def _bring(self, task: Task) -> None:
        """Have the files of a task, having dropped those that no later one needs."""
        now = self.place[id(task)]
        for name in sorted(self.held):
            if self.last_use[name] < now:
                self.reader.close(name)
                self.source.drop(name)
                self.held.discard(name)
        for name in sorted(task.files - self.held):
            if self.source.remote:
                (self.folder / DOWNLOADS).mkdir(exist_ok=True)
                with _download_bar(name, self.source) as bar:
                    self.source.fetch(name, _locked_update(bar))
            self.held.add(name)

    def _drop_all_but(self, needed: set[str]) -> None:
        for name in self.plan.files:
            if name not in needed:
                self.source.drop(name)

    def _require_space(self, todo: list[Shard]) -> None:
        """Raise ConversionError when what is still to be written does not fit the disk."""
        fetched = most_held_bytes((task for shard in todo for task in shard.tasks), self.source)
        needed = disk_bytes(sum(shard.nbytes for shard in todo), fetched)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ConversionError(
                f"{needed / 1e9:.2f} GB are still to be written, and the disk of {self.folder} "
                f"has {free / 1e9:.2f} GB free",
                hint="free some space and run the same command: it goes on where it stopped",
            )


def _require_unchanged(source: Source, plan: ConversionPlan, stamp: Mapping[str, Any]) -> None:
    if source.stamp(plan.files) != stamp:
        raise ConversionError(
            f"{source.label} changed while it was converted",
            hint="leave the source alone and start again with --no-resume",
        )


def _num_weights(task: Task) -> int:
    total = 0
    for output in task.outputs:
        count = output.matrices[1] - output.matrices[0]
        total += count * (output.rows[1] - output.rows[0]) * (output.source.shape or (1,))[-1]
    return total


def _bar(total: int, done: int, progress: bool) -> Any:
    return tqdm(
        desc="Converting",
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        disable=None if progress else True,  # None: off unless stderr is a terminal
    )


def _download_bar(name: str, source: Source) -> Any:
    return tqdm(
        desc=f"Fetching {name}",
        total=source.size(name),
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        leave=False,
        disable=None,
    )


def _locked_update(bar: Any) -> Callable[[int], None]:
    lock = threading.Lock()

    def update(count: int) -> None:
        with lock:
            bar.update(count)

    return update
