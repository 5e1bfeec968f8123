"""Choosing and making a backend: device, fit, weights. The one place that decides where to run."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from loaders.checkpoint import Checkpoint
from loaders.errors import UnsupportedModelError
from loaders.names.table import LoadPlan
from loaders.weights import Relayout, load_weights
from moe_runtime.backend import Backend
from moe_runtime.config import DecoderConfig
from moe_runtime.dense_format import (
    AS_PUBLISHED,
    DENSE_FORMATS,
    bytes_as_loaded,
    knows_fp8,
    pack,
    packed_names,
    packing_bytes,
)
from moe_runtime.errors import DoesNotFitError
from moe_runtime.gpu.families import GPU_FAMILIES
from moe_runtime.host_memory import check_host_memory
from moe_runtime.models.reference_model import Weights
from moe_runtime.models.registry import OpenedModel
from moe_runtime.plan import (
    MemoryPlan,
    MoreBytes,
    fit,
    formats_by_component,
    gb,
    weights_by_component,
)
from moe_runtime.reference_backend import ReferenceBackend
from moe_runtime.start_times import StartTimes
from moe_runtime.support import LEAST_CAPABILITY, has_kernels
from moe_runtime.triton_backend import TritonBackend, compile_kernels
from quant.formats import QuantFormat

# Backend -> the values of dtype that it takes: what it computes in.
DTYPES = {"reference": ("auto", "fp32"), "triton": ("auto", "bf16")}


def create_backend(
    checkpoint: Checkpoint,
    opened: OpenedModel,
    *,
    device: str = "auto",
    backend: str = "auto",
    dtype: str = "auto",
    dense_format: str = AS_PUBLISHED,
    max_context: int | None = None,
    activations: str = "exact",
    progress: bool = True,
    times: StartTimes | None = None,
) -> Backend:
    """Load a checkpoint's weights onto a device and make the backend that runs them.

    opened:       what plan_model found in its headers
    device:       "auto" (a GPU on which it fits, else the CPU), "cpu", "cuda" or "cuda:1"
    backend:      "auto" (triton on a GPU, reference on a CPU), "reference" or "triton"
    dtype:        "auto", "fp32" (reference) or "bf16" (triton)
    dense_format: "as-published", or "fp8": attention and head are packed, see dense_format.py
    max_context:  positions of the cache; default the model's own limit or what fits
    activations:  "exact", or "vendor": rounded to FP8 before quantized weights as in the code that
                  DeepSeek V3 was published with (reference)
    progress:     a bar while loading, and one line on stderr saying what was chosen
    times:        where to note how long compiling, reading and capturing took
    Raises CheckpointError, UnsupportedModelError, DoesNotFitError or ValueError; nothing large is
    allocated before names, shapes and the fit are known.
    """
    if backend not in ("auto", *DTYPES):
        raise ValueError(f"backend must be auto, {' or '.join(DTYPES)}, got {backend!r}")
    config = opened.config
    if backend == "triton" and not has_kernels(config.family):
        raise UnsupportedModelError(
            f"the triton backend has no kernels for {config.family} models",
            hint="use backend='reference' (--backend reference), which is slow",
        )
    if max_context is not None and not 1 <= max_context <= config.max_context:
        raise ValueError(f"max_context must be from 1 to {config.max_context}, got {max_context}")
    packed = packed_names(opened.plan, config.family, dense_format)
    nbytes = bytes_as_loaded(opened.plan, packed)
    packing = packing_bytes(opened.plan, packed)
    weight_bytes = weights_by_component(nbytes)
    times = times or StartTimes()
    with times.part("device"):  # a process's first look at a GPU sets up CUDA
        dense = DENSE_FORMATS[dense_format] if packed else None

        def more(target: torch.device, tiled: bool) -> MoreBytes:
            found = MoreBytes()
            if tiled and backend != "reference" and has_kernels(config.family):
                family = GPU_FAMILIES[config.family]
                found = family.more_bytes(config, family.formats(opened.plan), target, dense)
            return replace(found, packing=max(found.packing, packing))

        target, plan = _place(config, weight_bytes, device, backend, max_context, more, progress)
    format_names = {
        w.name: w.format.name if w.format else w.dtype.lower() for w in opened.plan.weights
    }
    format_names |= dict.fromkeys(packed, dense_format)
    plan = replace(plan, formats=formats_by_component(format_names, nbytes))
    name = backend
    if name == "auto":
        kernels = target.type == "cuda" and has_kernels(config.family)
        name = "triton" if kernels else "reference"
    if dtype not in DTYPES[name]:
        allowed = " or ".join(DTYPES[name])
        raise ValueError(f"dtype must be {allowed} for the {name} backend, got {dtype!r}")
    if name == "triton" and not _runs_kernels(target):
        raise ValueError(
            f"the triton backend needs a CUDA GPU of compute capability 8.0 or more, got {target}; "
            "use backend='reference'"
        )
    if packed and name == "triton" and not knows_fp8(target):
        raise ValueError(
            f"dense_format={dense_format!r} needs a GPU of compute capability 8.9 or more, "
            f"{target} has less; leave it out (--dense-format)"
        )
    if name == "triton" and not knows_fp8(target) and _has_dense_fp8(opened.plan):
        raise ValueError(
            "attention in FP8 needs a GPU of compute capability 8.9 or more, "
            f"{target} has less; use backend='reference'"
        )
    rounded = _rounded_inputs(opened, name, activations)
    if target.type == "cpu":
        check_host_memory(opened.plan)

    def load(relayout: Relayout | None = None) -> Weights:
        with times.part("weights"):
            weights = load_weights(
                checkpoint,
                opened.table,
                config.dims,
                config.num_layers,
                device=target,
                relayout=relayout,
                progress=progress,
            )
            return pack(weights, packed)

    if name == "reference":
        model = opened.family.reference(config, load(), target)
        model.rounded = rounded
        made: Backend = ReferenceBackend(model, plan)
    else:
        family = GPU_FAMILIES[config.family]
        formats = family.formats(opened.plan)
        if progress and (reason := family.slower_because(config, formats, target)):
            _say(reason)
        with torch.cuda.device(target):

            def load_here() -> Weights:
                tiled = plan.more.tiles > 0
                return load(family.relayout(config, formats, target) if tiled else None)

            weights = _compile_and_load(plan, target, load_here, formats, dense, times)
            with times.part("capture"):
                made = TritonBackend(config, weights, plan, target)
    if progress:
        for reason, count in Counter(opened.plan.skipped.values()).items():
            _say(f"{count} weights are left out: {reason}")
        _say(f"{name} backend on {target}, context of {plan.max_context} tokens")
    return made


def _has_dense_fp8(plan: LoadPlan) -> bool:
    matrices = (weight for weight in plan.weights if len(weight.shape) == 2)
    return any(w.format and w.format.value_dtype == torch.float8_e4m3fn for w in matrices)


def _rounded_inputs(opened: OpenedModel, backend: str, activations: str) -> frozenset[str]:
    """Weights whose inputs are rounded: those in certain formats if the vendor's way is wanted."""
    if activations == "exact":
        return frozenset()
    if activations != "vendor":
        raise ValueError(f"activations must be exact or vendor, got {activations!r}")
    if backend != "reference" or not opened.family.reference.has_vendor_rounding:
        raise ValueError(
            f"activations='vendor' is not there for {opened.config.family} in the {backend} backend"
        )
    formats = opened.family.reference.rounded_formats
    return frozenset(weight.name for weight in opened.plan.weights if weight.format in formats)


def _compile_and_load(
    plan: MemoryPlan,
    target: torch.device,
    load: Callable[[], Weights],
    formats: tuple[Any, ...],
    dense_format: QuantFormat | None = None,
    times: StartTimes | None = None,
) -> Weights:
    """Weights, and every kernel compiled: both at once where there is room for it."""
    free_bytes, _ = torch.cuda.mem_get_info(target)
    with ThreadPoolExecutor(1) as pool:
        roomy = plan.total_bytes + plan.compile_bytes <= free_bytes
        loading = pool.submit(load) if roomy else None
        with (times or StartTimes()).part("compile"):
            tiled = plan.more.tiles > 0
            compile_kernels(
                plan.config, plan.max_context, target, formats, dense_format, tiled=tiled
            )
        if loading is not None:
            return loading.result()
    torch.cuda.empty_cache()
    return load()


def _place(
    config: DecoderConfig,
    weight_bytes: dict[str, int],
    device: str,
    backend: str,
    max_context: int | None,
    more: Callable[[torch.device, bool], MoreBytes],
    progress: bool,
) -> tuple[torch.device, MemoryPlan]:
    """The device to run on and the plan that fits it."""
    if device == "auto" and torch.cuda.is_available() and backend != "reference":
        target = torch.device("cuda", torch.cuda.current_device())
        if not has_kernels(config.family):
            _say(f"running on the CPU, slowly: there are no GPU kernels for {config.family} models")
        elif _runs_kernels(target):
            try:
                return target, _fit_gpu(config, weight_bytes, target, max_context, more)
            except DoesNotFitError as error:
                _say(f"running on the CPU, slowly: {error.message}; {error.hint}")
        elif progress:
            _say(f"running on the CPU: {target} has a compute capability below 8.0")
    target = parse_device(device)
    if target.type == "cuda":
        return target, _fit_gpu(config, weight_bytes, target, max_context, more)
    return target, MemoryPlan(config, weight_bytes, max_context or config.max_context)


def parse_device(device: str) -> torch.device:
    """The device a user names; "auto" that is left over is the CPU. Raises ValueError."""
    if device in ("auto", "cpu"):
        return torch.device("cpu")
    kind, _, number = device.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(number or 0)
    if index >= count:
        raise ValueError(f"device {device!r}: this machine has {count} CUDA GPUs; use device='cpu'")
    return torch.device("cuda", index)


def _runs_kernels(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def _fit_gpu(
    config: DecoderConfig,
    weight_bytes: dict[str, int],
    target: torch.device,
    max_context: int | None,
    more: Callable[[torch.device, bool], MoreBytes],
) -> MemoryPlan:
    """more: of a device, and whether weights stand in tiles; without them if only those fit."""
    free_bytes, _ = torch.cuda.mem_get_info(target)

    def plan(tiled: bool) -> MemoryPlan:
        return fit(
            config,
            weight_bytes,
            max_context=max_context,
            free_bytes=free_bytes,
            device=str(target),
            more=more(target, tiled),
        )

    try:
        return plan(True)
    except DoesNotFitError as error:
        tiles = more(target, True).tiles
        if not tiles:
            raise
        found = plan(False)
        _say(
            f"decoding with a chain of kernels, not with one, which is slower: its tiles take "
            f"{gb(tiles)} more ({error.message}; with tiles, {error.hint})"
        )
        return found


def _say(text: str) -> None:
    print(text, file=sys.stderr)
