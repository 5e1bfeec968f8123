"""Which part of a model a tensor belongs to, by what names have in common across families."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from loaders.logical import LogicalTensor

# The first pattern found in a name decides; every number in the name stands as 0. "hash tables" map
# token ids to experts (DeepSeek V4).
PATTERNS: tuple[tuple[str, str], ...] = (
    ("mtp", r"(^|\.)mtp\.|nextn_predict"),
    ("vision", r"(^|\.)(visual|vision|vision_tower|vision_model|audio_tower|mm_projector)\."
               r"|multi_modal_projector"),
    ("hash tables", r"tid\deid"),
    ("shared experts", r"shared_expert|shared_mlp"),
    ("router", r"router|\.gate\.|(mlp|ffn|moe)\.gate$|\.gate\.weight|e_score_correction_bias"
               r"|moe_statics"),
    ("experts", r"experts[._]|mlp\.mlp\d_|block_sparse_moe\.(input|output)_linear"),
    ("indexer", r"indexer\."),
    ("compressor", r"compressor\."),
    ("hyper-connections", r"(^|\.)hc_|(attn|ffn)_hc\."),
    ("norms", r"norm"),
    ("head", r"lm_head|unembedding|^head\."),
    ("embedding", r"embed"),
    ("attention", r"attn|attention"),
    ("mlp", r"mlp|feed_forward|ffn"),
    ("other", r""),
)  # fmt: skip
ORDER = (
    *("embedding", "attention", "indexer", "compressor", "hyper-connections", "router"),
    *("hash tables", "experts", "shared experts", "mlp", "norms", "head", "other", "mtp", "vision"),
)
NOT_LOADED = ("mtp", "vision")  # decoding text needs neither
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|block)\.(\d+)\.")
_NUMBER = re.compile(r"\d+")
_EXPERT = re.compile(r"experts\.(\d+)\.")

Kinds = Sequence[tuple[LogicalTensor, int]]  # one tensor of each kind, and how many there are
Groups = Mapping[str, Kinds]  # by component


@dataclass(frozen=True)
class Component:
    """The tensors of one part of the model."""

    name: str
    tensors: int
    parameters: int  # numbers that the tensors stand for, scales not counted
    nbytes: int
    formats: dict[str, int]  # bytes by stored format, most first


def component_of_tensor(name: str, num_layers: int) -> str:
    """A component of ORDER; layers beyond num_layers are drafts for speculation (MTP)."""
    layer = layer_of(name)
    if layer is not None and layer >= num_layers:
        return "mtp"
    return _by_pattern(_without_numbers(name))


def layer_of(name: str) -> int | None:
    """The layer's number in a tensor's name; None outside the layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def expert_of(name: str) -> int | None:
    """The expert's number in a tensor's name; None where experts are stacked."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None


def by_component(tensors: Iterable[LogicalTensor], num_layers: int) -> Groups:
    """Kinds of tensors of each component that the model has, in ORDER."""
    groups: dict[str, list[LogicalTensor]] = {name: [] for name in ORDER}
    for tensor in tensors:
        groups[component_of_tensor(tensor.name, num_layers)].append(tensor)
    return {name: kinds_of(group) for name, group in groups.items() if group}


def kinds_of(tensors: Iterable[LogicalTensor]) -> list[tuple[LogicalTensor, int]]:
    """One tensor of each kind and how many there are: alike in all but the numbers in the name."""
    kinds: dict[Hashable, list[LogicalTensor]] = {}
    for tensor in tensors:
        alike = (_without_numbers(tensor.name), tensor.shape, tensor.format, tensor.nbytes)
        kinds.setdefault((*alike, tensor.dtype), []).append(tensor)
    return [(found[0], len(found)) for found in kinds.values()]


def summed_up(groups: Groups) -> tuple[Component, ...]:
    """One row a component."""
    return tuple(_component(name, group) for name, group in groups.items())


def format_name(tensor: LogicalTensor) -> str:
    """The stored format of a tensor: "mxfp4", "fp8_block128", or its dtype as "bf16"."""
    return tensor.format.name if tensor.format else tensor.dtype.lower()


def _component(name: str, group: Kinds) -> Component:
    formats: Counter[str] = Counter()
    for tensor, count in group:
        formats[format_name(tensor)] += count * tensor.nbytes
    return Component(
        name,
        tensors=sum(count for _, count in group),
        parameters=sum(count * math.prod(tensor.shape) for tensor, count in group),
        nbytes=sum(formats.values()),
        formats=dict(formats.most_common()),
    )


def _without_numbers(name: str) -> str:
    return _NUMBER.sub("0", name)


@cache  # names differ in numbers mostly: a few dozen are left without them
def _by_pattern(name: str) -> str:
    return next(what for what, pattern in PATTERNS if re.search(pattern, name))
