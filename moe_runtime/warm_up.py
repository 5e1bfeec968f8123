"""Kernels compiled before a model is opened, into Triton's cache: `moe-runtime doctor --warm-up`.

Triton keys its cache by kernel, sizes, GPU and versions, so what is compiled here is found when a
model of these sizes is opened on this kind of GPU, until one of them changes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loaders.checkpoint import Checkpoint, open_folder
from loaders.errors import UnsupportedModelError
from moe_runtime.bundled import BUNDLED
from moe_runtime.config import DecoderConfig
from moe_runtime.dense_format import AS_PUBLISHED, DENSE_FORMATS, knows_fp8, packs
from moe_runtime.errors import DoesNotFitError
from moe_runtime.gpu.families import GPU_FAMILIES
from moe_runtime.models.registry import plan_model
from moe_runtime.plan import fit, weights_by_component
from moe_runtime.published import PUBLISHED
from moe_runtime.triton_backend import compile_kernels
from quant.formats import MXFP4


@dataclass(frozen=True)
class WarmUpModel:
    """What decides which kernels a model launches."""

    name: str
    config: DecoderConfig
    weight_bytes: Mapping[str, int]
    formats: tuple[Any, ...]  # as GpuFamily.formats finds them


@dataclass(frozen=True)
class WarmUp:
    """One model in one dense format: its kernels are there, or why not."""

    model: str
    dense_format: str
    max_context: int  # tokens of the cache that the kernels are for; 0: none were compiled
    kernels: int  # that were not there in this process
    seconds: float
    why_not: str | None = None


def known_models() -> list[WarmUpModel]:
    """The published models and the demo, without any of their files but the demo's."""
    found = [
        WarmUpModel(model.repo_id, model.config, model.weight_bytes, ((MXFP4, MXFP4),))
        for model in PUBLISHED
    ]
    for name, folder in BUNDLED.items():
        with open_folder(folder) as checkpoint:
            found.append(model_of(name, checkpoint))
    return found


def model_of(name: str, checkpoint: Checkpoint) -> WarmUpModel:
    """A model by its headers. Raises UnsupportedModelError if there are no kernels for it."""
    opened = plan_model(checkpoint)
    family = GPU_FAMILIES.get(opened.config.family)
    if family is None:
        raise UnsupportedModelError(
            f"{name}: there are no GPU kernels for {opened.config.family} models"
        )
    weight_bytes = weights_by_component(opened.plan.nbytes)
    return WarmUpModel(name, opened.config, weight_bytes, family.formats(opened.plan))


def warm_up(
    model: WarmUpModel, device: torch.device, *, max_context: int | None = None
) -> Iterator[WarmUp]:
    """Compile a model's kernels for every dense format that it can have there, one at a time.

    max_context: default what from_pretrained takes: the model's limit, or what fits
    """
    for dense_format in DENSE_FORMATS:
        if dense_format != AS_PUBLISHED and not (packs(model.config.family) and knows_fp8(device)):
            continue
        begin = time.perf_counter()
        try:
            context = max_context or _context_that_fits(model, device, dense_format)
            kernels = compile_kernels(
                model.config, context, device, model.formats, DENSE_FORMATS[dense_format]
            )
        except DoesNotFitError as error:
            yield WarmUp(model.name, dense_format, 0, 0, 0.0, error.message)
            return
        yield WarmUp(model.name, dense_format, context, kernels, time.perf_counter() - begin)
        torch.cuda.empty_cache()


def _context_that_fits(model: WarmUpModel, device: torch.device, dense_format: str) -> int:
    free_bytes, _ = torch.cuda.mem_get_info(device)
    family, dense = GPU_FAMILIES[model.config.family], DENSE_FORMATS[dense_format]
    return fit(
        model.config,
        dict(model.weight_bytes),
        max_context=None,
        free_bytes=free_bytes,
        device=str(device),
        more=family.more_bytes(model.config, model.formats, device, dense),
    ).max_context
