"""What a conversion is asked to do. No torch here: the command line imports this."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import Any

from moe_runtime.conversion.errors import REFUSALS

# Keys of quant.formats.TARGETS, which cannot be imported without torch.
TARGETS = ("mxfp4", "nvfp4", "mxfp8", "fp8-block", "fp8-channel", "bf16")
LAYOUTS = ("compressed-tensors", "native")
SCALE_RULES = ("floor", "even", "rceil")
SCALE_SEARCHES = ("none", "mse")
DENSE = ("keep", "fp8-block")
MX_TARGETS = ("mxfp4", "mxfp8")
SEARCHED_TARGETS = (*MX_TARGETS, "nvfp4")
DEFAULT_SHARD_BYTES = 5_000_000_000
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}


@dataclass(frozen=True)
class ConversionOptions:
    """Everything that decides the bytes of the result, beside the source."""

    target: str  # one of TARGETS
    layout: str | None = None  # one of LAYOUTS; None: what the family's engines open
    scale_rule: str | None = None  # of mxfp4 and mxfp8; None: even
    scale_search: str = "none"
    power_of_two_scales: bool = False  # of fp8-block
    keep: tuple[str, ...] = ()  # glob patterns of weights that stay as they are
    dense: str = "keep"
    shard_bytes: int = DEFAULT_SHARD_BYTES
    allow: frozenset[str] = frozenset()  # names of REFUSALS
    base_model: str | None = None  # hub id for the model card; None: the source's own, if any

    def __post_init__(self) -> None:
        for value, allowed, what in (
            (self.target, TARGETS, "--to"),
            (self.layout, (None, *LAYOUTS), "--layout"),
            (self.scale_rule, (None, *SCALE_RULES), "--scale-rule"),
            (self.scale_search, SCALE_SEARCHES, "--scale-search"),
            (self.dense, DENSE, "--dense"),
        ):
            if value not in allowed:
                named = ", ".join(str(one) for one in allowed if one)
                raise ValueError(f"{what} {value}: expected one of {named}")
        for name in self.allow:
            if name not in REFUSALS:
                raise ValueError(f"--allow {name}: expected one of {', '.join(REFUSALS)}")
        if self.scale_rule and self.target not in MX_TARGETS:
            raise ValueError(f"--scale-rule goes with --to {' and '.join(MX_TARGETS)}")
        if self.scale_search != "none" and self.target not in SEARCHED_TARGETS:
            raise ValueError(f"--scale-search goes with --to {', '.join(SEARCHED_TARGETS)}")
        if self.power_of_two_scales and self.target != "fp8-block":
            raise ValueError("--power-of-two-scales goes with --to fp8-block")
        if self.target == "bf16" and self.dense != "keep":
            raise ValueError("--dense fp8-block does not go with --to bf16")
        if self.base_model is not None and not _HUB_ID.fullmatch(self.base_model):
            raise ValueError(f"--base-model {self.base_model!r}: expected a hub id, org/name")
        if self.shard_bytes < 1:
            raise ValueError(f"--shard-size: expected at least 1 byte, got {self.shard_bytes}")

    @property
    def rule(self) -> str | None:
        """The scale rule in force; None for formats that have none."""
        return (self.scale_rule or "even") if self.target in MX_TARGETS else None

    def keeps(self, name: str) -> bool:
        """Whether --keep names a weight."""
        return any(matches(pattern, name) for pattern in self.keep)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, equal for equal conversions."""
        return {
            "target": self.target,
            "layout": self.layout,
            "scale_rule": self.rule,
            "scale_search": self.scale_search,
            "power_of_two_scales": self.power_of_two_scales,
            "keep": sorted(self.keep),
            "dense": self.dense,
            "shard_bytes": self.shard_bytes,
            "allow": sorted(self.allow),
            "base_model": self.base_model,
        }


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of --keep names a weight: a glob over the whole name, or a part of it."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*{pattern}*")


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 4GiB; ValueError for anything else."""
    stripped = text.strip().upper()
    for unit, factor in _UNITS.items():
        number = stripped.removesuffix(unit)
        if stripped.endswith(unit) and number.replace(".", "", 1).strip().isdecimal():
            return int(float(number) * factor)
    raise ValueError(f"{text!r} is not a size: give bytes with a unit, such as 5GB or 500MB")
