"""DeepSeek V4 on our kernels: formats, assembly, and a run on zeros that compiles them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.latent_cache import rope_of
from kernels.reference.rope_kv import inverse_frequencies
from loaders.names.table import LoadPlan
from moe_runtime.gpu import deepseek
from moe_runtime.gpu.compressed_cache import CompressedCache
from moe_runtime.gpu.deepseek import LayerKind, run_once, zeros_of
from moe_runtime.gpu.deepseek_v4_prefill import DeepseekV4Prefill
from moe_runtime.gpu.deepseek_v4_step import DeepseekV4Step, Ropes
from moe_runtime.gpu.deepseek_v4_weights import V4Weights
from moe_runtime.models.deepseek_v4 import check_hash_tables
from moe_runtime.models.deepseek_v4_config import DeepseekV4Config
from moe_runtime.models.reference_model import Weights
from moe_runtime.plan import PREFILL_CHUNK
from quant.formats import QuantFormat

_TABLE = "moe.hash_ids"
_BIAS = "attention.compressor.position_bias"


def layer_kinds(plan: LoadPlan) -> tuple[LayerKind, ...]:
    """The weights outside the layers, then the different kinds of layers, hashed ones first.

    Raises UnsupportedModelError for a weight in a format that the kernels do not read.
    """
    outside, *kinds = deepseek.layer_kinds(plan)
    return outside, *sorted(kinds, key=lambda kind: not _is_hashed(kind))


def assemble(
    config: DeepseekV4Config,
    weights: Weights,
    max_context: int,
    device: torch.device,
    cache_dtype: torch.dtype,
) -> tuple[DeepseekV4Step, DeepseekV4Prefill]:
    """See gpu.families.Assemble."""
    check_hash_tables(config, weights)
    cache = CompressedCache.allocate(config, max_context, device, cache_dtype)
    return _with_cache(config, V4Weights.from_named(weights, config), cache)


def compile_kernels(
    config: DeepseekV4Config,
    max_context: int,
    device: torch.device,
    formats: tuple[LayerKind, ...],
    dense_format: QuantFormat | None = None,
) -> None:
    """See gpu.families.CompileKernels.

    formats: of layer_kinds
    Runs one layer of zeros of each kind with the model's own sizes; of the experts there are as
    many as a token takes.
    """
    assert dense_format is None, dense_format
    outside, *kinds = formats
    small = replace(
        config,
        num_layers=len(kinds),
        num_hash_layers=sum(_is_hashed(kind) for kind in kinds),
        compress_ratios=tuple(_ratio(kind) for kind in kinds),
    )
    weights = {kind.name: zeros_of(kind, config, device) for kind in outside}
    if isinstance(weights["head"], Tensor):  # the largest zeros are there once
        weights["head"] = weights["embedding"]
    for layer, kind in enumerate(kinds):
        weights |= {f"layers.{layer}.{w.name}": zeros_of(w, config, device) for w in kind}
    cache = CompressedCache.allocate(small, max_context, device, torch.bfloat16)
    step, prefill = _with_cache(small, V4Weights.from_named(weights, small), cache)
    run_once(step, prefill, device)


def _with_cache(
    config: DeepseekV4Config, weights: V4Weights, cache: CompressedCache
) -> tuple[DeepseekV4Step, DeepseekV4Prefill]:
    positions = torch.arange(cache.max_context, device=weights.embedding.device)
    window, compressed = (
        rope_of(inverse_frequencies(rope, config.rotary_width), 1.0, positions)
        for rope in (config.window_rope, config.compressed_rope)
    )
    ropes = Ropes(window, compressed)
    step = DeepseekV4Step(config, weights, cache, ropes)
    chunk = min(PREFILL_CHUNK, cache.max_context)
    return step, DeepseekV4Prefill(config, weights, cache, ropes, chunk)


def _is_hashed(kind: LayerKind) -> bool:
    return any(weight.name == _TABLE for weight in kind)


def _ratio(kind: LayerKind) -> int:
    """The ratio of a layer, from the shape of its compressor's bias; 0 without a compressor."""
    return next((weight.shape[0] for weight in kind if weight.name == _BIAS), 0)
