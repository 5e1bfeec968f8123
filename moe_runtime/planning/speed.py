"""Tokens a second from bytes a token: what the memory allows times the shares reached so far."""

from __future__ import annotations

from dataclasses import dataclass

from moe_runtime.machines import Machine

# Least and most of the rows `bandwidth_share` in benchmarks/results/h100.csv, on an NVIDIA H100:
# gpt-oss-120b with FP8 after 8,192 tokens (commit 2021d06) and gpt-oss-20b with bf16 after 128
# (commit 67b4c38).
LOW_SHARE = 0.599711
HIGH_SHARE = 0.769743


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
