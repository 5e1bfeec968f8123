"""Compile and trace launches for a GPU that is not there; prints what happened as JSON.

Run by test_compile_ahead.py in a process of its own: Triton's interpreter must be off.
"""

import json
import pathlib
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from kernels.compile_ahead import compile_ahead
from kernels.gemv import embedding, gemv
from kernels.launch_trace import trace_launches
from kernels.rms_norm import rms_norm


class NoGpu:
    """What a launch asks of a driver before it runs anything."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def launch(width: int) -> None:
    rms_norm(torch.ones(3, width), torch.ones(width), 1e-5, torch.float32)


driver.set_active(NoGpu())
counts = []
for _ in range(2):
    with compile_ahead() as asked:
        for width in (64, 96, 64):
            launch(width)
    counts.append(asked.num_kernels)
try:
    launch(64)
    launched = "ran"
except Exception as error:  # there is nothing to launch it on
    launched = type(error).__name__

given = []


def launched_with(kernel, *args, grid, warmup, **kwargs):
    given.append(dict(zip(kernel.arg_names, args, strict=False)).get("trace_ptr"))


JITFunction.run = launched_with
weight, x, out = torch.ones(100, 64), torch.ones(64), torch.empty(100)


def step() -> None:
    gemv(x, weight, out)
    embedding(torch.zeros(1, dtype=torch.int32), weight, x)  # takes no trace
    gemv(x, weight[:8], out[:8], add=True)


with trace_launches() as first:
    step()
with trace_launches(first) as second:
    step()
step()
traces = {
    "kernels": [launch.kernel for launch in second],
    "shapes": [list(launch.stamps.shape) for launch in first],
    "reads the weight": [weight.data_ptr() in launch.operands for launch in first],
    "same tensors": all(a.stamps is b.stamps for a, b in zip(first, second, strict=True)),
    "given": [None if trace is None else list(trace.shape) for trace in given],
}
print(json.dumps({"counts": counts, "afterwards": launched, "traces": traces}))
