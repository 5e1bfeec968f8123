"""Tokens a second from bytes a token: what the memory allows times the shares reached so far."""

from __future__ import annotations

from dataclasses import dataclass

from moe_runtime.machines import Machine

# Rows `bandwidth_share` in benchmarks/results/h100.csv, on an NVIDIA H100: DeepSeek V3 with 9
# layers after 32,768 tokens (commit a3a75c3) and gpt-oss-20b with bf16 after 128 (commit 86e398c).
# V2-Lite in FP8 and V4, whose kernels are many and short, reach less than the first.
LOW_SHARE = 0.597809
HIGH_SHARE = 0.821334


@dataclass(frozen=True)
class Band:
    """Predicted tokens a second, and the bound that no implementation passes."""

    low: float
    high: float
    bound: float  # every byte at the measured read bandwidth

    def text(self) -> str:
        """As "357 to 388"."""
        return f"{_figure(self.low)} to {_figure(self.high)}"


def predict(token_bytes: int, machine: Machine) -> Band:
    """Tokens a second of a model that reads token_bytes for each, on a machine that holds it."""
    bound = machine.read_gbps * 1e9 / token_bytes
    return Band(LOW_SHARE * bound, HIGH_SHARE * bound, bound)


def _figure(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.1f}"
