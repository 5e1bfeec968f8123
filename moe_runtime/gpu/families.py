"""What the triton backend runs: one row a family. A new one is a row here, its files and tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from loaders.names.table import LoadPlan
from loaders.weights import Relayout
from moe_runtime.gpu import deepseek, deepseek_parts, deepseek_v4, deepseek_v4_parts, gpt_oss
from moe_runtime.gpu.captured_step import CapturedStep, Prompts
from moe_runtime.gpu.step_parts import StepParts
from moe_runtime.models.reference_model import Weights
from moe_runtime.plan import MoreBytes
from quant.formats import QuantFormat


class Assemble(Protocol):
    """The decode step and the prefill of a model, with their cache."""

    def __call__(
        self,
        config: Any,
        weights: Weights,
        max_context: int,
        device: torch.device,
        cache_dtype: torch.dtype,
    ) -> tuple[CapturedStep, Prompts]:
        """weights by our names; those that are laid out anew are taken out of the dict."""
        ...


class CompileKernels(Protocol):
    """Compile every kernel that a model can launch, so that nothing compiles later."""

    def __call__(
        self,
        config: Any,
        max_context: int,
        device: torch.device,
        formats: Any,
        dense_format: QuantFormat | None,
    ) -> None:
        """formats: what GpuFamily.formats found; dense_format: see moe_runtime/dense_format.py."""
        ...


@dataclass(frozen=True)
class GpuFamily:
    """How models of one family run on our kernels.

    formats: what decides which kernels a model launches, from its headers; raises
             UnsupportedModelError for a weight in a format that the kernels do not read
    relayout: of config, formats and device: weights that are laid out anew while they are loaded
    more_bytes: of config, formats, device and dense format: what that takes
    slower_because: of config, formats and device: why a slower path is taken; None if none is
    compile_without_tiles: as compile, for weights that are not laid out anew for want of memory
    """

    formats: Callable[[LoadPlan], tuple[Any, ...]]
    assemble: Assemble
    compile: CompileKernels
    parts: StepParts | None = None  # None: its step cannot be measured by component
    relayout: Callable[..., Relayout | None] = lambda *_: None
    more_bytes: Callable[..., MoreBytes] = lambda *_: MoreBytes()
    slower_because: Callable[..., str | None] = lambda *_: None
    compile_without_tiles: CompileKernels | None = None


_DEEPSEEK = GpuFamily(
    deepseek.layer_kinds,
    deepseek.assemble,
    deepseek.compile_kernels,
    StepParts(deepseek_parts.components, deepseek_parts.component_bytes),
)
GPU_FAMILIES: Mapping[str, GpuFamily] = {
    "gpt_oss": GpuFamily(
        gpt_oss.expert_formats,
        gpt_oss.assemble,
        gpt_oss.compile_kernels,
        StepParts(gpt_oss.components, gpt_oss.read_bytes),
        gpt_oss.relayout,
        gpt_oss.more_bytes,
        gpt_oss.slower_because,
        partial(gpt_oss.compile_kernels, tiled=False),
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "deepseek_v4": GpuFamily(
        deepseek_v4.layer_kinds,
        deepseek_v4.assemble,
        deepseek_v4.compile_kernels,
        StepParts(deepseek_v4_parts.components, deepseek_v4_parts.component_bytes),
    ),
}
