"""What `moe-runtime convert` would make and need, by format, from headers: its own decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from loaders.checkpoint import Checkpoint
from moe_runtime.conversion.decisions import decide, skip_reason
from moe_runtime.conversion.errors import ConversionError
from moe_runtime.conversion.options import ConversionOptions
from moe_runtime.conversion.roles import role_of
from moe_runtime.planning.components import Groups, Kinds
from moe_runtime.planning.variants import stored_bytes
from quant.formats import TARGETS

# `convert` keeps to these bounds.
BASE_MEMORY_BYTES = 2_000_000_000
TENSORS_IN_MEMORY = 3  # of the largest one


@dataclass(frozen=True)
class Conversion:
    """One `convert --to` with no other option: what comes out and what it takes."""

    target: str
    converted: int  # weights of the source
    output_bytes: int  # of all tensors
    disk_bytes: int  # free disk that it needs, the result included
    memory_bytes: int  # at most
    problem: str | None = None  # why it is refused or of no use


def conversions(checkpoint: Checkpoint, groups: Groups) -> tuple[Conversion, ...]:
    """A row for each target format."""
    if checkpoint.layout == "original":
        problem = "the original/ layout is not converted: give the folder above"
        return tuple(Conversion(target, 0, 0, 0, 0, problem) for target in TARGETS)
    kinds = [kind for group in groups.values() for kind in group if not skip_reason(kind[0])]
    roles = {tensor.name: role_of(tensor, checkpoint.config) for tensor, _ in kinds}
    # From a folder the source is there already; from the hub one shard of it at a time is.
    shard = 0 if checkpoint.folder is not None else _largest_shard(checkpoint)
    largest = max((tensor.nbytes for tensor, _ in kinds), default=0)
    memory = BASE_MEMORY_BYTES + TENSORS_IN_MEMORY * largest
    return tuple(_conversion(target, kinds, roles, shard, memory) for target in TARGETS)


def _conversion(
    target: str,
    kinds: Kinds,
    roles: Mapping[str, str],
    shard: int,
    memory: int,
) -> Conversion:
    options = ConversionOptions(target)
    converted, size = 0, 0
    try:
        for tensor, count in kinds:
            decision = decide(tensor, roles[tensor.name], options)
            if decision.converts and decision.format is not None:
                converted += count
                size += count * stored_bytes(tensor.shape, decision.format)
            else:
                size += count * tensor.nbytes
    except ConversionError as error:
        return Conversion(target, 0, 0, 0, 0, error.message)
    if not converted:
        return Conversion(target, 0, 0, 0, 0, f"no routed experts that are not in {target} already")
    return Conversion(target, converted, size, size + shard, memory)


def _largest_shard(checkpoint: Checkpoint) -> int:
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        sizes[info.file] += info.nbytes
    return max(sizes.values(), default=0)
