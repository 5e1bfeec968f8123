"""How a family's decode step is divided for measuring: see moe_runtime/roofline.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.persistent.pack import TiledExperts
from quant.tensor import QuantTensor


@dataclass(frozen=True)
class StepParts:
    """Functions of a family's step.

    components:  address of a weight or a cache -> what the kernel that reads it is for
    read_bytes:  the plan's bytes of one token by its components, the step and the context -> bytes
                 of each of ours
    """

    components: Callable[[Any], dict[int, str]]
    read_bytes: Callable[[Mapping[str, int], Any, int], dict[str, int]]


def address(weight: Tensor | QuantTensor | TiledExperts) -> int:
    """Where a weight's values begin, as launches name it."""
    if isinstance(weight, TiledExperts):
        return weight.tiles.data_ptr()
    values = weight.values if isinstance(weight, QuantTensor) else weight
    return values.data_ptr()
