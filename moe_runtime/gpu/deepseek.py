"""DeepSeek V2 to V3.2 on our kernels: formats, assembly, and a run on zeros that compiles them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.latent_cache import rope_of
from kernels.reference.rope_kv import inverse_frequencies
from loaders.errors import UnsupportedModelError
from loaders.logical_schemes import scale_shape
from loaders.names.table import LoadPlan, PlannedWeight
from moe_runtime.config import DecoderConfig
from moe_runtime.gpu.captured_step import CapturedStep, Prompts
from moe_runtime.gpu.deepseek_prefill import DeepseekPrefill
from moe_runtime.gpu.deepseek_step import DeepseekStep
from moe_runtime.gpu.deepseek_weights import ModelWeights
from moe_runtime.gpu.gpt_oss import no_kernel
from moe_runtime.gpu.latent_cache import LatentCache
from moe_runtime.models.deepseek_config import DeepseekConfig
from moe_runtime.models.reference_model import Weights
from moe_runtime.plan import PREFILL_CHUNK
from quant.formats import BF16, FP8_BLOCK128, FP8_BLOCK128_E8M0, QuantFormat
from quant.tensor import QuantTensor

_DENSE_FORMATS = (FP8_BLOCK128, FP8_BLOCK128_E8M0)
_DTYPES = {
    "BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32,
}  # fmt: skip
_STEP = 16  # weights that the expert kernels load at once


@dataclass(frozen=True)
class WeightKind:
    """One weight's shape and form; of a layer by its name without the layer."""

    name: str
    shape: tuple[int, ...]
    format: QuantFormat | None
    dtype: str


LayerKind = tuple[WeightKind, ...]


def layer_kinds(plan: LoadPlan) -> tuple[LayerKind, ...]:
    """The weights outside the layers, then the different kinds of layers, dense ones first.

    Raises UnsupportedModelError for a weight in a format that the kernels do not read.
    """
    layers: dict[str, list[WeightKind]] = {}
    for weight in plan.weights:
        _check(weight)
        in_layer = weight.name.startswith("layers.")
        layer, short = weight.name.split(".", 2)[1:] if in_layer else ("", weight.name)
        kind = WeightKind(short, weight.shape, weight.format, weight.dtype)
        layers.setdefault(layer, []).append(kind)
    outside = tuple(layers.pop(""))
    kinds = dict.fromkeys(tuple(kinds) for kinds in layers.values())
    return outside, *sorted(kinds, key=_has_router)


def _has_router(kind: LayerKind) -> bool:
    return any(weight.name == "moe.router" for weight in kind)


def _check(weight: PlannedWeight) -> None:
    is_expert = weight.name.endswith((".gate_up", ".down")) and len(weight.shape) == 3
    if len(weight.pieces) > 1:
        raise no_kernel(weight, "blocks of its scales do not line up with its rows")
    if is_expert and weight.format is None and weight.dtype != "BF16":
        raise no_kernel(weight, "experts are run in bf16 and in the quantized formats")
    if not is_expert and weight.format not in (None, *_DENSE_FORMATS):
        raise no_kernel(weight, "dense weights are run in plain floats and in FP8 blocks")
    if is_expert and weight.shape[-1] % _STEP:
        raise UnsupportedModelError(
            f"{weight.name}: the GPU kernels take experts of a multiple of {_STEP} columns, "
            f"this one has {weight.shape[-1]}",
            hint="use backend='reference' (slow)",
        )


def assemble(
    config: DeepseekConfig,
    weights: Weights,
    max_context: int,
    device: torch.device,
    cache_dtype: torch.dtype,
) -> tuple[DeepseekStep, DeepseekPrefill]:
    """See gpu.families.Assemble."""
    model = ModelWeights.from_named(weights, config)
    return _with_cache(
        config, model, LatentCache.allocate(config, max_context, device, cache_dtype)
    )


def _with_cache(
    config: DeepseekConfig, model: ModelWeights, cache: LatentCache
) -> tuple[DeepseekStep, DeepseekPrefill]:
    frequencies = inverse_frequencies(config.rope, config.rotary_width)
    positions = torch.arange(cache.max_context, device=model.embedding.device)
    rope = rope_of(frequencies, config.rope_growth, positions)
    step = DeepseekStep(config, model, cache, rope)
    chunk = min(PREFILL_CHUNK, cache.max_context)
    return step, DeepseekPrefill(config, model, cache, rope, chunk)


def compile_kernels(
    config: DeepseekConfig,
    max_context: int,
    device: torch.device,
    formats: tuple[LayerKind, ...],
    dense_format: QuantFormat | None = None,
) -> None:
    """See gpu.families.CompileKernels.

    formats: of layer_kinds
    Runs one layer of zeros of each kind with the model's own sizes, which share a cache; of the
    experts there are as many as a token takes.
    """
    assert dense_format is None, dense_format
    outside, *kinds = formats
    small = replace(
        config,
        num_layers=len(kinds),
        num_dense_layers=sum(not _has_router(kind) for kind in kinds),
    )
    weights = {kind.name: zeros_of(kind, config, device) for kind in outside}
    if isinstance(weights["head"], Tensor):  # the largest zeros are there once
        weights["head"] = weights["embedding"]
    for layer, kind in enumerate(kinds):
        weights |= {f"layers.{layer}.{w.name}": zeros_of(w, config, device) for w in kind}
    model = ModelWeights.from_named(weights, small)
    cache = LatentCache.allocate(small, max_context, device, torch.bfloat16, shared=True)
    step, prefill = _with_cache(small, model, cache)
    run_once(step, prefill, device)


def run_once(step: CapturedStep, prefill: Prompts, device: torch.device) -> None:
    """Launch every kernel that a request can need."""
    for filtered in (False, True):
        step.step(filtered=filtered)
    for length in prefill.warm_up_lengths():
        for residual_TD in prefill.run(torch.zeros(length, dtype=torch.int64, device=device)):
            prefill.head(residual_TD[-1:])
    if device.type == "cuda":
        torch.cuda.synchronize()


def zeros_of(kind: WeightKind, config: DecoderConfig, device: torch.device) -> Tensor | QuantTensor:
    """A weight of zeros; of stacked experts those that a router of zeros takes."""
    shape = kind.shape
    if len(shape) == 3:
        shape = (min(shape[0], config.experts_per_token), *shape[1:])
    format = kind.format or (BF16 if len(shape) == 3 else None)
    if format is None:
        return torch.zeros(shape, dtype=_DTYPES[kind.dtype], device=device)
    packed = (*shape[:-1], shape[-1] // format.values_per_byte)
    values = torch.zeros(packed, dtype=format.value_dtype, device=device)
    scales = whole = None
    if format.scale_dtype is not None:
        scales = torch.zeros(scale_shape(format, shape), dtype=format.scale_dtype, device=device)
    if format.tensor_scale:
        whole = torch.ones((), device=device)
    return QuantTensor(values, scales, format, kind.shape, whole)
