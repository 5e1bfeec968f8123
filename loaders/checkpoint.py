"""Checkpoint: one model's files, opened and checked from their headers, read when asked for."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.files import CheckpointFiles, FolderFiles
from loaders.json_text import parse_json_object
from loaders.safetensors_header import TensorInfo
from loaders.safetensors_index import INDEX, collect_tensors, safetensors_in

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_MAX_CONFIG_BYTES = 4_000_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NO_PICKLE = "pickle is never opened, because it can run code: ask for safetensors"

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}


class Checkpoint:
    """Config, tensors and side files of one model. A context manager.

    Tensors are mapped, not read: pages come from disk when touched and the system may drop them.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        *,
        layout: str,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        tensors: Mapping[str, TensorInfo],
        folder: Path | None = None,
    ) -> None:
        """From parts; most callers want `open_folder`.

        folder: where the shards lie; None for headers alone, then `read` raises CheckpointError
        """
        self.files = files
        self.layout = layout  # "huggingface" or "original"
        self.config = config
        self.generation_config = generation_config  # {} if there is none
        self.tensors = tensors
        self.folder = folder
        self._maps: dict[str, mmap.mmap] = {}

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU over the mapped file: no copy unless the file misaligns it.

        Writing into it changes this process's memory only, never the file.
        """
        info = self.tensors[name]
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise UnsupportedModelError(f"{name}: tensors of dtype {info.dtype} are not supported")
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        mapped = torch.frombuffer(
            self._map(info), dtype=torch.uint8, count=info.nbytes, offset=info.start
        )
        if info.start % dtype.itemsize:
            mapped = mapped.clone()
        return mapped.view(dtype).view(info.shape)

    def path(self, file: str) -> Path:
        """The path of one of the files that hold tensors; CheckpointError for headers alone."""
        if self.folder is None:
            raise CheckpointError(f"{self.files.label}: only the headers are here, not the weights")
        return self.folder / file

    def file_text(self, name: str) -> str | None:
        """The text of a side file such as tokenizer.json; None if there is none."""
        raw = self.files.text(name)
        if raw is None:
            return None
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{name}: byte {error.start} is not UTF-8 text",
                hint="the file is damaged: download it again",
            ) from error

    def close(self) -> None:
        """Let go of the files; tensors already read stay valid."""
        self._maps.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _map(self, info: TensorInfo) -> mmap.mmap:
        if info.file not in self._maps:
            try:
                with self.path(info.file).open("rb") as file:
                    # A private mapping: torch has no read-only tensors, and a write must not crash.
                    self._maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{info.file} cannot be mapped: {error}") from error
        mapped = self._maps[info.file]
        if len(mapped) < info.end:
            raise CheckpointError(
                f"{info.file} changed while it was read: expected {info.end} bytes, "
                f"found {len(mapped)}"
            )
        return mapped


def open_folder(folder: Path) -> Checkpoint:
    """Open a local checkpoint; reads the configs, the index and the shards' headers, no tensor.

    folder: in the Hugging Face layout, or the vendor's: original/ itself or the folder that has it
    Raises CheckpointError or UnsupportedModelError.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder", hint="give a folder that holds config.json and safetensors"
        )
    parent = folder.absolute().parent
    if folder.absolute().name == "original" and (parent / CONFIG).is_file():
        # The tokenizer and generation_config.json lie beside original/, not in it.
        return open_files(FolderFiles(parent), folder=parent, prefix="original/")
    return open_files(FolderFiles(folder), folder=folder)


def open_files(
    files: CheckpointFiles, *, folder: Path | None = None, prefix: str | None = None
) -> Checkpoint:
    """Open a checkpoint from any source of files.

    folder: where the tensors can be read; None for headers alone
    prefix: "" or "original/", where the weights are; None looks for them in this order
    """
    prefix = _weights_prefix(files) if prefix is None else prefix
    config = _json_file(files, prefix + CONFIG)
    if config is None:
        raise CheckpointError(
            f"{files.label}: {prefix}{CONFIG} is missing",
            hint="give the folder of a whole checkpoint, or download it again",
        )
    layout = "original" if prefix or _is_original(config) else "huggingface"
    tensors = collect_tensors(files, prefix, index_required=layout == "huggingface")
    return Checkpoint(
        files,
        layout=layout,
        config=config,
        generation_config=_json_file(files, GENERATION_CONFIG) or {},
        tensors=tensors,
        folder=folder,
    )


def _weights_prefix(files: CheckpointFiles) -> str:
    """Where the safetensors are: "" or "original/". Raises when there are none."""
    names = files.names()
    for prefix in ("", "original/"):
        if safetensors_in(prefix, names):
            return prefix
    if INDEX in names:
        return ""  # the index then says which shards are missing
    _refuse_other_formats(files.label, names)
    if CONFIG not in names:
        raise CheckpointError(
            f"{files.label}: {CONFIG} is missing, and there are no safetensors files",
            hint="give a folder that holds a checkpoint",
        )
    raise CheckpointError(
        f"{files.label}: there are no safetensors files", hint="download the weights again"
    )


def _refuse_other_formats(label: str, names: Any) -> None:
    for name in names:
        base = name.rpartition("/")[2]
        if base.endswith(_PICKLES) or base.startswith("consolidated"):
            raise CheckpointError(f"{label}: found {name} and no safetensors", hint=_NO_PICKLE)
        if base.endswith(".gguf"):
            raise UnsupportedModelError(
                f"{label}: GGUF files are not supported (found {name})",
                hint="ask for the safetensors version of this model",
            )


def _is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config is the vendor's own, which does not say what model it is of."""
    return "num_experts" in config and not {"model_type", "architectures"} & config.keys()


def _json_file(files: CheckpointFiles, name: str) -> dict[str, Any] | None:
    raw = files.text(name, max_bytes=_MAX_CONFIG_BYTES)
    return None if raw is None else parse_json_object(raw, file=name)
