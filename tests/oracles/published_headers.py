"""Published checkpoints by their headers alone: names, dtypes and shapes of the real models.

No weight exists: enough for everything that is said of a model before it is downloaded.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from loaders.files import MAX_TEXT_BYTES
from loaders.safetensors_header import DTYPE_BITS, TensorInfo
from tests.oracles.tiny_gpt_oss import hf_config

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape
SHARD_BYTES = 5_000_000_000


@dataclass
class HeaderFiles:
    """A checkpoint's files for loaders.checkpoint.open_files, in shards of about SHARD_BYTES."""

    config: dict[str, Any]
    tensors: Tensors
    label: str = "headers"

    def __post_init__(self) -> None:
        self.shards: dict[str, dict[str, TensorInfo]] = {}
        end, file = SHARD_BYTES, ""
        for name, (dtype, shape) in self.tensors.items():
            if end >= SHARD_BYTES:
                file, end = f"model-{len(self.shards) + 1:05d}.safetensors", 0
                self.shards[file] = {}
            start, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
            self.shards[file][name] = TensorInfo(name, dtype, shape, file, start, end)

    def names(self) -> list[str]:
        return ["config.json", "model.safetensors.index.json", *self.shards]

    def text(self, name: str, *, max_bytes: int = MAX_TEXT_BYTES) -> bytes | None:
        if name == "model.safetensors.index.json":
            where = {tensor: file for file, found in self.shards.items() for tensor in found}
            return json.dumps({"weight_map": where}).encode()
        return json.dumps(self.config).encode() if name == "config.json" else None

    def header(self, name: str) -> dict[str, TensorInfo]:
        return self.shards[name]


def gpt_oss(*, layers: int, experts: int, bf16: bool = False) -> HeaderFiles:
    """openai/gpt-oss-20b has 24 layers and 32 experts, -120b 36 and 128; or with bf16 experts."""
    d, vocab = 2880, 201088
    tensors: Tensors = {
        "model.embed_tokens.weight": ("BF16", (vocab, d)),
        "lm_head.weight": ("BF16", (vocab, d)),
        "model.norm.weight": ("BF16", (d,)),
    }
    for i in range(layers):
        p = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{p}{norm}.weight"] = ("BF16", (d,))
        for name, rows, columns in (("q", 4096, d), ("k", 512, d), ("v", 512, d), ("o", d, 4096)):
            tensors[f"{p}self_attn.{name}_proj.weight"] = ("BF16", (rows, columns))
            tensors[f"{p}self_attn.{name}_proj.bias"] = ("BF16", (rows,))
        tensors[p + "self_attn.sinks"] = ("BF16", (64,))
        tensors[p + "mlp.router.weight"] = ("BF16", (experts, d))
        tensors[p + "mlp.router.bias"] = ("BF16", (experts,))
        for name, rows in (("gate_up_proj", 2 * d), ("down_proj", d)):
            e = f"{p}mlp.experts.{name}"
            if bf16:
                tensors[e] = ("BF16", (experts, d, rows))
            else:
                tensors[e + "_blocks"] = ("U8", (experts, rows, d // 32, 16))
                tensors[e + "_scales"] = ("U8", (experts, rows, d // 32))
            tensors[e + "_bias"] = ("BF16", (experts, rows))
    config = hf_config(layers=layers, d=d, f=d, heads=64, kv=8, hd=64, experts=experts, topk=4,
                       window=128, vocab=vocab)  # fmt: skip
    return HeaderFiles(config, tensors)


def qwen3_30b(*, fp8: bool = False, layers: int = 48) -> HeaderFiles:
    """Qwen/Qwen3-30B-A3B in bf16, or as Qwen3-30B-A3B-Instruct-2507-FP8."""
    d, f, experts, vocab = 2048, 768, 128, 151936
    tensors: Tensors = {
        "model.embed_tokens.weight": ("BF16", (vocab, d)),
        "lm_head.weight": ("BF16", (vocab, d)),
        "model.norm.weight": ("BF16", (d,)),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        tensors.update(_fp8(name, rows, columns, "BF16") if fp8 else _bf16(name, rows, columns))

    for i in range(layers):
        p = f"model.layers.{i}."
        for norm, width in (("input_layernorm", d), ("post_attention_layernorm", d),
                            ("self_attn.q_norm", 128), ("self_attn.k_norm", 128)):  # fmt: skip
            tensors[f"{p}{norm}.weight"] = ("BF16", (width,))
        for name, rows, columns in (("q", 4096, d), ("k", 512, d), ("v", 512, d), ("o", d, 4096)):
            linear(f"{p}self_attn.{name}_proj", rows, columns)
        tensors[p + "mlp.gate.weight"] = ("BF16", (experts, d))
        for e in range(experts):
            for name, rows, columns in (("gate", f, d), ("up", f, d), ("down", d, f)):
                linear(f"{p}mlp.experts.{e}.{name}_proj", rows, columns)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "num_hidden_layers": layers, "hidden_size": d, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": experts,
        "num_experts_per_tok": 8, "moe_intermediate_size": f, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "vocab_size": vocab, "use_sliding_window": False,
        "sliding_window": None, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return HeaderFiles(config, tensors)


def deepseek_v3(*, v32: bool = False, layers: int = 61) -> HeaderFiles:
    """deepseek-ai/DeepSeek-V3 (R1 and V3.1 are the same), or V3.2 with its indexer."""
    d, experts, vocab = 7168, 256, 129280
    tensors: Tensors = {
        "model.embed_tokens.weight": ("BF16", (vocab, d)),
        "lm_head.weight": ("BF16", (vocab, d)),
        "model.norm.weight": ("BF16", (d,)),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        tensors.update(_fp8(name, rows, columns, "F32"))

    def mlp(prefix: str, width: int) -> None:
        for name, rows, columns in (("gate", width, d), ("up", width, d), ("down", d, width)):
            linear(f"{prefix}.{name}_proj", rows, columns)

    for i in range(layers + 1):  # the last one is the MTP layer
        p = f"model.layers.{i}."
        for norm, width in (("input_layernorm", d), ("post_attention_layernorm", d),
                            ("self_attn.q_a_layernorm", 1536),
                            ("self_attn.kv_a_layernorm", 512)):  # fmt: skip
            tensors[f"{p}{norm}.weight"] = ("BF16", (width,))
        for name, rows, columns in (("q_a_proj", 1536, d), ("q_b_proj", 24576, 1536),
                                    ("kv_a_proj_with_mqa", 576, d), ("kv_b_proj", 32768, 512),
                                    ("o_proj", d, 16384)):  # fmt: skip
            linear(f"{p}self_attn.{name}", rows, columns)
        if v32:
            linear(p + "self_attn.indexer.wq_b", 8192, 1536)
            linear(p + "self_attn.indexer.wk", 128, d)
            tensors[p + "self_attn.indexer.k_norm.weight"] = ("F32", (128,))
            tensors[p + "self_attn.indexer.k_norm.bias"] = ("F32", (128,))
            tensors[p + "self_attn.indexer.weights_proj.weight"] = ("BF16", (64, d))
        if i < 3:
            mlp(p + "mlp", 18432)
            continue
        tensors[p + "mlp.gate.weight"] = ("BF16", (experts, d))
        tensors[p + "mlp.gate.e_score_correction_bias"] = ("F32", (experts,))
        for e in range(experts):
            mlp(f"{p}mlp.experts.{e}", 2048)
        mlp(p + "mlp.shared_experts", 2048)
    last = f"model.layers.{layers}."
    tensors |= {
        last + "embed_tokens.weight": ("BF16", (vocab, d)),
        last + "shared_head.head.weight": ("BF16", (vocab, d)),
        last + "shared_head.norm.weight": ("BF16", (d,)),
        last + "enorm.weight": ("BF16", (d,)),
        last + "hnorm.weight": ("BF16", (d,)),
        last + "eh_proj.weight": ("BF16", (d, 2 * d)),
    }
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "num_hidden_layers": layers, "hidden_size": d, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": experts, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048, "intermediate_size": 18432, "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1, "max_position_embeddings": 163840, "vocab_size": vocab,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }  # fmt: skip
    if v32:
        config |= {"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]}
        config |= {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
    return HeaderFiles(config, tensors)


def deepseek_v4_flash() -> HeaderFiles:
    """deepseek-ai/DeepSeek-V4-Flash of April 2026, its one MTP block included."""
    d, heads, rank, groups, experts, f, vocab = 4096, 64, 1024, 8, 256, 2048, 129280
    ratios = [0, 0, *[4, 128] * 20, 4, 0]
    tensors: Tensors = {
        "embed.weight": ("BF16", (vocab, d)),
        "head.weight": ("BF16", (vocab, d)),
        "norm.weight": ("BF16", (d,)),
        **_hyper("hc_head", 4, d, 1),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[name + ".weight"] = ("F8_E4M3", (rows, columns))
        tensors[name + ".scale"] = ("F8_E8M0", (-(-rows // 128), -(-columns // 128)))

    def expert(name: str, rows: int, columns: int) -> None:
        tensors[name + ".weight"] = ("I8", (rows, columns // 2))
        tensors[name + ".scale"] = ("F8_E8M0", (rows, columns // 32))

    def layer(p: str, ratio: int, *, hashed: bool) -> None:
        for norm, width in (("attn_norm", d), ("ffn_norm", d), ("attn.q_norm", rank),
                            ("attn.kv_norm", 512)):  # fmt: skip
            tensors[f"{p}{norm}.weight"] = ("BF16", (width,))
        tensors.update(_hyper(p + "hc_attn", 24, d, 3) | _hyper(p + "hc_ffn", 24, d, 3))
        for name, rows, columns in (("wq_a", rank, d), ("wq_b", 512 * heads, rank),
                                    ("wkv", 512, d), ("wo_a", 1024 * groups, 512 * heads // groups),
                                    ("wo_b", d, 1024 * groups)):  # fmt: skip
            linear(f"{p}attn.{name}", rows, columns)
        tensors[p + "attn.attn_sink"] = ("F32", (heads,))
        if ratio:
            tensors.update(_compressor(p + "attn.compressor", ratio, 512, d))
        if ratio == 4:
            linear(p + "attn.indexer.wq_b", 8192, rank)
            tensors[p + "attn.indexer.weights_proj.weight"] = ("BF16", (64, d))
            tensors.update(_compressor(p + "attn.indexer.compressor", ratio, 128, d))
        tensors[p + "ffn.gate.weight"] = ("BF16", (experts, d))
        if hashed:
            tensors[p + "ffn.gate.tid2eid"] = ("I64", (vocab, 6))
        else:
            tensors[p + "ffn.gate.bias"] = ("F32", (experts,))
        for e in range(experts):
            for name, rows, columns in (("w1", f, d), ("w2", d, f), ("w3", f, d)):
                expert(f"{p}ffn.experts.{e}.{name}", rows, columns)
        for name, rows, columns in (("w1", f, d), ("w2", d, f), ("w3", f, d)):
            linear(f"{p}ffn.shared_experts.{name}", rows, columns)

    for i in range(43):
        layer(f"layers.{i}.", ratios[i], hashed=i < 3)
    layer("mtp.0.", 0, hashed=False)
    linear("mtp.0.e_proj", d, d)
    linear("mtp.0.h_proj", d, d)
    tensors |= {f"mtp.0.{norm}.weight": ("BF16", (d,)) for norm in ("enorm", "hnorm", "norm")}
    tensors |= _hyper("mtp.0.hc_head", 4, d, 1)
    config = {
        "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4",
        "num_hidden_layers": 43, "hidden_size": d, "num_attention_heads": heads,
        "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": rank,
        "o_lora_rank": 1024, "o_groups": groups, "index_n_heads": 64, "index_head_dim": 128,
        "index_topk": 512, "sliding_window": 128, "num_hash_layers": 3,
        "n_routed_experts": experts, "n_shared_experts": 1, "num_experts_per_tok": 6,
        "moe_intermediate_size": f, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
        "routed_scaling_factor": 1.5, "norm_topk_prob": True, "swiglu_limit": 10.0,
        "compress_ratios": ratios, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
        "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "compress_rope_theta": 160000, "max_position_embeddings": 1048576, "expert_dtype": "fp4",
        "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536,
                         "beta_fast": 32, "beta_slow": 1},
        "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
        "vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
                                "quant_method": "fp8", "scale_fmt": "ue8m0",
                                "weight_block_size": [128, 128]},
    }  # fmt: skip
    return HeaderFiles(config, tensors)


def _bf16(name: str, rows: int, columns: int) -> Tensors:
    return {name + ".weight": ("BF16", (rows, columns))}


def _fp8(name: str, rows: int, columns: int, scales: str) -> Tensors:
    return {
        name + ".weight": ("F8_E4M3", (rows, columns)),
        name + ".weight_scale_inv": (scales, (-(-rows // 128), -(-columns // 128))),
    }


def _hyper(name: str, rows: int, d: int, scales: int) -> Tensors:
    return {
        name + "_fn": ("F32", (rows, 4 * d)),
        name + "_base": ("F32", (rows,)),
        name + "_scale": ("F32", (scales,)),
    }


def _compressor(name: str, ratio: int, width: int, d: int) -> Tensors:
    wide = width * (2 if ratio == 4 else 1)
    return {
        name + ".wkv.weight": ("BF16", (wide, d)),
        name + ".wgate.weight": ("BF16", (wide, d)),
        name + ".ape": ("F32", (ratio, wide)),
        name + ".norm.weight": ("BF16", (width,)),
    }
