"""Kernels compiled ahead: each once, into Triton's cache, without a launch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.compile_ahead import compile_ahead
from kernels.rms_norm import rms_norm

CHILD = Path(__file__).with_name("compile_ahead_child.py")


def test_each_kernel_is_compiled_once_and_none_is_launched(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(CHILD)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["counts"] == [2, 0]  # two widths; the second time they are there
    assert found["afterwards"] != "ran"  # a launch is a launch again
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
def test_the_interpreter_runs_what_is_launched():
    with compile_ahead() as asked:
        out = rms_norm(torch.full((1, 64), 3.0), torch.ones(64), 1e-5, torch.float32)
    assert torch.allclose(out, torch.ones(1, 64)) and asked.num_kernels == 0
