"""Tiny random DeepSeek V4 checkpoints in the published format, and their decoded twins.

The published one has FP8 in 128x128 blocks and FP4 experts, both with E8M0 scales, under the
vendor's names, and an MTP block. The twin has the same numbers in fp32 under the same names, for
implementations that cannot read the formats. Encoders here are written apart from ours.

Scaled so that mistakes show: router, index, sinks, clamps, gates of the compressors and the mixing
of the streams all matter.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracles.tiny_gpt_oss import write_json, write_shards

FP8_WEIGHTS = r"attn\.w(q_a|q_b|kv|o_a|o_b)\.|indexer\.wq_b|shared_experts\.w"
FP4_WEIGHTS = r"ffn\.experts\.\d+\.w"
FP32_WEIGHTS = r"hc_|attn_sink|\.ape|gate\.bias"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a tiny model; the defaults let 300 tokens reach everything."""

    ratios: tuple[int, ...] = (0, 0, 4, 16, 4, 16, 4)
    d: int = 64
    heads: int = 4
    width: int = 32
    rotary: int = 16
    query_rank: int = 48
    groups: int = 2
    output_rank: int = 24
    window: int = 32
    index_heads: int = 32
    index_width: int = 32
    top_k: int = 12
    experts: int = 8
    experts_per_token: int = 3
    f: int = 64
    hash_layers: int = 3
    vocab: int = 256
    streams: int = 4
    sinkhorn_iterations: int = 20


def write_tiny_deepseek_v4(
    folder: Path | str,
    sizes: Sizes | None = None,
    *,
    seed: int = 0,
    shards: int = 2,
    expert_dtype: str = "fp4",
    twin: Path | str | None = None,
) -> dict[str, Tensor]:
    """Write a checkpoint into `folder`; returns its tensors by name in the file.

    expert_dtype: "fp4", or "fp8" as in the vendor's base models
    twin:         a second folder for the same numbers in fp32, its config in transformers' words
    """
    sizes = sizes or Sizes()
    stored, plain = {}, {}
    for name, weight in tiny_tensors(seed, sizes).items():
        experts_in_fp8 = expert_dtype == "fp8" and re.search(FP4_WEIGHTS, name)
        if re.search(FP8_WEIGHTS, name) or experts_in_fp8:
            encoded = encode_fp8(weight)
        elif re.search(FP4_WEIGHTS, name):
            encoded = encode_fp4(weight)
        else:
            exact = re.search(FP32_WEIGHTS, name) or not weight.is_floating_point()
            stored[name] = weight if exact else weight.bfloat16()
            plain[name] = stored[name].float() if weight.is_floating_point() else weight
            continue
        stored[name], stored[name.replace(".weight", ".scale")], plain[name] = encoded
    config = published_config(sizes, expert_dtype)
    write_folder(Path(folder), stored, config, shards)
    if twin is not None:
        write_folder(Path(twin), plain, transformers_config(config, sizes), 1)
    return stored


def write_folder(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], shards: int
) -> None:
    """Shards, index and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, {name: t.contiguous() for name, t in tensors.items()}, shards)
    write_json(folder / "config.json", config)


def encode_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] to E4M3 codes, E8M0 scales of a 128 grid, and what they stand for."""
    n, k = weight.shape
    padded = torch.zeros(-(-n // 128) * 128, -(-k // 128) * 128)
    padded[:n, :k] = weight
    largest = padded.view(-(-n // 128), 128, -(-k // 128), 128).abs().amax((1, 3))
    scales = torch.exp2(torch.ceil(torch.log2(largest.clamp_min(1e-12) / 448)))
    grid = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    codes = (weight / grid).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales.to(torch.float8_e8m0fnu), codes.float() * grid


def encode_fp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] to bytes of two E2M1 codes (low nibble: even column), E8M0 scales, and the values."""
    x = weight.view(weight.shape[0], -1, 32)
    scales = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1).clamp_min(1e-12) / 6)))
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    y = x / scales[..., None]
    codes = (y.abs()[..., None] - table).abs().argmin(-1)
    values = (table[codes] * torch.where(y < 0, -1.0, 1.0) * scales[..., None]).view_as(weight)
    codes = (codes + 8 * (y < 0)).view_as(weight).to(torch.uint8)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8)
    return packed, scales.to(torch.float8_e8m0fnu), values


def tiny_tensors(seed: int, s: Sizes) -> dict[str, Tensor]:
    """Random fp32 weights by the vendor's names."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=g) * std

    def linear(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return r(rows, columns, std=gain * columns**-0.5)

    def norm(width: int) -> Tensor:
        return 1 + r(width, std=0.2)

    def compressor(prefix: str, ratio: int, width: int) -> dict[str, Tensor]:
        columns = 2 * width if ratio == 4 else width
        return {
            prefix + "wkv.weight": linear(columns, s.d),
            prefix + "wgate.weight": linear(columns, s.d, 2.0),
            prefix + "ape": r(ratio, columns, std=1.0),
            prefix + "norm.weight": norm(width),
        }

    def hyper(prefix: str, rows: int, scales: int) -> dict[str, Tensor]:
        return {
            prefix + "_fn": linear(rows, s.streams * s.d),
            prefix + "_base": r(rows, std=1.0),
            prefix + "_scale": 1 + r(scales, std=0.3),
        }

    def attention(prefix: str, ratio: int) -> dict[str, Tensor]:
        t = {
            "wq_a.weight": linear(s.query_rank, s.d),
            "q_norm.weight": norm(s.query_rank),
            "wq_b.weight": linear(s.heads * s.width, s.query_rank),
            "wkv.weight": linear(s.width, s.d),
            "kv_norm.weight": 2 * norm(s.width),
            "wo_a.weight": linear(s.groups * s.output_rank, s.heads * s.width // s.groups),
            "wo_b.weight": linear(s.d, s.groups * s.output_rank, 2.0),
            "attn_sink": r(s.heads, std=1.5),
        }
        if ratio:
            t |= compressor("compressor.", ratio, s.width)
        if ratio == 4:
            t["indexer.wq_b.weight"] = linear(s.index_heads * s.index_width, s.query_rank)
            t["indexer.weights_proj.weight"] = linear(s.index_heads, s.d)
            t |= compressor("indexer.compressor.", ratio, s.index_width)
        return {prefix + name: weight for name, weight in t.items()}

    def expert(prefix: str) -> dict[str, Tensor]:
        return {
            prefix + "w1.weight": linear(s.f, s.d, 1.5),
            prefix + "w2.weight": linear(s.d, s.f, 2.0),
            prefix + "w3.weight": linear(s.f, s.d, 1.5),
        }

    def block(prefix: str, ratio: int, hashed: bool) -> dict[str, Tensor]:
        rows = s.streams * (2 + s.streams)
        t = {prefix + "attn_norm.weight": norm(s.d), prefix + "ffn_norm.weight": norm(s.d)}
        t |= hyper(prefix + "hc_attn", rows, 3) | hyper(prefix + "hc_ffn", rows, 3)
        t |= attention(prefix + "attn.", ratio)
        t[prefix + "ffn.gate.weight"] = linear(s.experts, s.d, 2.0)
        if hashed:
            order = torch.rand(s.vocab, s.experts, generator=g).argsort(-1)
            t[prefix + "ffn.gate.tid2eid"] = order[:, : s.experts_per_token].contiguous()
        else:
            t[prefix + "ffn.gate.bias"] = r(s.experts, std=1.0)
        for e in range(s.experts):
            t |= expert(f"{prefix}ffn.experts.{e}.")
        return t | expert(prefix + "ffn.shared_experts.")

    t = {
        "embed.weight": r(s.vocab, s.d, std=1.0),
        "head.weight": r(s.vocab, s.d, std=0.3),
        "norm.weight": norm(s.d),
        **hyper("hc_head", s.streams, 1),
    }
    for i, ratio in enumerate(s.ratios):
        t |= block(f"layers.{i}.", ratio, i < s.hash_layers)
    mtp = block("mtp.0.", 0, hashed=False) | hyper("mtp.0.hc_head", s.streams, 1)
    for name in ("e_proj", "h_proj"):
        mtp[f"mtp.0.{name}.weight"] = linear(s.d, s.d)
    for name in ("enorm", "hnorm", "norm"):
        mtp[f"mtp.0.{name}.weight"] = norm(s.d)
    return t | mtp


def published_config(s: Sizes, expert_dtype: str) -> dict[str, Any]:
    """config.json with the keys of the published one."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "compress_ratios": [*s.ratios, 0],
        "compress_rope_theta": 160000,
        "expert_dtype": expert_dtype,
        "hc_eps": 1e-6,
        "hc_mult": s.streams,
        "hc_sinkhorn_iters": s.sinkhorn_iterations,
        "head_dim": s.width,
        "hidden_act": "silu",
        "hidden_size": s.d,
        "index_head_dim": s.index_width,
        "index_n_heads": s.index_heads,
        "index_topk": s.top_k,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": s.f,
        "n_routed_experts": s.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": s.heads,
        "num_experts_per_tok": s.experts_per_token,
        "num_hash_layers": s.hash_layers,
        "num_hidden_layers": len(s.ratios),
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": s.groups,
        "o_lora_rank": s.output_rank,
        "q_lora_rank": s.query_rank,
        "qk_rope_head_dim": s.rotary,
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
            # Short, so that the ramp of YaRN lies within the few pairs there are.
            "original_max_position_embeddings": 256,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": s.window,
        "swiglu_limit": 1.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "vocab_size": s.vocab,
    }


def transformers_config(config: dict[str, Any], s: Sizes) -> dict[str, Any]:
    """The same without quantization; ratios by kind, as transformers knows 4 and 128 alone."""
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention"}
    others = {ratio for ratio in s.ratios if ratio not in kinds}
    layer_types = [kinds.get(ratio, "heavily_compressed_attention") for ratio in s.ratios]
    unused = ("quantization_config", "expert_dtype", "compress_ratios")
    plain = {key: value for key, value in config.items() if key not in unused}
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    if others:
        (rates["heavily_compressed_attention"],) = others
    return {**plain, "layer_types": layer_types, "compress_rates": rates}


def sizes_with(**changes: Any) -> Sizes:
    """The default sizes with some of them changed."""
    return Sizes(**{**asdict(Sizes()), **changes})
