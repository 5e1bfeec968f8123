"""Launches that only compile, each kernel once and into Triton's cache; launches with a trace."""

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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def found(cache):
    """What the child says, in which Triton compiles for a GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, str(CHILD)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_each_kernel_is_compiled_once_and_none_is_launched(found, cache):
    assert found["counts"] == [2, 0]  # two widths; the second time they are there
    assert found["afterwards"] != "ran"  # a launch is a launch again
    assert len(list(cache.rglob("*.cubin"))) == 2


def test_launches_are_given_a_trace_for_their_programs(found):
    traces = found["traces"]
    assert traces["kernels"] == ["_gemv_kernel", "_gemv_kernel"]
    large, small = traces["shapes"]
    assert large[1:] == small[1:] == [1, 3] and large[0] > small[0] >= 1
    assert traces["reads the weight"] == [True, True] and traces["same tensors"]
    # the first two steps with, the third without; the embedding never
    assert traces["given"] == [large, None, small] * 2 + [None] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
def test_the_interpreter_runs_what_is_launched():
    with compile_ahead() as asked:
        out = rms_norm(torch.full((1, 64), 3.0), torch.ones(64), 1e-5, torch.float32)
    assert torch.allclose(out, torch.ones(1, 64)) and asked.num_kernels == 0
