"""Sampling parameters of one request: checked once here, then copied to the device."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn from the logits.

    Order of operations: repetition penalty on the logits of tokens already in the text, division by
    the temperature, then top-k, top-p and min-p each cut the distribution, then one draw. The draw
    is the arg max of logit plus Gumbel noise; the noise of a token is a function of (seed, step,
    token id) alone, so neither the device nor the order of work changes it.

    Raises ValueError naming the parameter, what it may be and what it was.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # keep the smallest set with at least this probability, (0, 1]
    top_k: int = 0  # keep the k most probable; 0 keeps all
    min_p: float = 0.0  # keep tokens with at least this share of the best one's probability, [0, 1)
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits
    seed: int = 0  # 64 bits

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            _check_type(name, getattr(self, name), numbers.Real, "a number")
        for name in ("top_k", "seed"):
            _check_type(name, getattr(self, name), numbers.Integral, "a whole number")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1")
        _check("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 or more")
        _check("min_p", self.min_p, 0 <= self.min_p < 1, "0 or more, below 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < penalty < math.inf, "above 0")
        _check("seed", self.seed, 0 <= self.seed < 2**64, "from 0 to 2**64 - 1")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0

    @property
    def filtered(self) -> bool:
        """Whether top-k, top-p or min-p cuts anything."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def _check_type(name: str, value: object, kind: type, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _check(name: str, value: float, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {expected}, got {value}")
