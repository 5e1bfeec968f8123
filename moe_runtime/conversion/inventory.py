"""Whether a source is whole: layers, experts and routers, known from names before any is read.

Tools have dropped layers, heads and experts and left an index that agreed with itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loaders.checkpoint import Checkpoint
from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.json_text import listed
from loaders.logical import LogicalTensor
from moe_runtime.conversion.errors import ConversionError, refused
from moe_runtime.conversion.options import ConversionOptions, matches
from moe_runtime.conversion.roles import (
    EXPERTS,
    expert_of,
    layer_of,
    num_experts,
    num_layers,
    source_format,
)
from moe_runtime.models.registry import plan_model


def check_source(
    checkpoint: Checkpoint,
    weights: Sequence[LogicalTensor],
    roles: Mapping[str, str],
    options: ConversionOptions,
) -> None:
    """Raise ConversionError for anything that headers tell and no conversion should carry on."""
    _require_known_names(weights, options)
    check_inventory(weights, roles, checkpoint.config, options)
    _require_equal_experts(weights, options)
    _check_family(checkpoint, options)


def check_inventory(
    weights: Sequence[LogicalTensor],
    roles: Mapping[str, str],
    config: Mapping[str, Any],
    options: ConversionOptions,
) -> None:
    """Raise ConversionError for missing layers or experts and for routers that are not there."""
    if "missing-tensors" not in options.allow:
        _check_layers(weights, config)
        _check_experts(weights, roles, config)
    if "router" not in options.allow:
        _check_routers(weights, roles)


def different_experts(weights: Sequence[LogicalTensor]) -> Iterator[tuple[str, str]]:
    """Names of experts that differ in shape or stored format from most of their layer, and how."""
    groups: dict[tuple[str, str], list[LogicalTensor]] = defaultdict(list)
    for weight in weights:
        parsed = expert_of(weight.name)
        if parsed is not None:
            groups[parsed[0], parsed[2]].append(weight)
    for group in groups.values():
        (usual, _), *others = Counter(map(_kind, group)).most_common()
        if others:
            example = next(weight.name for weight in group if _kind(weight) == usual)
            for weight in group:
                if _kind(weight) != usual:
                    yield weight.name, f"{_kind(weight)}, where {example} is {usual}"


def _kind(weight: LogicalTensor) -> str:
    return f"{source_format(weight)} {weight.shape}"


def _check_layers(weights: Sequence[LogicalTensor], config: Mapping[str, Any]) -> None:
    promised = num_layers(config)
    found = {layer for weight in weights if (layer := layer_of(weight.name)) is not None}
    missing = sorted(set(range(promised or 0)) - found)
    if missing:
        raise refused(
            "missing-tensors",
            f"config.json promises {promised} layers, and layer {listed(list(map(str, missing)))} "
            "has no tensor",
        )


def _check_experts(
    weights: Sequence[LogicalTensor], roles: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    promised = num_experts(config)
    experts: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for weight in weights:
        parsed = expert_of(weight.name)
        if roles[weight.name] != EXPERTS:
            continue
        if parsed is not None:
            experts[parsed[0]][parsed[2]].add(parsed[1])
        elif promised is not None and len(weight.shape) == 3 and weight.shape[0] != promised:
            raise refused(
                "missing-tensors",
                f"{weight.name}: config.json promises {promised} experts, its shape is "
                f"{weight.shape}",
            )
    for prefix, by_matrix in experts.items():
        everyone = set(range(promised)) if promised else set().union(*by_matrix.values())
        for matrix, present in by_matrix.items():
            absent = sorted(everyone - present)
            if absent:
                raise refused(
                    "missing-tensors",
                    f"{prefix}: {len(absent)} of {len(everyone)} experts have no {matrix}: "
                    f"{listed(list(map(str, absent)))}",
                )


def _check_routers(weights: Sequence[LogicalTensor], roles: Mapping[str, str]) -> None:
    with_experts = {layer_of(w.name) for w in weights if roles[w.name] == EXPERTS}
    routers = [weight for weight in weights if roles[weight.name] == "router"]
    for router in routers:
        if router.format is not None:
            raise refused(
                "router", f"{router.name}: a router in {router.format.name}, which loses precision"
            )
    alone = sorted(with_experts - {layer_of(w.name) for w in routers}, key=str)
    if alone:
        raise refused(
            "router",
            f"no router was found in layer {listed(list(map(str, alone)))}, which has experts",
        )


def _require_known_names(weights: Sequence[LogicalTensor], options: ConversionOptions) -> None:
    """Raise ConversionError for a --keep that would keep nothing."""
    for pattern in options.keep:
        if not any(matches(pattern, weight.name) for weight in weights):
            raise ConversionError(
                f"--keep {pattern}: no weight has such a name, {weights[0].name} for example",
                hint="give a part of a name, or a glob over the whole of it",
            )


def _require_equal_experts(weights: Sequence[LogicalTensor], options: ConversionOptions) -> None:
    found = next(different_experts(weights), None)
    if found is not None and "different-experts" not in options.allow:
        raise refused("different-experts", f"{found[0]}: {found[1]}")


def _check_family(checkpoint: Checkpoint, options: ConversionOptions) -> None:
    """Of a family that we run every name and shape is known: raise ConversionError for others."""
    try:
        plan_model(checkpoint)
    except UnsupportedModelError:
        return
    except CheckpointError as error:
        if "model" not in options.allow:
            raise refused("model", error.message) from error
