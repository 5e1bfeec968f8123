"""GPT-OSS on our kernels: its formats, its assembly, and a run on zeros that compiles them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from kernels.packed_vector import takes_digits
from kernels.persistent.pack import TiledExperts
from kernels.reference.rope_kv import rope_table
from loaders.errors import UnsupportedModelError
from loaders.names.table import LoadPlan, PlannedWeight
from loaders.weights import Relayout
from moe_runtime import tiles
from moe_runtime.cache import KVCache
from moe_runtime.config import ModelConfig
from moe_runtime.decode import DecodeStep, LayerWeights, ModelWeights, zero_weights
from moe_runtime.gpu import persistent
from moe_runtime.gpu.captured_step import CapturedStep
from moe_runtime.gpu.step_parts import address
from moe_runtime.models.reference_model import Weights
from moe_runtime.plan import PREFILL_CHUNK, MoreBytes
from moe_runtime.prefill import Prefill
from quant.formats import BF16, MXFP4, QuantFormat


def expert_formats(plan: LoadPlan) -> tuple[tuple[QuantFormat, QuantFormat], ...]:
    """The different pairs of formats in which layers have gate_up and down.

    Raises UnsupportedModelError for weights in a format for which there are no GPU kernels.
    """
    by_name = {}
    for weight in plan.weights:
        if weight.name.endswith((".gate_up", ".down")):
            if (weight.format is None and weight.dtype != "BF16") or len(weight.pieces) > 1:
                raise no_kernel(weight, "experts are run in bf16 and in the quantized formats")
            by_name[weight.name] = weight.format or BF16
        elif weight.format is not None:
            raise no_kernel(weight, "attention and head are run in bf16")
    gate_ups = [name for name in by_name if name.endswith(".gate_up")]
    pairs = {
        name: (by_name[name], by_name[name.removesuffix("gate_up") + "down"]) for name in gate_ups
    }
    for name, (gate_up, down) in pairs.items():
        if takes_digits(gate_up) != takes_digits(down):
            raise UnsupportedModelError(
                f"{name} is in {gate_up.name} and down in {down.name}: "
                "the GPU kernels want both in 4 bits or neither",
                hint="use backend='reference' (slow)",
            )
    return tuple(dict.fromkeys(pairs.values()))


def no_kernel(weight: PlannedWeight, what_is: str) -> UnsupportedModelError:
    """The error for a weight in a format that a family's kernels do not read."""
    found = weight.format.name if weight.format else weight.dtype
    return UnsupportedModelError(
        f"{weight.name}: there are no GPU kernels for it in {found}; {what_is}",
        hint="use backend='reference' (slow)",
    )


def assemble(
    config: ModelConfig,
    weights: Weights,
    max_context: int,
    device: torch.device,
    cache_dtype: torch.dtype,
) -> tuple[CapturedStep, Prefill]:
    """See gpu.families.Assemble."""
    model = ModelWeights.from_named(weights, config)
    cache = KVCache.allocate(config, max_context, device, cache_dtype)
    positions = torch.arange(max_context, device=device)
    rope = rope_table(config.rope, config.head_width, positions)
    step: CapturedStep
    if isinstance(model.layers[0].gate_up, TiledExperts):
        from moe_runtime.gpu.persistent_step import PersistentStep  # needs Gluon

        step = PersistentStep(config, model, cache, rope, max_context)
    else:
        step = DecodeStep(config, model, cache, rope, max_context)
    return step, Prefill(config, model, cache, rope, min(PREFILL_CHUNK, max_context))


def relayout(
    config: ModelConfig,
    formats: Iterable[tuple[QuantFormat, QuantFormat]],
    device: torch.device,
) -> Relayout | None:
    """See gpu.families.GpuFamily.relayout."""
    if persistent.why_not(config, formats, device) is not None:
        return None
    return persistent.relayout(config, tiles.tiled_format(formats), device)


def more_bytes(
    config: ModelConfig,
    formats: Iterable[tuple[QuantFormat, QuantFormat]],
    device: torch.device,
    dense_format: QuantFormat | None,
) -> MoreBytes:
    """See gpu.families.GpuFamily.more_bytes."""
    if persistent.why_not(config, formats, device) is not None:
        return MoreBytes()
    format = tiles.tiled_format(formats)
    return tiles.more_bytes(config, format, fp8=dense_format is not None)


def slower_because(
    config: ModelConfig,
    formats: Iterable[tuple[QuantFormat, QuantFormat]],
    device: torch.device,
) -> str | None:
    """See gpu.families.GpuFamily.slower_because."""
    reason = persistent.why_not(config, formats, device)
    return reason and f"decoding with a chain of kernels, not with one: {reason}"


def compile_kernels(
    config: ModelConfig,
    max_context: int,
    device: torch.device,
    formats: Iterable[tuple[QuantFormat, QuantFormat]] = ((MXFP4, MXFP4),),
    dense_format: QuantFormat | None = None,
    *,
    tiled: bool = True,
) -> None:
    """See gpu.families.CompileKernels.

    formats:        pairs of gate_up's and down's that the layers have
    dense_format:   of projections and head if they are packed
    tiled:          whether there is room for tiles
    Runs one sliding and one full layer of zeros with the model's own sizes, which takes K experts
    and one cache of memory; it can go on while the weights are read.
    """
    kinds = tuple(dict.fromkeys(config.layer_is_sliding))
    small = replace(config, num_layers=len(kinds), layer_is_sliding=kinds)
    cache = KVCache.allocate(small, max_context, device, torch.bfloat16, shared=True)
    rope = rope_table(config.rope, config.head_width, torch.arange(max_context, device=device))
    in_one = tiled and persistent.why_not(config, formats, device) is None
    if in_one:
        from moe_runtime.gpu import persistent_step  # needs Gluon

        format = tiles.tiled_format(formats)
        persistent_step.compile_persistent(config, format, device, fp8=dense_format is not None)
    for pair in formats:
        weights = zero_weights(small, device, pair, dense_format, tiled=in_one)
        step: CapturedStep
        if in_one:
            step = persistent_step.Draw(small, weights, max_context)
            for filtered in (False, True):
                step.sample_residual(filtered=filtered)
        else:
            step = DecodeStep(small, weights, cache, rope, max_context)
            for filtered in (False, True):
                step.step(filtered=filtered)
        prefill = Prefill(small, weights, cache, rope, min(PREFILL_CHUNK, max_context))
        for length in prefill.warm_up_lengths():
            for residual_TD in prefill.run(torch.zeros(length, dtype=torch.int64, device=device)):
                prefill.head(residual_TD[-1:])
    torch.cuda.synchronize()


def components(step: DecodeStep) -> dict[int, str]:
    """Address of a weight -> what the kernel that reads it is for."""
    found: dict[int, str] = {}
    for layer in step.weights.layers:
        parts = {
            "qkv": layer.qkv,
            "attention": layer.sinks,
            "output projection": layer.out,
            "router": layer.router,
            "experts gate_up": layer.gate_up,
            "experts down": layer.down,
        }
        found |= {address(weight): name for name, weight in parts.items()}
    found[address(step.weights.head)] = "head"
    return found


def read_bytes(plan: Mapping[str, int], step: DecodeStep, context: int) -> dict[str, int]:
    """See StepParts.read_bytes; layers are alike, and the plan knows the context."""
    return component_bytes(plan, step.weights.layers[0])


def component_bytes(plan: Mapping[str, int], layer: LayerWeights) -> dict[str, int]:
    """The plan's bytes of one token by our components; layers are alike."""
    qkv, out = layer.qkv.nbytes, layer.out.nbytes
    gate_up, down = layer.gate_up.nbytes, layer.down.nbytes
    first = plan["attention"] * qkv // (qkv + out)
    half = plan["experts"] * gate_up // (gate_up + down)
    return {
        "embedding": plan["embedding"],
        "qkv": first + plan["norms"],
        "attention": plan["cache"],
        "output projection": plan["attention"] - first,
        "router": plan["router"],
        "experts gate_up": half,
        "experts down": plan["experts"] - half,
        "head": plan["head"],
    }
