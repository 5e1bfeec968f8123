"""Rows of logical tensors by plain reads: memory holds what was asked for and no more.

A mapped file would do the same with less code, but its pages count as the process's own memory, and
a file that shrinks under a mapping kills the process.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from loaders.checkpoint import TORCH_DTYPES
from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.logical import LogicalTensor
from loaders.logical_schemes import scale_shape
from loaders.safetensors_header import TensorInfo
from quant.codecs import decode
from quant.formats import FP8_ROW, QuantFormat
from quant.tensor import QuantTensor


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, for readv and writev; keep the tensor alive meanwhile.

    Without numpy, which is not among our dependencies.
    """
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    raw = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(raw).cast("B")


class RowReader:
    """Open files of a checkpoint and reads from them; several threads may read at once."""

    def __init__(self, path_of: Callable[[str], Path]) -> None:
        """path_of: where a file of the checkpoint lies now"""
        self.path_of = path_of
        self.bytes_read = 0
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def bytes_of(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
        """Bytes [start, stop) of one tensor, uint8 [n].

        Raises CheckpointError when the file cannot be read or has become shorter.
        """
        stop = info.nbytes if stop is None else stop
        target = torch.empty(stop - start, dtype=torch.uint8)
        if len(target):
            self._fill(info, byte_view(target), info.start + start)
            with self._lock:
                self.bytes_read += len(target)
        return target

    def tensor(self, info: TensorInfo) -> Tensor:
        """One whole tensor of the file."""
        return self.bytes_of(info).view(_torch_dtype(info)).view(info.shape)

    def rows(
        self, weight: LogicalTensor, matrix: int, start: int, stop: int
    ) -> Tensor | QuantTensor:
        """Rows [start, stop) of one matrix of a weight [.., rows, columns]; `start` begins a block.

        matrix: which one, counted over all leading axes
        A plain weight keeps its dtype.
        """
        values = weight.parts["values"]
        rows, columns = weight.shape[-2:]
        if weight.format is None:
            dtype = _torch_dtype(values)
            if weight.transposed:
                size = rows * columns * dtype.itemsize
                whole = self.bytes_of(values, matrix * size, (matrix + 1) * size)
                return whole.view(dtype).view(columns, rows).mT[start:stop]
            first = matrix * rows
            size = columns * dtype.itemsize
            raw = self.bytes_of(values, (first + start) * size, (first + stop) * size)
            return raw.view(dtype).view(stop - start, columns)
        per_row = columns // weight.format.values_per_byte
        first = matrix * rows
        raw = self.bytes_of(values, (first + start) * per_row, (first + stop) * per_row)
        return QuantTensor(
            raw.view(weight.format.value_dtype).view(stop - start, per_row),
            self._scale_rows(weight, matrix, start, stop),
            weight.format,
            (stop - start, columns),
            self.tensor_scale(weight),
        )

    def decoded_rows(self, weight: LogicalTensor, matrix: int, start: int, stop: int) -> Tensor:
        """The same rows as numbers, contiguous: fp32 of a quantized weight; any start will do."""
        height = 1 if weight.format is None else _block_rows(weight.format)
        aligned = start - start % height
        found = self.rows(weight, matrix, aligned, stop)
        numbers = decode(found) if isinstance(found, QuantTensor) else found
        return numbers[start - aligned :].contiguous()

    def tensor_scale(self, weight: LogicalTensor) -> Tensor | None:
        """The multiplying scale of the whole tensor, fp32 []; None for formats without one."""
        info = weight.parts.get("tensor_scale")
        if info is None:
            return None
        scale = self.tensor(info).float().reshape(())
        return 1 / scale if weight.tensor_scale_divides else scale

    def close(self, file: str | None = None) -> None:
        """Close one file, or all of them."""
        with self._lock:
            for name in [file] if file else list(self._files):
                if name in self._files:
                    os.close(self._files.pop(name))

    def _scale_rows(self, weight: LogicalTensor, matrix: int, start: int, stop: int) -> Tensor:
        assert weight.format is not None
        info = weight.parts["scales"]
        dtype = _torch_dtype(info)
        *_, rows, columns = scale_shape(weight.format, weight.shape)
        if weight.format is FP8_ROW and len(info.shape) < 2 and info.shape != weight.shape[:-1]:
            return self.tensor(info).float().reshape(1, 1).expand(stop - start, 1)
        height = _block_rows(weight.format)
        assert start % height == 0, (start, height)
        first, last = start // height, -(-stop // height)
        size = columns * dtype.itemsize
        raw = self.bytes_of(info, (matrix * rows + first) * size, (matrix * rows + last) * size)
        scales = raw.view(dtype).view(last - first, columns)
        if weight.format.scale_dtype == torch.uint8:
            return scales.view(torch.uint8)
        return scales.float() if weight.format.scale_dtype == torch.float32 else scales

    def _fill(self, info: TensorInfo, memory: memoryview, position: int) -> None:
        file = self._open(info.file)
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(file, [memory[done:]], position + done)
            except OSError as error:
                raise CheckpointError(f"{info.file} cannot be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"{info.file} changed while it was read: expected {info.end} bytes, "
                    f"found {position + done}",
                    hint="do not change the source while it is converted, then start again",
                )
            done += count

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                try:
                    self._files[name] = os.open(self.path_of(name), os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error
            return self._files[name]


def _block_rows(format: QuantFormat) -> int:
    return format.block[0] if format.block else 1


def _torch_dtype(info: TensorInfo) -> torch.dtype:
    dtype = TORCH_DTYPES.get(info.dtype)
    if dtype is None:
        raise UnsupportedModelError(f"{info.name}: tensors of dtype {info.dtype} are not supported")
    return dtype
