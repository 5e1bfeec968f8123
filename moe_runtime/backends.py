"""Choosing and making a backend: device, fit, weights. The one place that decides where to run."""

from __future__ import annotations

import sys

import torch

from kernels.gemv_bf16 import device_supports_kernels
from loaders.checkpoint import Checkpoint
from loaders.names.table import match_names
from loaders.weights import load_weights
from moe_runtime.backend import Backend
from moe_runtime.config import ModelConfig
from moe_runtime.errors import DoesNotFitError
from moe_runtime.models.gpt_oss import GptOssReference
from moe_runtime.models.registry import ModelFamily
from moe_runtime.plan import MemoryPlan, fit, gb, weights_by_component
from moe_runtime.reference_backend import ReferenceBackend
from moe_runtime.triton_backend import TritonBackend

BACKENDS = ("auto", "reference", "triton")
_DTYPES = {"reference": ("auto", "fp32"), "triton": ("auto", "bf16")}
