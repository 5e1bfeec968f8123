"""Where the time of a decode step goes: bytes and microseconds by component.

Kernels wait for each other's results, so the step's time is cut at the ends of launches: what a
launch adds is the time from the end of the one in front to its own. Until the first of its programs
has what it waited for, that is waiting (the exchange between kernels); the rest is the component's.
All parts together are the step. A kernel that starts early reads weights before its turn: that
shows as less time of its own, and as "ahead".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moe_runtime.gpu.families import GPU_FAMILIES
from moe_runtime.gpu.step_trace import OTHER, StepTrace, trace_step
from moe_runtime.model import MoeModel
from moe_runtime.triton_backend import TritonBackend

WAITING = "waiting"
COMPONENTS = (
    *("embedding", "hyper-connections", "qkv", "compressor", "indexer", "attention"),
    *("output projection", "mlp", "router"),
    *("experts gate_up", "experts down", "head", "sampling", OTHER, WAITING),
)
SOMETIMES = (
    "hyper-connections",
    "compressor",
    "indexer",
    "mlp",
    OTHER,
)  # shown where the model has them


@dataclass(frozen=True)
class ComponentTime:
    """One component's part of a step."""

    component: str
    launches: int
    read_bytes: int
    us: float  # added to the step
    ahead_us: float  # begun before the kernel in front ended, in the mean of its launches
    share_of_step: float
    gbps: float  # bytes over its time; may be over the memory's rate where it reads ahead
    bandwidth_share: float  # of the measured read bandwidth


@dataclass(frozen=True)
class Roofline:
    """A step's parts, its sum, and what the bytes alone would take."""

    context: int
    read_gbps: float
    components: tuple[ComponentTime, ...]
    step_us: float  # with stamps
    plain_step_us: float  # of the captured step as it runs
    read_bytes: int
    least_us: float  # bytes at the measured read bandwidth

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def table(self) -> str:
        """Aligned lines for a person."""
        lines = [
            f"one step at context {self.context}: {self.plain_step_us:.1f} us, "
            f"{self.step_us:.1f} us with stamps; {self.read_bytes / 1e6:.1f} MB, "
            f"{self.least_us:.1f} us at {self.read_gbps:.0f} GB/s",
            f"{'component':20}{'launches':>9}{'MB':>9}{'us':>9}{'of step':>9}{'GB/s':>8}"
            f"{'of bandwidth':>14}{'ahead us':>10}",
        ]
        for c in self.components:
            rate = f"{c.gbps:8.0f}{100 * c.bandwidth_share:12.1f} %" if c.read_bytes else " " * 22
            lines.append(
                f"{c.component:20}{c.launches:9}{c.read_bytes / 1e6:9.2f}{c.us:9.1f}"
                f"{100 * c.share_of_step:7.1f} %{rate}{c.ahead_us:10.2f}"
            )
        total = sum(c.us for c in self.components)
        share = self.least_us / total
        lines.append(
            f"{'step':20}{sum(c.launches for c in self.components):9}{self.read_bytes / 1e6:9.2f}"
            f"{total:9.1f}{100.0:7.1f} %{self.read_bytes / total / 1e3:8.0f}{100 * share:12.1f} %"
        )
        return "\n".join(lines)


def measure_roofline(model: MoeModel, context: int, read_gbps: float) -> tuple[Roofline, StepTrace]:
    """Trace a step after `context` tokens, which a request has left in the cache.

    Raises ValueError for a model that does not run on our kernels on a GPU.
    """
    backend = model.open_backend
    family = GPU_FAMILIES.get(model.config.family)
    parts = family.parts if family else None
    if not isinstance(backend, TritonBackend) or model.device.type != "cuda" or parts is None:
        known = ", ".join(name for name, family in GPU_FAMILIES.items() if family.parts)
        raise ValueError(
            f"the roofline needs a model of {known} in the triton backend on a CUDA GPU, this one "
            f"is {model.config.family} in the {model.backend} backend on {model.device}"
        )
    step = backend.step
    plain_us = 1e6 * backend.time_steps(context, min(64, backend.max_context - context))
    trace = trace_step(step, context, parts.components(step))
    read = parts.read_bytes(model.plan.decode_bytes(context), step, context)
    return roofline(trace, read, context=context, read_gbps=read_gbps, plain_us=plain_us), trace


def roofline(
    trace: StepTrace,
    read_bytes: Mapping[str, int],
    *,
    context: int,
    read_gbps: float,
    plain_us: float,
) -> Roofline:
    """A step's times and bytes by component."""
    times, ahead = attributed(trace)
    launches = Counter(launch.component for launch in trace.launches)
    step_ns = trace.end_ns - trace.begin_ns
    rows = []
    for name in COMPONENTS:
        if name in SOMETIMES and name not in launches:
            continue
        size, ns = read_bytes.get(name, 0), times.get(name, 0)
        gbps = size / ns if ns else 0.0
        rows.append(
            ComponentTime(
                component=name,
                launches=launches[name],
                read_bytes=size,
                us=ns / 1e3,
                ahead_us=ahead.get(name, 0) / 1e3 / max(1, launches[name]),
                share_of_step=ns / step_ns,
                gbps=gbps,
                bandwidth_share=gbps / read_gbps,
            )
        )
    total = sum(read_bytes.values())
    return Roofline(
        context=context,
        read_gbps=read_gbps,
        components=tuple(rows),
        step_us=step_ns / 1e3,
        plain_step_us=plain_us,
        read_bytes=total,
        least_us=total / read_gbps / 1e3,
    )


def attributed(trace: StepTrace) -> tuple[dict[str, int], dict[str, int]]:
    """ns of the step by component, which add up to it, and ns begun ahead.

    The embedding, which is not stamped, has what comes before the first launch is ready; sampling
    what comes after the last one has ended.
    """
    times: Counter[str] = Counter()
    ahead: Counter[str] = Counter()
    clock = trace.begin_ns
    waits_for = "embedding"
    for launch in trace.launches:
        if not len(launch.stamps):
            continue
        start, ready, done = _extent(launch.stamps)
        ahead[launch.component] += max(0, clock - start)
        begun = min(max(clock, ready), done)
        times[waits_for] += max(0, begun - clock)
        times[launch.component] += max(0, done - max(clock, begun))
        clock = max(clock, done)
        waits_for = WAITING
    times["sampling"] += trace.end_ns - clock
    return dict(times), dict(ahead)


def _extent(stamps: Any) -> tuple[int, int, int]:
    """First start, first end of a wait, last end of a launch's programs."""
    ready = stamps[:, :2].amax(1)  # a program that waits for nothing is ready at its start
    return int(stamps[:, 0].min()), int(ready.min()), int(stamps[:, 2].max())
