"""Compile kernels ahead for a GPU that is not there; prints what happened as JSON.

Run by test_compile_ahead.py in a process of its own: Triton's interpreter must be off.
"""

import json
import pathlib
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from kernels.compile_ahead import compile_ahead
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
print(json.dumps({"counts": counts, "afterwards": launched}))
