"""A tiny random checkpoint with the names of Qwen3-MoE, in the forms that conversions start from.

Not to be run: it has what `convert` looks at, side files included.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracles.tiny_gpt_oss import write_json, write_shards

D, F, EXPERTS, LAYERS, VOCAB = 128, 64, 4, 2, 64
CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# Tiny\n"


def tiny_tensors(
    *, d: int = D, f: int = F, seed: int = 0, layers: int = LAYERS
) -> dict[str, Tensor]:
    """All tensors in bf16, experts one by one."""
    generator = torch.Generator().manual_seed(seed)

    def r(*shape: int, std: float = 0.05) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).bfloat16()

    tensors = {
        "model.embed_tokens.weight": r(VOCAB, d),
        "model.norm.weight": 1 + r(d),
        "lm_head.weight": r(VOCAB, d),
    }
    for i in range(layers):
        layer = f"model.layers.{i}."
        tensors[layer + "input_layernorm.weight"] = 1 + r(d)
        tensors[layer + "self_attn.q_proj.weight"] = r(d, d)
        tensors[layer + "self_attn.q_proj.bias"] = r(d)
        tensors[layer + "self_attn.o_proj.weight"] = r(d, d)
        tensors[layer + "mlp.gate.weight"] = r(EXPERTS, d)
        tensors[layer + "mlp.shared_expert.up_proj.weight"] = r(f, d)
        for e in range(EXPERTS):
            expert = f"{layer}mlp.experts.{e}."
            # of different sizes, so that a shared tensor scale is not that of one alone
            tensors[expert + "gate_proj.weight"] = r(f, d)
            tensors[expert + "up_proj.weight"] = r(f, d, std=0.2)
            tensors[expert + "down_proj.weight"] = r(d, f)
    return tensors


def config(*, d: int = D, f: int = F, layers: int = LAYERS, **more: Any) -> dict[str, Any]:
    """config.json of these tensors."""
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": d,
        "moe_intermediate_size": f,
        "num_hidden_layers": layers,
        "num_experts": EXPERTS,
        **more,
    }


def write_tiny_moe(
    folder: Path,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    shards: int = 3,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Write a checkpoint with tokenizer, card and a pickle; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    written = dict(tiny_tensors() if tensors is None else tensors)
    write_shards(folder, written, shards)
    write_json(folder / "config.json", config() if settings is None else dict(settings))
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 3]})
    write_json(folder / "tokenizer.json", {"version": "1.0", "model": {"type": "BPE"}})
    (folder / "README.md").write_text(CARD)
    (folder / "training_args.bin").write_bytes(b"pickle")
    return written


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with stacked experts: [E, 2F, D], gate rows first, and [E, D, F]."""
    found = {name: t for name, t in tensors.items() if ".experts." not in name}
    layers = {name.split(".")[2] for name in tensors if ".experts." in name}
    for i in sorted(layers):
        prefix = f"model.layers.{i}.mlp.experts."
        every = range(EXPERTS)
        found[prefix + "gate_up_proj"] = torch.stack(
            [
                torch.cat([tensors[f"{prefix}{e}.{m}_proj.weight"] for m in ("gate", "up")])
                for e in every
            ]
        )
        found[prefix + "down_proj"] = torch.stack(
            [tensors[f"{prefix}{e}.down_proj.weight"] for e in every]
        )
    return found
