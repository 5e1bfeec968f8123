"""The plan of a checkpoint for a machine: everything that `moe-runtime plan` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loaders.checkpoint import Checkpoint
from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.logical import LogicalTensor, logical_tensors
from moe_runtime.config import DecoderConfig
from moe_runtime.machines import Machine
from moe_runtime.models.gpt_oss_original import as_huggingface
from moe_runtime.models.registry import plan_model
from moe_runtime.plan import LOOKED_UP, RESERVE_BYTES, longest_context
from moe_runtime.planning.components import (
    NOT_LOADED,
    Component,
    Groups,
    by_component,
    summed_up,
)
from moe_runtime.planning.conversions import Conversion, conversions
from moe_runtime.planning.facts import (
    PlannedConfig,
    count_experts,
    count_layers,
    planned_config,
)
from moe_runtime.planning.speed import Band, predict
from moe_runtime.planning.variants import Variant, variants
from moe_runtime.support import has_kernels

CONTEXTS = (1024, 8192, 32768, 131072, 1048576)
DEFAULT_CONTEXT = 1024
SMALL_STEP_BYTES = 500_000_000  # speeds are measured on steps of 3.7 GB and more


@dataclass(frozen=True)
class ContextRow:
    """What a model takes with a cache for one context, and does when it is full."""

    context: int
    cache_bytes: int
    workspace_bytes: int
    total_bytes: int
    token_bytes: int
    fits: bool
    speed: Band


@dataclass(frozen=True)
class VariantRow:
    """A what-if at the context that is asked for."""

    name: str
    weight_bytes: int
    total_bytes: int
    token_bytes: int
    longest_context: int  # that fits the machine; 0: none
    speed: Band


@dataclass(frozen=True)
class FitRow:
    """A variant on one GPU of the table."""

    gpu: str
    variant: str
    gpus_needed: int  # to hold the weights, evenly divided
    longest_context: int  # on one; 0: it does not fit
    speed: Band  # on one, at the context that is asked for


@dataclass(frozen=True)
class PlanReport:
    """All sections; bytes and tokens everywhere."""

    family: str
    architecture: str
    layout: str
    machine: Machine
    context: int
    max_context: int
    layers: int
    experts: int
    experts_per_token: int
    components: tuple[Component, ...]
    read_by_component: dict[str, int]  # for one token at `context`
    active_parameters: int  # of one token, the embedding not counted
    contexts: tuple[ContextRow, ...]
    what_if: tuple[VariantRow, ...]
    fits: tuple[FitRow, ...]
    conversions: tuple[Conversion, ...]
    backends: tuple[str, ...]  # of this version that run it
    notes: tuple[str, ...]  # what could not be known, and what to keep in mind

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(component.nbytes for component in self.components)

    @property
    def parameters(self) -> int:
        """Numbers that the tensors stand for; scales are not counted."""
        return sum(component.parameters for component in self.components)

    @property
    def token_bytes(self) -> int:
        """Bytes read for one token at `context`."""
        return sum(self.read_by_component.values())

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        totals = {
            "total_bytes": self.total_bytes,
            "parameters": self.parameters,
            "token_bytes": self.token_bytes,
        }
        return {**asdict(self), **totals}


def plan_checkpoint(
    checkpoint: Checkpoint,
    machine: Machine,
    others: Sequence[Machine] = (),
    *,
    context: int | None = None,
) -> PlanReport:
    """Plan a checkpoint from its headers for one machine, and say where else it fits.

    context: tokens in the cache; default DEFAULT_CONTEXT, at most what the model was made for
    Raises CheckpointError, UnsupportedModelError for formats that are not read, ValueError.
    """
    layout = checkpoint.layout
    checkpoint = as_huggingface(checkpoint)
    tensors = logical_tensors(checkpoint)
    config, groups, refusal = _understand(checkpoint, tensors)
    if context is not None and not 1 <= context <= config.max_context:
        raise ValueError(f"--context must be from 1 to {config.max_context}, got {context}")
    wanted = min(DEFAULT_CONTEXT, config.max_context) if context is None else context
    found = variants(config, groups)
    published = found[0]
    components, read = summed_up(groups), published.token_bytes(wanted)
    if not read:
        raise CheckpointError("the checkpoint has no weight that a token reads")
    return PlanReport(
        family=config.family,
        architecture=_architecture(checkpoint, config),
        layout=layout,
        machine=machine,
        context=wanted,
        max_context=config.max_context,
        layers=config.num_layers,
        experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        components=components,
        read_by_component=read,
        active_parameters=_active_parameters(components, config),
        contexts=_contexts(published, machine, wanted),
        what_if=tuple(_variant_row(variant, machine, wanted) for variant in found),
        fits=tuple(_fit(v, gpu, wanted) for gpu in others for v in _dense_pair(found)),
        conversions=conversions(checkpoint, groups, renamed=layout == "original"),
        backends=_backends(config, refusal),
        notes=_notes(config, groups, sum(read.values()), refusal),
    )


def _understand(
    checkpoint: Checkpoint, tensors: Sequence[LogicalTensor]
) -> tuple[DecoderConfig, Groups, UnsupportedModelError | None]:
    """The runtime's own facts of a model that it runs, else what config.json and names tell."""
    try:
        config: DecoderConfig | None = plan_model(checkpoint).config
        refusal = None
    except UnsupportedModelError as error:
        config, refusal = None, error
    layers = config.num_layers if config else count_layers(checkpoint.config, tensors)
    groups = by_component(tensors, layers)
    if config is None:
        config = planned_config(checkpoint.config, groups, layers, count_experts(tensors))
    return config, groups, refusal


def _architecture(checkpoint: Checkpoint, config: DecoderConfig) -> str:
    named = checkpoint.config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else config.family


def _active_parameters(components: Sequence[Component], config: DecoderConfig) -> int:
    total = 0
    for part in components:
        if part.name == "experts":
            total += part.parameters * config.experts_per_token // config.num_experts
        elif part.name not in (*LOOKED_UP, *NOT_LOADED):
            total += part.parameters
    return total


def _contexts(variant: Variant, machine: Machine, wanted: int) -> tuple[ContextRow, ...]:
    most = variant.config.max_context
    lengths = sorted({n for n in CONTEXTS if n < most} | {wanted, most})
    rows = []
    for context in lengths:
        plan, read = variant.memory(context, machine), sum(variant.token_bytes(context).values())
        total = variant.total_bytes(context, machine)
        cache = total - plan.total_bytes + plan.cache_bytes
        fits, speed = total <= machine.memory_bytes, predict(read, machine)
        rows.append(ContextRow(context, cache, plan.workspace_bytes, total, read, fits, speed))
    return tuple(rows)


def _variant_row(variant: Variant, machine: Machine, context: int) -> VariantRow:
    read = sum(variant.token_bytes(context).values())
    return VariantRow(
        variant.name,
        variant.memory(context).total_weight_bytes,
        variant.total_bytes(context, machine),
        read,
        longest_context(variant.memory(context, machine), machine.memory_bytes),
        predict(read, machine),
    )


def _dense_pair(found: Sequence[Variant]) -> list[Variant]:
    """As published, and with the dense weights in FP8 where that is a difference."""
    return [variant for variant in found if variant.name in ("as published", "dense fp8")]


def _fit(variant: Variant, gpu: Machine, context: int) -> FitRow:
    plan = variant.memory(context, gpu)
    room = gpu.memory_bytes - RESERVE_BYTES
    return FitRow(
        gpu.name,
        variant.name,
        -(-(plan.total_weight_bytes + plan.more.tiles) // room),
        longest_context(plan, gpu.memory_bytes),
        predict(sum(variant.token_bytes(context).values()), gpu),
    )


def _backends(config: DecoderConfig, refusal: UnsupportedModelError | None) -> tuple[str, ...]:
    if refusal is not None:
        return ()
    return ("triton", "reference") if has_kernels(config.family) else ("reference",)


def _notes(
    config: DecoderConfig, groups: Groups, token_bytes: int, refusal: UnsupportedModelError | None
) -> tuple[str, ...]:
    notes = []
    meaning = "tokens/s are what its bytes allow at the shares of bandwidth that GPT-OSS reaches"
    if refusal is not None:
        notes.append(f"this version does not run it: {refusal.message}; {meaning}")
    elif not has_kernels(config.family):
        notes.append(f"this version runs it on the reference backend alone, slowly; {meaning}")
    if token_bytes < SMALL_STEP_BYTES:
        notes.append("a step of so few bytes is bound by launches, not by memory: it is slower")
    if isinstance(config, PlannedConfig):
        notes.append("the buffers are an estimate")
        notes += [f"not known: {remark}" for remark in config.unknown]
    if "experts" not in groups:
        notes.append("no routed experts were found by name: every weight counts for each token")
    if "other" in groups:
        names = ", ".join(tensor.name for tensor, _ in groups["other"][:3])
        count = sum(count for _, count in groups["other"])
        notes.append(f"not known: what {count} tensors are for; they count for each token: {names}")
    for component in NOT_LOADED:
        if component in groups:
            size = sum(count * tensor.nbytes for tensor, count in groups[component])
            notes.append(f"{component} ({size / 1e9:.2f} GB) is not loaded and not counted")
    return tuple(notes)
