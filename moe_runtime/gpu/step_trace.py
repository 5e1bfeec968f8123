"""One captured decode step with the times of its programs, for `bench --roofline`.

A build of its own: the kernels are compiled once more, with the stores of the stamps in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.compile_ahead import compile_ahead
from kernels.launch_trace import TracedLaunch, mark_time, trace_launches
from moe_runtime.gpu.captured_step import CapturedStep

OTHER = "other"  # a launch that reads none of the known weights
REPEATS = 5
_STEPS_IN_A_ROW = 3  # of which the last is looked at


@dataclass(frozen=True)
class LaunchTimes:
    """One launch, or one part of it: what it is for, and when its programs started, had waited and
    ended."""

    component: str
    kernel: str
    stamps: Tensor  # [programs, 3] int64 ns on the CPU; programs without work are left out


@dataclass(frozen=True)
class StepTrace:
    """One step: when it began and ended, and its launches in order."""

    begin_ns: int
    end_ns: int
    launches: tuple[LaunchTimes, ...]


def trace_step(step: CapturedStep, position: int, names: Mapping[int, str]) -> StepTrace:
    """The step of median time of REPEATS, captured with stamps, from a position of the cache.

    names: address of a weight or a cache -> what the kernel that reads it is for
    """
    marks = torch.zeros(2, dtype=torch.int64, device=step.logits.device)

    def run() -> None:
        mark_time(marks[:1])
        step.step(filtered=False)
        mark_time(marks[1:])

    with compile_ahead(), trace_launches():
        run()
    with trace_launches() as launches:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), trace_launches(launches):
        run()
    found = []
    for _ in range(REPEATS):
        for launch in launches:
            launch.stamps.zero_()
        step.state.position.fill_(position)
        step.state.step.zero_()
        for _ in range(_STEPS_IN_A_ROW):
            graph.replay()
        torch.cuda.synchronize()
        begin, end = marks.tolist()
        found.append(StepTrace(begin, end, tuple(named(launches, names))))
    return sorted(found, key=lambda trace: trace.end_ns - trace.begin_ns)[REPEATS // 2]


def named(launches: Iterable[TracedLaunch], names: Mapping[int, str]) -> Iterable[LaunchTimes]:
    """Launches, or their parts, by what they are for; their stamps on the CPU."""
    for launch in launches:
        component = next((names[at] for at in launch.operands if at in names), OTHER)
        stamps = launch.stamps.cpu()
        for i, name in enumerate(launch.parts or (component,)):
            part = stamps[:, i]
            yield LaunchTimes(name, launch.kernel, part[part[:, 2] > 0])
