"""Tensors and config.json of DeepSeek models in the published format, for write_random_checkpoint.

A tensor is (name, dtype, shape, how its numbers are drawn). MTP layers are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Tensors = list[tuple[str, str, tuple[int, ...], str]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model."""

    family: str
    layers: int
    dense_layers: int
    width: int
    dense_width: int
    heads: int
    query_rank: int | None
    experts: int
    experts_per_token: int
    expert_width: int
    shared: int
    vocab: int
    format: str  # of the published weights
    config: dict[str, Any]  # what else config.json says


LATENT, ROTARY, NOPE, VALUE = 512, 64, 128, 128
_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
_V2_LITE = {
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
_V3 = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
_INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
_LARGE = (61, 3, 7168, 18432, 128, 1536, 256, 8, 2048, 1, 129280, "fp8")
SHAPES = {
    "v2-lite": Shape(
        "deepseek_v2", 27, 1, 2048, 10944, 16, None, 64, 6, 1408, 2, 102400, "bf16", _V2_LITE
    ),
    "v3": Shape("deepseek_v3", *_LARGE, _V3),
    "v32": Shape("deepseek_v32", *_LARGE, _V3 | _INDEXER),
}


def tensors(shape: Shape, layers: int, format: str) -> Tensors:
    """All tensors of a model of this shape; format: "bf16", "fp8" (128x128 blocks, fp32 scales)."""
    s = shape
    found: Tensors = [
        ("model.embed_tokens.weight", "BF16", (s.vocab, s.width), "weight"),
        ("lm_head.weight", "BF16", (s.vocab, s.width), "weight"),
        ("model.norm.weight", "BF16", (s.width,), "norm"),
    ]
    for i in range(layers):
        layer = f"model.layers.{i}."
        found += [
            (layer + "input_layernorm.weight", "BF16", (s.width,), "norm"),
            (layer + "post_attention_layernorm.weight", "BF16", (s.width,), "norm"),
            (layer + "self_attn.kv_a_layernorm.weight", "BF16", (LATENT,), "norm"),
        ]
        for name, rows, columns in _matrices(s, i):
            found += _matrix(layer + name, rows, columns, format)
        if s.query_rank is not None:
            norm = layer + "self_attn.q_a_layernorm.weight"
            found.append((norm, "BF16", (s.query_rank,), "norm"))
        if s.family == "deepseek_v32":
            index = layer + "self_attn.indexer."
            found.append((index + "weights_proj.weight", "BF16", (64, s.width), "weight"))
            found.append((index + "k_norm.weight", "F32", (128,), "norm"))
            found.append((index + "k_norm.bias", "F32", (128,), "small"))
        if i >= s.dense_layers:
            found.append((layer + "mlp.gate.weight", "BF16", (s.experts, s.width), "weight"))
            if s.family != "deepseek_v2":
                bias = layer + "mlp.gate.e_score_correction_bias"
                found.append((bias, "F32", (s.experts,), "small"))
    return found


def _matrices(s: Shape, layer: int) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of a layer's projections that FP8 checkpoints quantize."""
    attention = "self_attn."
    query_rows = s.heads * (NOPE + ROTARY)
    if s.query_rank is None:
        yield attention + "q_proj", query_rows, s.width
    else:
        yield attention + "q_a_proj", s.query_rank, s.width
        yield attention + "q_b_proj", query_rows, s.query_rank
    yield attention + "kv_a_proj_with_mqa", LATENT + ROTARY, s.width
    yield attention + "kv_b_proj", s.heads * (NOPE + VALUE), LATENT
    yield attention + "o_proj", s.width, s.heads * VALUE
    if s.family == "deepseek_v32":
        assert s.query_rank is not None
        yield attention + "indexer.wq_b", 64 * 128, s.query_rank
        yield attention + "indexer.wk", 128, s.width
    if layer < s.dense_layers:
        gated = [("mlp.", s.dense_width)]
    else:
        gated = [(f"mlp.experts.{e}.", s.expert_width) for e in range(s.experts)]
        gated.append(("mlp.shared_experts.", s.shared * s.expert_width))
    for name, width in gated:
        yield name + "gate_proj", width, s.width
        yield name + "up_proj", width, s.width
        yield name + "down_proj", s.width, width


def _matrix(name: str, rows: int, columns: int, format: str) -> Tensors:
    if format == "bf16":
        return [(name + ".weight", "BF16", (rows, columns), "weight")]
    blocks = (-(-rows // 128), -(-columns // 128))
    return [
        (name + ".weight", "F8_E4M3", (rows, columns), "e4m3"),
        (name + ".weight_scale_inv", "F32", blocks, "block scales"),
    ]


def config(shape: Shape, layers: int, format: str) -> dict[str, Any]:
    """config.json with the published keys."""
    s = shape
    name = {"deepseek_v2": "V2", "deepseek_v3": "V3", "deepseek_v32": "V32"}[s.family]
    found = {
        "architectures": [f"Deepseek{name}ForCausalLM"],
        "model_type": s.family,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": min(s.dense_layers, layers),
        "hidden_act": "silu",
        "hidden_size": s.width,
        "intermediate_size": s.dense_width,
        "kv_lora_rank": LATENT,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": s.expert_width,
        "moe_layer_freq": 1,
        "n_routed_experts": s.experts,
        "n_shared_experts": s.shared,
        "num_attention_heads": s.heads,
        "num_experts_per_tok": s.experts_per_token,
        "num_hidden_layers": layers,
        "num_key_value_heads": s.heads,
        "q_lora_rank": s.query_rank,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROTARY,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "v_head_dim": VALUE,
        "vocab_size": s.vocab,
    } | s.config
    if format == "fp8":
        found["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    return found
