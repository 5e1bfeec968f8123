"""From shards and their index to one map of tensors, with every disagreement an error. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loaders.errors import CheckpointError
from loaders.files import CheckpointFiles
from loaders.json_text import listed, parse_json_object, shown
from loaders.safetensors_header import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NUMBERED = re.compile(r"(.*-)(\d+)(-of-(\d+)\.safetensors)")
_AGAIN = "the checkpoint is incomplete or damaged: download it again"


def collect_tensors(
    files: CheckpointFiles, prefix: str, *, index_required: bool
) -> dict[str, TensorInfo]:
    """All tensors of the safetensors files under `prefix` ("" or "original/"), by name.

    index_required: whether several shards without an index are an error
    Raises CheckpointError when index, shards and tensors do not agree exactly.
    """
    names = files.names()
    raw_index = files.text(prefix + INDEX)
    if raw_index is not None:
        return _indexed(files, prefix, parse_json_object(raw_index, file=prefix + INDEX))
    if prefix + SINGLE in names:
        return files.header(prefix + SINGLE)
    shards = safetensors_in(prefix, names)
    if not shards:
        raise CheckpointError(
            f"{files.label}: there are no safetensors files", hint="download the weights again"
        )
    if index_required:
        raise CheckpointError(
            f"{files.label}: {len(shards)} safetensors files, but neither {SINGLE} nor {INDEX}",
            hint=_AGAIN,
        )
    _check_numbering(shards)
    return _merged({shard: files.header(shard) for shard in shards})


def safetensors_in(prefix: str, names: Any) -> list[str]:
    """Names of the safetensors files directly under `prefix`, sorted."""
    pattern = re.compile(re.escape(prefix) + r"[^/]+\.safetensors")
    return sorted(name for name in names if pattern.fullmatch(name))


def _indexed(
    files: CheckpointFiles, prefix: str, index: Mapping[str, Any]
) -> dict[str, TensorInfo]:
    weight_map = _weight_map(index, prefix + INDEX)
    present = set(files.names())
    shards = sorted({prefix + shard for shard in weight_map.values()})
    missing = [shard for shard in shards if shard not in present]
    if missing:
        raise CheckpointError(
            f"{prefix}{INDEX} names {len(shards)} shards, {len(missing)} missing: "
            f"{listed(missing)}",
            hint=_AGAIN,
        )
    tensors = _merged({shard: files.header(shard) for shard in shards})
    _check_against_index(tensors, weight_map, prefix)
    _check_total_size(tensors, index, prefix + INDEX)
    return tensors


def _weight_map(index: Mapping[str, Any], file: str) -> dict[str, str]:
    """The index's map from tensor to shard, each shard a plain file name beside the index."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: weight_map: expected a JSON object of names", hint=_AGAIN)
    for shard in set(map(str, weight_map.values())):
        if "/" in shard or "\\" in shard or "\0" in shard or shard in (".", ".."):
            raise CheckpointError(
                f"{file} names a shard outside the folder: {shown(shard)}",
                hint="do not use this checkpoint: no tool writes such an index",
            )
        if not shard.endswith(".safetensors") or not shard.isprintable() or len(shard) > 255:
            raise CheckpointError(
                f"{file} names {shown(shard)}, which is not a safetensors file", hint=_AGAIN
            )
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{file}: weight_map: expected file names", hint=_AGAIN)
    return weight_map


def _merged(headers: Mapping[str, dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard, header in headers.items():
        for name, info in header.items():
            if name in tensors:
                raise CheckpointError(
                    f"{name} is in two shards: {tensors[name].file} and {shard}",
                    hint="files of two checkpoints are mixed: download into an empty folder",
                )
            tensors[name] = info
    return tensors


def _check_against_index(
    tensors: Mapping[str, TensorInfo], weight_map: Mapping[str, str], prefix: str
) -> None:
    index = prefix + INDEX
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index} places {shown(name)} in {prefix}{shard}, which does not have it",
                hint=_AGAIN,
            )
        if tensors[name].file != prefix + shard:
            raise CheckpointError(
                f"{index} places {name} in {prefix}{shard}, found it in {tensors[name].file}",
                hint=_AGAIN,
            )
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        raise CheckpointError(
            f"{index} does not list {listed(unlisted)}, found in {tensors[unlisted[0]].file}",
            hint=_AGAIN,
        )


def _check_total_size(
    tensors: Mapping[str, TensorInfo], index: Mapping[str, Any], file: str
) -> None:
    metadata = index.get("metadata")
    expected = metadata.get("total_size") if isinstance(metadata, dict) else None
    found = sum(info.nbytes for info in tensors.values())
    # Compared without a type check: some tools write the size as 1.0e9.
    if expected is not None and expected != found:
        raise CheckpointError(
            f"{file}: metadata.total_size: expected {found} bytes, the sum of all tensors, "
            f"found {shown(expected)}",
            hint=_AGAIN,
        )


def _check_numbering(shards: list[str]) -> None:
    """Without an index, names such as x--00002-of-00007 still tell that a shard is missing."""
    numbered = [match for shard in shards if (match := _NUMBERED.fullmatch(shard))]
    present = set(shards)
    for match in numbered:
        stem, digits, rest, total = match.groups()
        count = int(total)
        if count > 100_000:
            raise CheckpointError(f"{match[0]}: not a possible number of shards")
        for number in range(1, count + 1):
            wanted = f"{stem}{number:0{len(digits)}d}{rest}"
            if wanted not in present:
                raise CheckpointError(f"{wanted} is missing: {match[0]} is there", hint=_AGAIN)
