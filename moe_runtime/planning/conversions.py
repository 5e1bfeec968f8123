"""What `moe-runtime convert` would make and need, by format, from headers: its own decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from loaders.checkpoint import Checkpoint
from loaders.errors import CheckpointError, UnsupportedModelError
from moe_runtime.conversion.decisions import decide, skip_reason
from moe_runtime.conversion.needs import disk_bytes, memory_bytes
from moe_runtime.conversion.options import ConversionOptions
from moe_runtime.conversion.planning import changes_anything, choose_layout, outputs_of
from moe_runtime.conversion.roles import role_of
from moe_runtime.planning.components import Groups, Kinds
from quant.formats import TARGETS


@dataclass(frozen=True)
class Conversion:
    """One `convert --to` with no other option: what comes out and what it takes."""

    target: str
    converted: int  # weights of the source
    output_bytes: int  # of all tensors
    disk_bytes: int  # free disk that it needs, the result included
    memory_bytes: int  # at most
    problem: str | None = None  # why it is refused or of no use


def conversions(
    checkpoint: Checkpoint, groups: Groups, *, renamed: bool = False
) -> tuple[Conversion, ...]:
    """A row for each target format.

    renamed: whether the files have other names than the checkpoint, see gpt_oss_original
    """
    kinds = [kind for group in groups.values() for kind in group if not skip_reason(kind[0])]
    roles = {tensor.name: role_of(tensor, checkpoint.config) for tensor, _ in kinds}
    # From a folder the source is there already; from the hub one shard of it at a time is.
    shard = 0 if checkpoint.folder is not None else _largest_shard(checkpoint)
    return tuple(
        _conversion(target, kinds, roles, checkpoint, shard, renamed) for target in TARGETS
    )


def _conversion(
    target: str,
    kinds: Kinds,
    roles: Mapping[str, str],
    checkpoint: Checkpoint,
    shard: int,
    renamed: bool,
) -> Conversion:
    options, config = ConversionOptions(target), checkpoint.config
    outputs, converted, size = [], 0, 0
    try:
        layout = choose_layout([tensor for tensor, _ in kinds], roles, config, options)
        for tensor, count in kinds:
            decision = decide(tensor, roles[tensor.name], options)
            made = list(outputs_of(tensor, decision, config, layout))
            outputs += made
            converted += count * decision.converts
            size += count * sum(output.nbytes for output in made)
    except (CheckpointError, UnsupportedModelError) as error:
        return Conversion(target, 0, 0, 0, 0, error.message)
    if not renamed and not changes_anything(outputs):
        return Conversion(target, 0, 0, 0, 0, f"no routed experts that are not in {target} already")
    return Conversion(target, converted, size, disk_bytes(size, shard), memory_bytes(outputs))


def _largest_shard(checkpoint: Checkpoint) -> int:
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        sizes[info.file] += info.nbytes
    return max(sizes.values(), default=0)
