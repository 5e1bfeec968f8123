"""Tiny random GPT-OSS checkpoints in the published format and in the vendor's original one.

Scaled so that mistakes show: routing is not uniform, the clamps are reached, sinks matter. The same
arguments give the same weights in both layouts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
MIN_TOKENIZER_VOCAB = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

_ORIGINAL_NAMES = {  # the vendor's part of a name for ours, in a layer
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "self_attn.sinks": "attn.sinks",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
    "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}


def write_tiny_gpt_oss(
    folder: Path | str,
    *,
    layout: str = "huggingface",
    shards: int = 2,
    seed: int = 0,
    layers: int = 4,
    d: int = 64,
    f: int = 96,
    heads: int = 8,
    kv: int = 2,
    hd: int = 16,
    experts: int = 8,
    topk: int = 4,
    window: int = 8,
    vocab: int = 256,
    tensors_only: bool = False,
    tokenizer: bool = False,
) -> dict[str, Tensor]:
    """Write a checkpoint into `folder` (made if needed); returns its tensors by name in the file.

    layout:       "huggingface", or "original", which goes into folder/original
    tensors_only: no config.json and no tokenizer
    tokenizer:    also a byte-level tokenizer (id = byte, then SPECIAL_TOKENS) and a chat template;
                  needs vocab >= MIN_TOKENIZER_VOCAB
    """
    folder = Path(folder)
    weights = folder / "original" if layout == "original" else folder
    weights.mkdir(parents=True, exist_ok=True)
    tensors = tiny_tensors(seed, layers, d, f, heads, kv, hd, experts, vocab)
    if layout == "original":
        tensors = to_original(tensors, layers)
    make_config = original_config if layout == "original" else hf_config
    config = make_config(
        layers=layers, d=d, f=f, heads=heads, kv=kv, hd=hd, experts=experts, topk=topk,
        window=window, vocab=vocab,
    )  # fmt: skip
    write_shards(weights, tensors, shards, layout=layout)
    if tensors_only:
        return tensors
    if tokenizer:
        write_tokenizer(folder, vocab)
        stops = [256 + SPECIAL_TOKENS.index(t) for t in ("<|return|>", "<|endoftext|>", "<|call|>")]
        write_json(folder / "generation_config.json", {"eos_token_id": stops, "do_sample": True})
    write_json(weights / "config.json", config)
    return tensors


def tiny_tensors(
    seed: int, layers: int, d: int, f: int, heads: int, kv: int, hd: int, experts: int, vocab: int
) -> dict[str, Tensor]:
    """Random tensors by their names in the Hugging Face layout."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=g) * std).bfloat16()

    def u8(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=torch.uint8)

    t = {
        "model.embed_tokens.weight": r(vocab, d, std=1.0),
        "lm_head.weight": r(vocab, d, std=0.1),
        "model.norm.weight": 1 + r(d, std=0.1),
    }
    for i in range(layers):
        p = f"model.layers.{i}."
        t[p + "input_layernorm.weight"] = 1 + r(d, std=0.1)
        t[p + "post_attention_layernorm.weight"] = 1 + r(d, std=0.1)
        widths = (("q", heads * hd, d), ("k", kv * hd, d), ("v", kv * hd, d), ("o", d, heads * hd))
        for n, rows, columns in widths:
            t[p + f"self_attn.{n}_proj.weight"] = r(rows, columns, std=0.2)
            t[p + f"self_attn.{n}_proj.bias"] = r(rows, std=0.5)
        t[p + "self_attn.sinks"] = r(heads, std=1.5)
        t[p + "mlp.router.weight"] = r(experts, d, std=0.3)
        t[p + "mlp.router.bias"] = r(experts, std=0.5)
        for n, rows, columns in (("gate_up_proj", 2 * f, d), ("down_proj", d, f)):
            e = p + "mlp.experts." + n
            # Every byte is two legal codes; scales of 2^-5 to 2^-1 reach the clamp.
            t[e + "_blocks"] = u8(0, 256, experts, rows, columns // 32, 16)
            t[e + "_scales"] = u8(122, 127, experts, rows, columns // 32)
            t[e + "_bias"] = r(experts, rows, std=0.5)
    return t


def to_original(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The same weights by the vendor's names, with q, k and v fused by rows."""
    t = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "unembedding.weight": tensors["lm_head.weight"],
        "norm.scale": tensors["model.norm.weight"],
    }
    for i in range(layers):
        ours, theirs = f"model.layers.{i}.", f"block.{i}."
        for name, original in _ORIGINAL_NAMES.items():
            t[theirs + original] = tensors[ours + name]
        for kind in ("weight", "bias"):
            parts = [tensors[f"{ours}self_attn.{n}_proj.{kind}"] for n in "qkv"]
            t[f"{theirs}attn.qkv.{kind}"] = torch.cat(parts)
    return t


def write_shards(
    folder: Path, tensors: dict[str, Tensor], shards: int, *, layout: str = "huggingface"
) -> None:
    """Tensors dealt to shards in turn, named as published; an index in the Hugging Face layout."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for s in range(shards):
        # Published numbering: gpt-oss counts from 0 in one layout, from 1 in the other.
        file = (
            f"model--{s + 1:05d}-of-{shards:05d}.safetensors"
            if layout == "original"
            else f"model-{s:05d}-of-{shards:05d}.safetensors"
        )
        part = {name: tensors[name].contiguous() for name in names[s::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if layout != "original":
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: Path, vocab: int) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja: bytes and special tokens."""
    if vocab < MIN_TOKENIZER_VOCAB:
        raise ValueError(f"a tokenizer needs vocab >= {MIN_TOKENIZER_VOCAB}, got {vocab}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = [
        {"id": 256 + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, token in enumerate(SPECIAL_TOKENS)
    ]  # fmt: skip
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "vocab": {character: byte for byte, character in enumerate(_byte_alphabet())},
        "merges": [],
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": model,
    }
    write_json(folder / "tokenizer.json", tokenizer)
    named = {"eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", named)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(path: Path, value: Any) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value))


def _byte_alphabet() -> list[str]:
    """The character of each byte in byte-level tokens (the GPT-2 convention)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def hf_config(
    *, layers: int, d: int, f: int, heads: int, kv: int, hd: int, experts: int, topk: int,
    window: int, vocab: int,
) -> dict[str, Any]:  # fmt: skip
    """config.json in the Hugging Face layout, with the keys of the published one."""
    kinds = ["sliding_attention", "full_attention"] * layers
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "head_dim": hd,
        "hidden_act": "silu",
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "layer_types": kinds[:layers],
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "num_local_experts": experts,
        "num_experts_per_tok": topk,
        "experts_per_token": topk,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "initial_context_length": 4096,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": window,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }


def original_config(
    *, layers: int, d: int, f: int, heads: int, kv: int, hd: int, experts: int, topk: int,
    window: int, vocab: int,
) -> dict[str, Any]:  # fmt: skip
    """The vendor's original/config.json."""
    return {
        "num_hidden_layers": layers,
        "num_experts": experts,
        "experts_per_token": topk,
        "vocab_size": vocab,
        "hidden_size": d,
        "intermediate_size": f,
        "swiglu_limit": 7.0,
        "head_dim": hd,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "sliding_window": window,
        "initial_context_length": 4096,
        "rope_theta": 150000,
        "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1,
        "rope_ntk_beta": 32,
    }
