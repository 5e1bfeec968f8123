"""The weights of any checkpoint as they are meant: codes and scales put together again.

    file                                              logical tensor
    X.weight_packed [N, K/2], X.weight_scale     ->   X.weight [N, K], MXFP4
    X.weight [N, K], X.weight_scale_inv          ->   X.weight [N, K], FP8 blocks
    X_blocks [E, N, K/32, 16], X_scales          ->   X [E, N, K], MXFP4

Found from headers and config alone; every tensor of the files belongs to exactly one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.checkpoint import Checkpoint
from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.logical_schemes import (
    CODE_DTYPES,
    SCHEMES,
    STORED_FORMATS,
    UNREADABLE,
    Scheme,
    scale_shape,
)
from loaders.safetensors_header import TensorInfo
from quant.formats import FP8_ROW, QuantFormat
from quant.tensor import QuantTensor

_DAMAGED = "the checkpoint is incomplete, or was written by a faulty tool: get it again"
# Scales whose codes must be there; ".scale" alone is also the name of a norm's weight.
_SCALE_ENDINGS = (
    "_scale_inv",
    ".weight_scale",
    ".weight_scale_2",
    ".weight_global_scale",
    "_scales",
    ".scales",
)


@dataclass(frozen=True)
class LogicalTensor:
    """One weight or buffer: what it is, and the tensors of the files that hold it."""

    name: str  # as an unquantized checkpoint of the family spells it
    shape: tuple[int, ...]  # logical
    format: QuantFormat | None  # None: plain numbers of `dtype`
    dtype: str  # of the values, as safetensors names it
    parts: Mapping[str, TensorInfo]  # "values", "scales", "tensor_scale"
    producer: str = "plain"  # whose names the parts have
    tensor_scale_divides: bool = False
    transposed: bool = False  # the file has [.., columns, rows]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts in the files."""
        return sum(info.nbytes for info in self.parts.values())


def logical_tensors(checkpoint: Checkpoint) -> tuple[LogicalTensor, ...]:
    """Every weight of a checkpoint, in the order of the files.

    Raises CheckpointError for codes without scales, scales without codes, and shapes that do not
    fit each other; UnsupportedModelError for a format that is not read.
    """
    tensors = checkpoint.tensors
    _refuse_unreadable(tensors)
    found: dict[str, LogicalTensor] = {}
    used: set[str] = set()
    for scheme in SCHEMES:
        for weight in _of_scheme(scheme, checkpoint, used):
            _add(found, weight)
            used |= {info.name for info in weight.parts.values()}
    for info in tensors.values():
        if info.name not in used:
            _refuse_half(info)
            _add(found, _plain(info, checkpoint))
    return tuple(sorted(found.values(), key=_position))


def read_tensor(checkpoint: Checkpoint, tensor: LogicalTensor) -> Tensor | QuantTensor:
    """A weight on the CPU over the mapped files: a Tensor of its dtype, or a QuantTensor.

    Scales come as the format stores them: E8M0 as uint8, fp32 from bf16 (exact).
    """
    parts = {part: checkpoint.read(info.name) for part, info in tensor.parts.items()}
    return assembled(tensor, parts)


def assembled(tensor: LogicalTensor, parts: Mapping[str, Tensor]) -> Tensor | QuantTensor:
    """A weight from its parts as they lie in the files, on any device; views where possible.

    parts: by the keys of tensor.parts
    """
    values = parts["values"]
    if tensor.format is None:
        return values.mT if tensor.transposed else values
    if values.dtype == torch.int8:
        values = values.view(torch.uint8)
    columns = tensor.shape[-1] // tensor.format.values_per_byte
    return QuantTensor(
        values.reshape(*tensor.shape[:-1], columns),
        _scales(tensor, parts["scales"]),
        tensor.format,
        tensor.shape,
        _tensor_scale(tensor, parts.get("tensor_scale")),
    )


def _scales(tensor: LogicalTensor, scales: Tensor) -> Tensor:
    assert tensor.format is not None
    if tensor.format.scale_dtype == torch.uint8:
        return scales.view(torch.uint8)
    if tensor.format.scale_dtype == torch.float32:
        scales = scales.float()
    if tensor.format is FP8_ROW:  # one scale for the whole tensor is the same one for each row
        scales = scales.reshape(*tensor.shape[:-2], -1, 1).expand(*tensor.shape[:-1], 1)
        return scales.contiguous()
    return scales


def _tensor_scale(tensor: LogicalTensor, scale: Tensor | None) -> Tensor | None:
    if scale is None:
        return None
    scale = scale.float().reshape(())
    return 1 / scale if tensor.tensor_scale_divides else scale


def _of_scheme(scheme: Scheme, checkpoint: Checkpoint, used: set[str]) -> Iterator[LogicalTensor]:
    tensors = checkpoint.tensors
    for scales in tensors.values():
        if not scales.name.endswith(scheme.scales) or scales.name in used:
            continue
        base = scales.name[: -len(scheme.scales)]
        values = tensors.get(base + scheme.values)
        if values is None or values.dtype not in CODE_DTYPES:
            continue
        parts = {"values": values, "scales": scales}
        whole = tensors.get(base + scheme.tensor_scale) if scheme.tensor_scale else None
        if whole is not None:
            parts["tensor_scale"] = whole
        format, shape = _identify(scheme, parts, checkpoint)
        yield LogicalTensor(
            base + scheme.name,
            shape,
            format,
            values.dtype,
            parts,
            scheme.producer,
            scheme.tensor_scale_divides,
        )


def _identify(
    scheme: Scheme, parts: Mapping[str, TensorInfo], checkpoint: Checkpoint
) -> tuple[QuantFormat, tuple[int, ...]]:
    """Format and logical shape of codes and scales."""
    values, scales = parts["values"], parts["scales"]
    whole = parts.get("tensor_scale")
    stored = values.shape
    if scheme.in_blocks and len(stored) == len(scales.shape) + 1:
        stored = (*stored[:-2], stored[-2] * stored[-1])
    for known in STORED_FORMATS:
        format = known.format
        if values.dtype not in known.values or scales.dtype not in known.scales or len(stored) < 2:
            continue
        if format.tensor_scale != (whole is not None):
            continue
        shape = (*stored[:-1], stored[-1] * format.values_per_byte)
        if _has_part_of_a_group(format, shape):
            continue
        if scales.shape == scale_shape(format, shape) or _is_row_scale(format, scales.shape, shape):
            if whole is not None and (whole.dtype != "F32" or whole.shape not in ((), (1,))):
                raise _does_not_fit(whole, values, "expected one F32 number")
            return format, shape
    block = _claimed_block(checkpoint)
    if values.dtype == "F8_E4M3" and block not in (None, [128, 128]):
        raise UnsupportedModelError(
            f"{values.name}: FP8 blocks of {block} are not supported",
            hint="supported: 128x128 blocks, one scale a row or a tensor, MXFP8",
        )
    expected = "expected one for 128x128, 1x32 or 1x16 codes, or for each row"
    raise _does_not_fit(scales, values, expected)


def _has_part_of_a_group(format: QuantFormat, shape: tuple[int, ...]) -> bool:
    """Whether the last group of a row is not whole, which formats with groups in a row lack."""
    rows, columns = format.block or (0, 0)
    return rows == 1 and columns > 0 and shape[-1] % columns > 0


def _is_row_scale(format: QuantFormat, found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether scales are one a row without the last axis, or one for the whole tensor."""
    return format is FP8_ROW and found in ((), (1,), shape[:-1])


def _claimed_block(checkpoint: Checkpoint) -> object:
    quantization = checkpoint.config.get("quantization_config")
    return quantization.get("weight_block_size") if isinstance(quantization, dict) else None


def _does_not_fit(part: TensorInfo, values: TensorInfo, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{part.name}: {part.dtype} of shape {part.shape} does not fit {values.name}, "
        f"{values.dtype} of shape {values.shape}: {expected}",
        hint=_DAMAGED,
    )


def _plain(info: TensorInfo, checkpoint: Checkpoint) -> LogicalTensor:
    transposed = _is_transposed(info, checkpoint)
    shape = (*info.shape[:-2], info.shape[-1], info.shape[-2]) if transposed else info.shape
    return LogicalTensor(
        info.name, shape, None, info.dtype, {"values": info}, transposed=transposed
    )


def _is_transposed(info: TensorInfo, checkpoint: Checkpoint) -> bool:
    """GPT-OSS without quantization has experts as [E, D, 2F] and [E, F, D], used as x @ W.

    The down projection can be square, so gate_up decides for both.
    """
    name, _, last = info.name.rpartition(".")
    of_experts = name.endswith(".experts") and last in ("gate_up_proj", "down_proj")
    if checkpoint.config.get("model_type") != "gpt_oss" or not of_experts or len(info.shape) != 3:
        return False
    gate_up = checkpoint.tensors.get(f"{name}.gate_up_proj", info)
    width = checkpoint.config.get("hidden_size")
    return not (gate_up.shape[-1] == width != gate_up.shape[-2])


def _add(found: dict[str, LogicalTensor], weight: LogicalTensor) -> None:
    if weight.name in found:
        ours = found[weight.name].parts["values"].name
        raise CheckpointError(
            f"{weight.name} is there twice: as {ours} and as {weight.parts['values'].name}",
            hint="files of two checkpoints are mixed: download into an empty folder",
        )
    found[weight.name] = weight


def _refuse_unreadable(tensors: Mapping[str, TensorInfo]) -> None:
    for name, info in tensors.items():
        for ending, what in UNREADABLE.items():
            if name.endswith(ending):
                raise UnsupportedModelError(f"{name}: {what} are not supported")
        if name.endswith(".weight_packed") and info.dtype != "U8":
            raise UnsupportedModelError(f"{name}: integer weights (pack-quantized) are not read")


def _refuse_half(info: TensorInfo) -> None:
    """Codes without scales would be read as numbers, scales without codes mean a lost weight."""
    if info.dtype == "F8_E4M3" or info.name.endswith((".weight_packed", "_blocks", ".blocks")):
        raise CheckpointError(
            f"{info.name}: {info.dtype} codes without scales in {info.file}", hint=_DAMAGED
        )
    is_scale = info.name.endswith(_SCALE_ENDINGS) or info.dtype == "F8_E8M0"
    if is_scale:
        raise CheckpointError(
            f"{info.name}: scales without the codes they belong to in {info.file}", hint=_DAMAGED
        )


def _position(tensor: LogicalTensor) -> tuple[str, int]:
    values = tensor.parts["values"]
    return values.file, values.start
