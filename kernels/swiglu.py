"""The gated activation between an expert's two halves."""

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Swiglu:
    """hidden = gate * sigmoid(alpha * gate) * (up + offset), after clamping.

    limit:        gate is clamped from above and up on both sides; None clamps nothing
    alternating:  whether rows alternate gate and up; else all gate rows stand before all up rows
    """

    limit: float | None = None
    alpha: float = 1.0
    offset: float = 0.0
    alternating: bool = False

    def rows(self, width: int) -> tuple[int, int]:
        """Distance of one gate row to the next, and of a gate row to its up row; width is F."""
        return (2, 1) if self.alternating else (1, width)


@triton.jit
def swiglu(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr):
    """The activation of fp32 tensors; LIMIT may be None."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    return gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + OFFSET)
