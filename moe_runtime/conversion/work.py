"""One task of a conversion: rows are read, checked, encoded, measured and written, a few at a time.

Each chunk of rows is independent of the others and has its place in the output file, so several
threads work on one shard, and memory holds a few chunks whatever the size of a tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loaders.logical import LogicalTensor
from loaders.tensor_rows import RowReader, byte_view
from moe_runtime.conversion.errors import ConversionError
from moe_runtime.conversion.layouts import WRITTEN
from moe_runtime.conversion.options import MX_TARGETS, SEARCHED_TARGETS, ConversionOptions
from moe_runtime.conversion.planning import Output, Task
from moe_runtime.conversion.source_checks import (
    check_copied,
    check_scales,
    check_shared_scale,
    repaired,
)
from quant.codecs import decode, encode
from quant.e8m0 import decode_e8m0
from quant.formats import NVFP4
from quant.nvfp4 import tensor_scale_for
from quant.quality import TensorQuality, measure, merge
from quant.tensor import QuantTensor

CHUNK_WEIGHTS = 1 << 21  # weights in hand by one thread
COPY_BYTES = 1 << 24

Mapper = Callable[[Callable[[Any], Any], Any], Any]


@dataclass(frozen=True)
class Chunk:
    """Rows of one matrix of a source, and where they go in the output."""

    matrix: int
    start: int
    stop: int
    out_matrix: int
    out_start: int


class ShardFile:
    """The output file being written: bytes at fixed offsets, from any thread."""

    def __init__(self, file: int, offsets: Mapping[str, int]) -> None:
        self.file = file
        self.offsets = offsets

    def write(self, name: str, tensor: Tensor, at: int = 0) -> None:
        """Bytes of a tensor into the output tensor `name`, `at` bytes from its start."""
        tensor = tensor.contiguous()
        if not tensor.nbytes:
            return
        memory = byte_view(tensor)
        position, done = self.offsets[name] + at, 0
        while done < len(memory):
            done += os.pwrite(self.file, memory[done:], position + done)


@dataclass(frozen=True)
class Workshop:
    """What all tasks of a conversion share."""

    reader: RowReader
    options: ConversionOptions
    device: torch.device

    def run(
        self, task: Task, shard: ShardFile, on_bytes: Callable[[int], object], mapper: Mapper = map
    ) -> list[TensorQuality | None]:
        """Write the outputs of a task; the errors of each, None for one that is not converted.

        on_bytes: called with the source bytes of each piece done
        mapper:   map, or that of a pool to work on many chunks at once
        Raises ConversionError for what is refused, OSError when the disk does.
        """
        self._check_pair(task)
        whole = self._tensor_scale(task, mapper)
        return [self._write(output, whole, shard, on_bytes, mapper) for output in task.outputs]

    def _check_pair(self, task: Task) -> None:
        if len(task.outputs) == 2 and task.outputs[0].source.format is NVFP4:
            check_shared_scale(self.reader, [o.source for o in task.outputs], self.options)

    def _tensor_scale(self, task: Task, mapper: Mapper) -> Tensor | None:
        """The NVFP4 tensor scale that all outputs of a task share."""
        if not (task.outputs[0].format is NVFP4 and task.outputs[0].converts):
            return None
        jobs = [(output.source, chunk) for output in task.outputs for chunk in chunks(output)]
        maxima = list(mapper(lambda job: self._amax(*job), jobs))
        return divisible_scale(tensor_scale_for(torch.stack(maxima)))

    def _amax(self, weight: LogicalTensor, chunk: Chunk) -> Tensor:
        low, high = torch.aminmax(self._numbers(weight, chunk))
        return torch.maximum(low.abs(), high.abs()).float().cpu()

    def _write(
        self,
        output: Output,
        whole: Tensor | None,
        shard: ShardFile,
        on_bytes: Callable[[int], object],
        mapper: Mapper,
    ) -> TensorQuality | None:
        if output.format is None:
            self._copy_plain(output, shard, on_bytes)
            return None
        if "tensor_scale" in output.parts:
            shard.write(
                output.parts["tensor_scale"].name, self._written_tensor_scale(output, whole)
            )
        jobs = list(chunks(output))
        share, rest = divmod(output.source_bytes, max(1, len(jobs)))

        def work(chunk: Chunk) -> TensorQuality | None:
            quality = self._write_chunk(output, chunk, whole, shard)
            on_bytes(share)
            return quality

        found = list(mapper(work, jobs))
        on_bytes(rest)
        return merge(found) if output.converts else None

    def _write_chunk(
        self, output: Output, chunk: Chunk, whole: Tensor | None, shard: ShardFile
    ) -> TensorQuality | None:
        if not output.converts:
            stored = self.reader.rows(output.source, chunk.matrix, chunk.start, chunk.stop)
            assert isinstance(stored, QuantTensor)
            check_copied(output.source, stored, self.options)
            self._write_rows(output, chunk, stored, shard)
            return None
        weight = self._numbers(output.source, chunk)
        assert output.format is not None
        settings = self._settings(output, whole)
        stored = encode(weight, output.format, **settings)
        quality = measure(weight, stored)
        if settings.pop("scale_search", None):
            plain = measure(weight, encode(weight, output.format, **settings))
            quality = replace(quality, plain_noise=plain.noise)
        if not math.isfinite(quality.max_abs_error):
            raise ConversionError(
                f"{output.source.name}: a weight of {quality.largest:.3g} is infinity in "
                f"{output.format.name}",
                hint="the source looks damaged; --keep leaves a weight as it is",
            )
        self._write_rows(output, chunk, stored.to("cpu"), shard)
        return quality

    def _numbers(self, weight: LogicalTensor, chunk: Chunk) -> Tensor:
        """Rows of a source as finite numbers on the device."""
        height = weight.format.block[0] if weight.format and weight.format.block else 1
        skipped = chunk.start % height  # a read begins with a block
        found = self.reader.rows(weight, chunk.matrix, chunk.start - skipped, chunk.stop)
        if isinstance(found, QuantTensor):
            check_scales(weight, found, self.options)
            found = decode(found)
        numbers = found[skipped:].contiguous()
        return repaired(weight, numbers, chunk.matrix, chunk.start, self.options).to(self.device)

    def _settings(self, output: Output, whole: Tensor | None) -> dict[str, Any]:
        assert output.format is not None
        settings: dict[str, Any] = {}
        if output.format.name in MX_TARGETS:
            settings["scale_rule"] = self.options.rule
        if output.format.name in SEARCHED_TARGETS and self.options.scale_search != "none":
            settings["scale_search"] = self.options.scale_search
        if output.format is NVFP4:
            settings["tensor_scale"] = whole
        return settings

    def _write_rows(
        self, output: Output, chunk: Chunk, stored: QuantTensor, shard: ShardFile
    ) -> None:
        values = stored.values.mT if output.transposed else stored.values
        height = output.rows[1] - output.rows[0]
        row_bytes = values.nbytes // max(1, chunk.stop - chunk.start)
        first = chunk.out_matrix * height + chunk.out_start
        shard.write(output.parts["values"].name, values, first * row_bytes)
        if stored.scales is None:
            return
        part = output.parts["scales"]
        scales = stored.scales
        if part.dtype == "F32" and scales.dtype == torch.uint8:
            scales = decode_e8m0(scales)
        assert stored.format.block is not None
        block_rows = stored.format.block[0]
        first = chunk.out_matrix * -(-height // block_rows) + chunk.out_start // block_rows
        shard.write(part.name, scales, first * (scales.nbytes // max(1, len(scales))))

    def _written_tensor_scale(self, output: Output, whole: Tensor | None) -> Tensor:
        """As the layout has it: a multiplier or a divisor."""
        assert output.format is not None
        divides = WRITTEN[output.layout][output.format.name].tensor_scale_divides
        if output.converts:
            assert whole is not None
            return 1 / whole if divides else whole
        source = output.source
        stored = self.reader.tensor(source.parts["tensor_scale"]).float()
        return stored if divides == source.tensor_scale_divides else 1 / stored

    def _copy_plain(
        self, output: Output, shard: ShardFile, on_bytes: Callable[[int], object]
    ) -> None:
        info = output.source.parts["values"]
        name = output.parts["values"].name
        for start in range(0, info.nbytes, COPY_BYTES):
            stop = min(start + COPY_BYTES, info.nbytes)
            raw = self.reader.bytes_of(info, start, stop)
            repaired(output.source, raw, 0, start, self.options, raw=True)
            shard.write(name, raw, start)
            on_bytes(stop - start)


def chunks(output: Output) -> Iterator[Chunk]:
    """The pieces that an output is made in; each starts a row of blocks."""
    columns = output.source.shape[-1]
    step = max(1, CHUNK_WEIGHTS // max(1, columns * 128)) * 128
    whole = output.transposed or output.source.transposed
    first, last = output.rows
    for matrix in range(*output.matrices):
        for start in range(first, last, last - first if whole else step):
            stop = last if whole else min(start + step, last)
            yield Chunk(matrix, start, stop, matrix - output.matrices[0], start - first)


def divisible_scale(scale: Tensor) -> Tensor:
    """A tensor scale [] by which multiplying equals dividing by its inverse, bit for bit.

    compressed-tensors stores the inverse and divides block scales by it, others multiply. Block
    scales have 16 mantissas at most, so a scale a few units in the last place away serves both.
    """
    mantissas = torch.arange(8, 16, dtype=torch.float32)
    for steps in range(256):
        candidate = (scale.view(torch.int32) + steps).view(torch.float32)
        if torch.equal(mantissas * candidate, mantissas / (1 / candidate)) and torch.equal(
            1 / (1 / candidate), candidate
        ):
            return candidate
    return scale
