"""The quantization_config that makes others open the result, for each layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_runtime.conversion.layouts import COMPRESSED_TENSORS, DEEPSEEK, GPT_OSS
from moe_runtime.conversion.planning import ConversionPlan
from quant.formats import (
    BF16,
    FP8_BLOCK128,
    FP8_BLOCK128_E8M0,
    FP8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    TARGETS,
    QuantFormat,
)

_GPT_OSS_KEPT = (
    *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
    *("model.embed_tokens", "lm_head"),
)


def _float_weights(num_bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    fixed = {"type": "float", "symmetric": True, "dynamic": False}
    return {"num_bits": num_bits, "strategy": strategy, **fixed, **more}


def _float_inputs(strategy: str, **more: Any) -> dict[str, Any]:
    return {
        **{"num_bits": 8, "type": "float", "strategy": strategy},
        **{"symmetric": True, "dynamic": True, **more},
    }


# Format -> compressed-tensors' name, weights, and activations: engines with FP8 experts round the
# activations too, each token as it comes.
_SCHEMES: Mapping[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    MXFP4.name: (
        "mxfp4-pack-quantized",
        _float_weights(4, "group", group_size=32, scale_dtype="torch.uint8"),
        None,
    ),
    NVFP4.name: (
        "nvfp4-pack-quantized",
        _float_weights(4, "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"),
        None,
    ),
    MXFP8.name: (
        "mxfp8-quantized",
        _float_weights(8, "group", group_size=32, scale_dtype="torch.uint8"),
        None,
    ),
    FP8_BLOCK128.name: (
        "float-quantized",
        _float_weights(8, "block", block_structure=[128, 128]),
        _float_inputs("group", group_size=128),
    ),
    FP8_ROW.name: ("float-quantized", _float_weights(8, "channel"), _float_inputs("token")),
}


def quantization_config(plan: ConversionPlan) -> dict[str, Any] | None:
    """For config.json of the result; None when nothing in it is quantized."""
    quantized: dict[str, list[str]] = {}
    plain = []
    for _, output in plan.outputs:
        module = output.name.removesuffix(".weight")
        if output.format is not None and output.format is not BF16:
            quantized.setdefault(_known(output.format).name, []).append(module)
        elif len(output.source.shape) > 1 and output.name.endswith((".weight", "_proj")):
            plain.append(module)
    if not quantized:
        return None
    if plan.layout == GPT_OSS:
        return _gpt_oss(plan, quantized)
    if plan.layout == DEEPSEEK:
        return _deepseek(plan, plain)
    assert plan.layout == COMPRESSED_TENSORS
    return _compressed_tensors(plan, quantized, plain)


def module_patterns(chosen: Sequence[str], others: Sequence[str]) -> list[str]:
    """Regexes ("re:...") that match all of `chosen` and none of `others`; names where none does.

    Numbers of layers and experts become \\d+, first all of them, then all but the layer's.
    """
    remaining, patterns = list(chosen), []
    for first_kept in (0, 1):
        left = []
        by_pattern: dict[str, list[str]] = {}
        for name in remaining:
            by_pattern.setdefault(_generalized(name, first_kept), []).append(name)
        for pattern, names in by_pattern.items():
            compiled = re.compile(pattern)
            if pattern == re.escape(names[0]) or any(compiled.fullmatch(o) for o in others):
                left += names
            else:
                patterns.append(f"re:^{pattern}$")
        remaining = left
    return sorted(patterns) + sorted(remaining)


def _generalized(name: str, kept_numbers: int) -> str:
    pieces = []
    for piece in name.split("."):
        if piece.isdecimal() and kept_numbers == 0:
            pieces.append(r"\d+")
        else:
            kept_numbers -= piece.isdecimal()
            pieces.append(re.escape(piece))
    return r"\.".join(pieces)


def _known(format: QuantFormat) -> QuantFormat:
    """Power-of-two block scales are written as floats: the same format to a reader."""
    return FP8_BLOCK128 if format is FP8_BLOCK128_E8M0 else format


def _compressed_tensors(
    plan: ConversionPlan, quantized: Mapping[str, list[str]], plain: list[str]
) -> dict[str, Any]:
    """One group a format. That of the target has the target "Linear", by which SGLang finds
    experts; others are named, and names win over the class."""
    main = _known(TARGETS[plan.options.target]).name
    main = main if main in quantized else next(iter(quantized))
    groups: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(sorted(quantized, key=lambda name: name != main)):
        format, weights, inputs = _SCHEMES[name]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if name == main else _targets(name, quantized, plain),
            "format": format,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
        }
    if any("experts" in target for group in groups.values() for target in group["targets"]):
        # transformers takes the first group that names experts for all of them.
        groups["group_0"]["targets"] += _targets(main, quantized, plain)
    everything = [module for modules in quantized.values() for module in modules]
    ignore = module_patterns(plain, everything)
    if "lm_head" not in ignore + everything:  # tied to the embedding, and a Linear all the same
        ignore.append("lm_head")
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    }


def _targets(name: str, quantized: Mapping[str, list[str]], plain: list[str]) -> list[str]:
    others = [m for other, modules in quantized.items() if other != name for m in modules]
    return module_patterns(quantized[name], others + plain)


def _deepseek(plan: ConversionPlan, plain: list[str]) -> dict[str, Any]:
    power = {"scale_fmt": "ue8m0"} if plan.options.power_of_two_scales else {}
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        **power,
        "modules_to_not_convert": plain,
    }


def _gpt_oss(plan: ConversionPlan, quantized: Mapping[str, list[str]]) -> dict[str, Any]:
    before = plan.config.get("quantization_config")
    kept = before.get("modules_to_not_convert") if isinstance(before, Mapping) else None
    kept = kept if isinstance(kept, list) else list(_GPT_OSS_KEPT)
    if set(quantized) == {MXFP4.name}:
        return {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    format = "mixed" if len(quantized) > 1 else next(iter(quantized))
    return {"quant_method": "moe_runtime", "format": format, "modules_to_not_convert": kept}
