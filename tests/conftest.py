"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter."""

import os

import torch

# Triton reads the variable when it is imported, so it is set before anything imports a kernel.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the processors
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU if there is one, else the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
