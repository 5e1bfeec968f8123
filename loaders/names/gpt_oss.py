"""GPT-OSS: our names of its weights, in the Hugging Face layout and in the vendor's original one.

D model width, H query heads, Q = H * C, KV = G * C, E experts, F expert width, V vocabulary.
Rows of gate_up alternate gate, up in both layouts; q, k and v follow each other. Experts, attention
and head may be in any format that loaders/logical.py reads; all else is plain floats.
"""

from __future__ import annotations

from loaders.names.table import NameTable, dense, matrix, rows

_HF = "model.layers.{i}."
_HF_ATTENTION = _HF + "self_attn."
_HF_EXPERTS = _HF + "mlp.experts."

HUGGINGFACE = NameTable(
    {
        "embedding": dense("model.embed_tokens.weight", "V D"),
        "layers.{i}.attention.norm": dense(_HF + "input_layernorm.weight", "D"),
        "layers.{i}.attention.qkv": rows(
            (_HF_ATTENTION + "q_proj.weight", "Q D"),
            (_HF_ATTENTION + "k_proj.weight", "KV D"),
            (_HF_ATTENTION + "v_proj.weight", "KV D"),
        ),
        "layers.{i}.attention.qkv_bias": rows(
            (_HF_ATTENTION + "q_proj.bias", "Q"),
            (_HF_ATTENTION + "k_proj.bias", "KV"),
            (_HF_ATTENTION + "v_proj.bias", "KV"),
        ),
        "layers.{i}.attention.sinks": dense(_HF_ATTENTION + "sinks", "H"),
        "layers.{i}.attention.out": matrix(_HF_ATTENTION + "o_proj.weight", "D Q"),
        "layers.{i}.attention.out_bias": dense(_HF_ATTENTION + "o_proj.bias", "D"),
        "layers.{i}.moe.norm": dense(_HF + "post_attention_layernorm.weight", "D"),
        "layers.{i}.moe.router": dense(_HF + "mlp.router.weight", "E D"),
        "layers.{i}.moe.router_bias": dense(_HF + "mlp.router.bias", "E"),
        "layers.{i}.moe.gate_up": matrix(_HF_EXPERTS + "gate_up_proj", "E 2F D"),
        "layers.{i}.moe.gate_up_bias": dense(_HF_EXPERTS + "gate_up_proj_bias", "E 2F"),
        "layers.{i}.moe.down": matrix(_HF_EXPERTS + "down_proj", "E D F"),
        "layers.{i}.moe.down_bias": dense(_HF_EXPERTS + "down_proj_bias", "E D"),
        "final_norm": dense("model.norm.weight", "D"),
        "head": matrix("lm_head.weight", "V D"),
    }
)

_ATTENTION = "block.{i}.attn."
_MLP = "block.{i}.mlp."

ORIGINAL = NameTable(
    {
        "embedding": dense("embedding.weight", "V D"),
        "layers.{i}.attention.norm": dense(_ATTENTION + "norm.scale", "D"),
        "layers.{i}.attention.qkv": matrix(_ATTENTION + "qkv.weight", "QKV D"),
        "layers.{i}.attention.qkv_bias": dense(_ATTENTION + "qkv.bias", "QKV"),
        "layers.{i}.attention.sinks": dense(_ATTENTION + "sinks", "H"),
        "layers.{i}.attention.out": matrix(_ATTENTION + "out.weight", "D Q"),
        "layers.{i}.attention.out_bias": dense(_ATTENTION + "out.bias", "D"),
        "layers.{i}.moe.norm": dense(_MLP + "norm.scale", "D"),
        "layers.{i}.moe.router": dense(_MLP + "gate.weight", "E D"),
        "layers.{i}.moe.router_bias": dense(_MLP + "gate.bias", "E"),
        "layers.{i}.moe.gate_up": matrix(_MLP + "mlp1_weight", "E 2F D"),
        "layers.{i}.moe.gate_up_bias": dense(_MLP + "mlp1_bias", "E 2F"),
        "layers.{i}.moe.down": matrix(_MLP + "mlp2_weight", "E D F"),
        "layers.{i}.moe.down_bias": dense(_MLP + "mlp2_bias", "E D"),
        "final_norm": dense("norm.scale", "D"),
        "head": matrix("unembedding.weight", "V D"),
    }
)

TABLES = {"huggingface": HUGGINGFACE, "original": ORIGINAL}
