"""Tensors and config.json of DeepSeek V4 in the published format, for write_random_checkpoint.

A tensor is (name, dtype, shape, how its numbers are drawn), by the vendor's names: FP4 experts, FP8
in blocks, both with E8M0 scales. MTP blocks are left out. A model with fewer layers has ratios and
hash layers in the published proportion, at least one of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Tensors = list[tuple[str, str, tuple[int, ...], str]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model."""

    layers: int
    first_ratios: tuple[int, int]  # of the first two layers; then 4 and 128 in turn
    width: int
    heads: int
    query_rank: int
    output_groups: int
    index_top_k: int
    experts: int
    expert_width: int
    routed_scale: float


HEAD, ROTARY, OUTPUT_RANK, INDEX_HEADS, INDEX_HEAD = 512, 64, 1024, 64, 128
HASH_LAYERS, EXPERTS_PER_TOKEN, STREAMS, VOCAB = 3, 6, 4, 129280
SHAPES = {
    "v4-flash": Shape(43, (0, 0), 4096, 64, 1024, 8, 512, 256, 2048, 1.5),
    "v4-pro": Shape(61, (128, 128), 7168, 128, 1536, 16, 1024, 384, 3072, 2.5),
}


def ratios(shape: Shape, layers: int) -> tuple[int, ...]:
    """The compression ratio of each layer."""
    first = min(layers, max(1, round(2 * layers / shape.layers)))
    return (*shape.first_ratios[:first], *((4, 128)[i % 2] for i in range(layers - first)))


def hash_layers(shape: Shape, layers: int) -> int:
    """How many of the first layers choose experts by a token's id."""
    return min(layers, max(1, round(HASH_LAYERS * layers / shape.layers)))


def tensors(shape: Shape, layers: int) -> Tensors:
    """All tensors of a model of this shape."""
    s = shape
    found: Tensors = [
        ("embed.weight", "BF16", (VOCAB, s.width), "weight"),
        ("head.weight", "BF16", (VOCAB, s.width), "weight"),
        ("norm.weight", "BF16", (s.width,), "norm"),
        *_hyper("hc_head", s, STREAMS, 1),
    ]
    for i, ratio in enumerate(ratios(s, layers)):
        layer = f"layers.{i}."
        for norm in ("attn_norm", "ffn_norm"):
            found.append((f"{layer}{norm}.weight", "BF16", (s.width,), "norm"))
        for block in ("hc_attn", "hc_ffn"):
            found += _hyper(layer + block, s, STREAMS * (2 + STREAMS), 3)
        found += _attention(layer + "attn.", s, ratio)
        found += _experts(layer + "ffn.", s, i < hash_layers(s, layers))
    return found


def _hyper(name: str, s: Shape, rows: int, scales: int) -> Tensors:
    return [
        (name + "_fn", "F32", (rows, STREAMS * s.width), "weight"),
        (name + "_base", "F32", (rows,), "small"),
        (name + "_scale", "F32", (scales,), "norm"),
    ]


def _attention(name: str, s: Shape, ratio: int) -> Tensors:
    groups = s.output_groups * OUTPUT_RANK
    found: Tensors = [
        *_fp8(name + "wq_a", s.query_rank, s.width),
        *_fp8(name + "wq_b", s.heads * HEAD, s.query_rank),
        *_fp8(name + "wkv", HEAD, s.width),
        *_fp8(name + "wo_a", groups, s.heads * HEAD // s.output_groups),
        *_fp8(name + "wo_b", s.width, groups),
        (name + "q_norm.weight", "BF16", (s.query_rank,), "norm"),
        (name + "kv_norm.weight", "BF16", (HEAD,), "norm"),
        (name + "attn_sink", "F32", (s.heads,), "small"),
    ]
    if ratio:
        found += _compressor(name + "compressor.", s, ratio, HEAD)
    if ratio == 4:
        index = name + "indexer."
        found += _fp8(index + "wq_b", INDEX_HEADS * INDEX_HEAD, s.query_rank)
        found.append((index + "weights_proj.weight", "BF16", (INDEX_HEADS, s.width), "weight"))
        found += _compressor(index + "compressor.", s, ratio, INDEX_HEAD)
    return found


def _compressor(name: str, s: Shape, ratio: int, width: int) -> Tensors:
    wide = 2 * width if ratio == 4 else width
    return [
        (name + "wkv.weight", "BF16", (wide, s.width), "weight"),
        (name + "wgate.weight", "BF16", (wide, s.width), "weight"),
        (name + "ape", "F32", (ratio, wide), "small"),
        (name + "norm.weight", "BF16", (width,), "norm"),
    ]


def _experts(name: str, s: Shape, hashed: bool) -> Tensors:
    found: Tensors = [(name + "gate.weight", "BF16", (s.experts, s.width), "weight")]
    if hashed:
        found.append((name + "gate.tid2eid", "I64", (VOCAB, EXPERTS_PER_TOKEN), "experts"))
    else:
        found.append((name + "gate.bias", "F32", (s.experts,), "small"))
    for e in range(s.experts):
        for part, rows, columns in _gated(s):
            weight = f"{name}experts.{e}.{part}"
            found.append((weight + ".weight", "I8", (rows, columns // 2), "codes"))
            found.append((weight + ".scale", "F8_E8M0", (rows, columns // 32), "scales"))
    for part, rows, columns in _gated(s):
        found += _fp8(f"{name}shared_experts.{part}", rows, columns)
    return found


def _gated(s: Shape) -> Iterator[tuple[str, int, int]]:
    yield "w1", s.expert_width, s.width
    yield "w2", s.width, s.expert_width
    yield "w3", s.expert_width, s.width


def _fp8(name: str, rows: int, columns: int) -> Tensors:
    blocks = (-(-rows // 128), -(-columns // 128))
    return [
        (name + ".weight", "F8_E4M3", (rows, columns), "e4m3"),
        (name + ".scale", "F8_E8M0", blocks, "e4m3 scales"),
    ]


def config(shape: Shape, layers: int) -> dict[str, Any]:
    """config.json with the published keys."""
    s = shape
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "compress_ratios": list(ratios(s, layers)),
        "compress_rope_theta": 160000,
        "expert_dtype": "fp4",
        "hc_eps": 1e-6,
        "hc_mult": STREAMS,
        "hc_sinkhorn_iters": 20,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "hidden_size": s.width,
        "index_head_dim": INDEX_HEAD,
        "index_n_heads": INDEX_HEADS,
        "index_topk": s.index_top_k,
        "max_position_embeddings": 1048576,
        "moe_intermediate_size": s.expert_width,
        "n_routed_experts": s.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": s.heads,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "num_hash_layers": hash_layers(s, layers),
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 0,
        "o_groups": s.output_groups,
        "o_lora_rank": OUTPUT_RANK,
        "q_lora_rank": s.query_rank,
        "qk_rope_head_dim": ROTARY,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": s.routed_scale,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "vocab_size": VOCAB,
    }
