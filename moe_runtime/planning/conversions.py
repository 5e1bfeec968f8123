"""What `moe-runtime convert` would need and make, by format, from headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loaders.checkpoint import Checkpoint
from loaders.logical import LogicalTensor
from moe_runtime.planning.variants import Groups, bits_of, can_store, is_matrix, stored_bytes
from quant.formats import BF16, FORMATS, QuantFormat

# As users ask for it -> name in quant.formats.
TARGETS: Mapping[str, str] = {
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "mxfp8": "mxfp8",
    "fp8-block": "fp8_block128",
    "fp8-channel": "fp8_row",
    "bf16": "bf16",
}
# `convert` keeps to these bounds.
BASE_MEMORY_BYTES = 2_000_000_000
TENSORS_IN_MEMORY = 3  # of the largest one


@dataclass(frozen=True)
class Conversion:
    """One `convert --to`: what comes out and what it takes."""

    target: str
    converted: int  # weights
    output_bytes: int
    disk_bytes: int  # free disk that it needs, the result included
    memory_bytes: int
    problem: str | None = None  # why it is of no use


def conversions(checkpoint: Checkpoint, groups: Groups) -> tuple[Conversion, ...]:
    """A row for each target format."""
    # From a folder the source is there already, from the hub one shard at a time is.
    shard = 0 if checkpoint.folder is not None else _largest_shard(checkpoint)
    memory = BASE_MEMORY_BYTES + TENSORS_IN_MEMORY * _largest_tensor(groups)
    return tuple(_conversion(target, groups, shard, memory) for target in TARGETS)


def _conversion(target: str, groups: Groups, shard: int, memory: int) -> Conversion:
    format = FORMATS[TARGETS[target]]
    converted, size = 0, 0
    for component, tensor in _each(groups):
        if _is_converted(component, tensor, format):
            converted += 1
            size += stored_bytes(tensor.shape, format)
        else:
            size += tensor.nbytes
    problem = None if converted else _why_none(groups, format)
    return Conversion(target, converted, size, size + shard, memory, problem)


def _is_converted(component: str, tensor: LogicalTensor, format: QuantFormat) -> bool:
    """Routed experts go to FP8 and FP4, everything quantized goes to bf16; the rest stays."""
    if format is BF16:
        return tensor.format is not None and tensor.format is not BF16
    if component != "experts" or not is_matrix(component, tensor):
        return False
    return bits_of(tensor) > format.value_bits and can_store(tensor.shape, format)


def _why_none(groups: Groups, format: QuantFormat) -> str:
    if format is BF16:
        return "no weight is quantized"
    weights = [t for t in groups.get("experts", ()) if is_matrix("experts", t)]
    if not weights:
        return "there are no experts"
    if all(bits_of(tensor) <= format.value_bits for tensor in weights):
        return f"experts have {max(map(bits_of, weights))} bits already"
    return f"rows are no multiple of {format.block[1] if format.block else 1}"


def _each(groups: Groups) -> Iterator[tuple[str, LogicalTensor]]:
    for component, tensors in groups.items():
        for tensor in tensors:
            yield component, tensor


def _largest_tensor(groups: Groups) -> int:
    return max((tensor.nbytes for _, tensor in _each(groups)), default=0)


def _largest_shard(checkpoint: Checkpoint) -> int:
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        sizes[info.file] += info.nbytes
    return max(sizes.values(), default=0)
