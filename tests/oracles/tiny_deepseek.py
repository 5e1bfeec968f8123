"""Tiny random DeepSeek V2, V3 and V3.2 checkpoints in the published format, and decoded twins.

The published one has FP8 in 128x128 blocks with fp32 scales (weight_scale_inv), with E8M0 scales,
or is all bf16, under the vendor's names, and an MTP layer from V3 on. The twin has the same numbers
in fp32 under the same names, for implementations that cannot read the format (transformers 5.23
reads no FP8 matrix whose sides are not multiples of 128). The encoder here is apart from ours.

Scaled so that mistakes show: routing is not uniform, the router's biases are strongly negative,
YaRN's range is passed, and an indexer has many heads, so that its scores do not tie.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracles.tiny_gpt_oss import write_json, write_shards

FP8_WEIGHTS = r".*(_proj|kv_a_proj_with_mqa|indexer\.wq_b|indexer\.wk)\.weight"
KEPT_WEIGHTS = r".*(eh_proj|weights_proj)\.weight"
FP32_WEIGHTS = r".*(e_score_correction_bias|k_norm\.(weight|bias))"
FORMATS = ("bf16", "fp8", "fp8_e8m0")
_ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a tiny model. Blocks of 128 are partial in d, q, the latents and w."""

    family: str = "deepseek_v3"
    layers: int = 3
    dense_layers: int = 1
    d: int = 160
    heads: int = 4
    query_rank: int | None = 48
    latent: int = 48
    rotary: int = 16
    nope: int = 24
    value: int = 40
    experts: int = 16
    experts_per_token: int = 4
    groups: int = 4
    limited_groups: int = 2
    f: int = 128
    shared: int = 1
    w: int = 200
    vocab: int = 256
    mscale: float = 1.0
    routed_scale: float = 2.5
    index_heads: int = 32
    index_width: int = 32
    index_topk: int = 48

    @property
    def mtp_layers(self) -> int:
        """MTP layers in the files."""
        return 0 if self.family == "deepseek_v2" else 1


V2_LITE = Sizes(
    "deepseek_v2", query_rank=None, groups=1, limited_groups=1, shared=2, mscale=0.707,
    routed_scale=1.0, f=96,
)  # fmt: skip


def write_tiny_deepseek(
    folder: Path | str,
    sizes: Sizes | None = None,
    *,
    format: str = "fp8",
    seed: int = 0,
    shards: int = 2,
    twin: Path | str | None = None,
    **changes: Any,
) -> dict[str, Tensor]:
    """Write a checkpoint into `folder`; returns its tensors by name in the file.

    format:  one of FORMATS
    twin:    a second folder for the same numbers in fp32, without quantization and MTP
    changes: to config.json of both
    """
    sizes = sizes or Sizes()
    stored, plain = {}, {}
    for name, weight in tiny_tensors(seed, sizes).items():
        kept = format == "bf16" or re.fullmatch(KEPT_WEIGHTS, name)
        if kept or not re.fullmatch(FP8_WEIGHTS, name):
            exact = re.fullmatch(FP32_WEIGHTS, name)
            stored[name] = weight if exact else weight.bfloat16()
            plain[name] = stored[name].float()
        else:
            codes, scales, plain[name] = encode_fp8(weight, powers_of_two=format == "fp8_e8m0")
            stored[name], stored[name + "_scale_inv"] = codes, scales
    config = published_config(sizes, format) | changes
    _write_folder(Path(folder), stored, config, shards)
    if twin is not None:
        extra = f"model.layers.{sizes.layers}."
        plain = {name: t for name, t in plain.items() if not name.startswith(extra)}
        left_out = ("quantization_config", "num_nextn_predict_layers")
        config = {key: value for key, value in config.items() if key not in left_out}
        _write_folder(Path(twin), plain, config, 1)
    return stored


def encode_fp8(weight: Tensor, *, powers_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] to E4M3 codes, scales of a 128 grid, and the numbers that they stand for."""
    n, k = weight.shape
    blocks = (-(-n // 128), -(-k // 128))
    padded = torch.zeros(blocks[0] * 128, blocks[1] * 128)
    padded[:n, :k] = weight
    scales = padded.view(blocks[0], 128, blocks[1], 128).abs().amax((1, 3)).clamp_min(1e-12) / 448
    if powers_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    grid = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    codes = (weight / grid).clamp(-448, 448).to(torch.float8_e4m3fn)
    stored = scales.to(torch.float8_e8m0fnu) if powers_of_two else scales
    return codes, stored, codes.float() * grid


def tiny_tensors(seed: int, sizes: Sizes) -> dict[str, Tensor]:
    """Random fp32 tensors by the published names, one tensor an expert."""
    g = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=g) * gain * columns**-0.5

    def norm(width: int) -> Tensor:
        return 1 + 0.1 * torch.randn(width, generator=g)

    s = sizes
    t = {
        "model.embed_tokens.weight": torch.randn(s.vocab, s.d, generator=g),
        "model.norm.weight": norm(s.d),
        "lm_head.weight": matrix(s.vocab, s.d, 2.0),
    }
    for i in range(s.layers + s.mtp_layers):
        p = f"model.layers.{i}."
        t[p + "input_layernorm.weight"] = norm(s.d)
        t[p + "post_attention_layernorm.weight"] = norm(s.d)
        t |= {p + "self_attn." + n: w for n, w in _attention(s, matrix, norm).items()}
        t |= {p + "mlp." + n: w for n, w in _mlp(s, i, matrix, g).items()}
        if i >= s.layers:
            t[p + "embed_tokens.weight"] = t["model.embed_tokens.weight"].clone()
            t[p + "enorm.weight"], t[p + "hnorm.weight"] = norm(s.d), norm(s.d)
            t[p + "eh_proj.weight"] = matrix(s.d, 2 * s.d)
            t[p + "shared_head.norm.weight"] = norm(s.d)
            t[p + "shared_head.head.weight"] = t["lm_head.weight"].clone()
    return t


def _attention(
    s: Sizes, matrix: Callable[..., Tensor], norm: Callable[[int], Tensor]
) -> dict[str, Tensor]:
    q_rows = s.heads * (s.nope + s.rotary)
    if s.query_rank is None:
        t = {"q_proj.weight": matrix(q_rows, s.d, 1.5)}
    else:
        t = {
            "q_a_proj.weight": matrix(s.query_rank, s.d),
            "q_a_layernorm.weight": norm(s.query_rank),
            "q_b_proj.weight": matrix(q_rows, s.query_rank, 1.5),
        }
    t |= {
        "kv_a_proj_with_mqa.weight": matrix(s.latent + s.rotary, s.d, 1.5),
        "kv_a_layernorm.weight": norm(s.latent),
        "kv_b_proj.weight": matrix(s.heads * (s.nope + s.value), s.latent, 1.5),
        "o_proj.weight": matrix(s.d, s.heads * s.value, 1.5),
    }
    if s.family == "deepseek_v32":
        assert s.query_rank is not None
        t |= {
            "indexer.wq_b.weight": matrix(s.index_heads * s.index_width, s.query_rank),
            "indexer.wk.weight": matrix(s.index_width, s.d),
            "indexer.k_norm.weight": norm(s.index_width),
            "indexer.k_norm.bias": norm(s.index_width) - 1,
            "indexer.weights_proj.weight": matrix(s.index_heads, s.d),
        }
    return t


def _mlp(
    s: Sizes, layer: int, matrix: Callable[..., Tensor], g: torch.Generator
) -> dict[str, Tensor]:
    def gated(prefix: str, width: int) -> dict[str, Tensor]:
        return {
            prefix + "gate_proj.weight": matrix(width, s.d, 1.5),
            prefix + "up_proj.weight": matrix(width, s.d),
            prefix + "down_proj.weight": matrix(s.d, width, 1.5),
        }

    if layer < s.dense_layers:
        return gated("", s.w)
    t = {"gate.weight": matrix(s.experts, s.d, 1.5)}
    if s.family != "deepseek_v2":
        t["gate.e_score_correction_bias"] = 0.3 * torch.randn(s.experts, generator=g) - 1.5
    for e in range(s.experts):
        t |= gated(f"experts.{e}.", s.f)
    return t | gated("shared_experts.", s.shared * s.f)


def _write_folder(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], shards: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, {name: t.contiguous() for name, t in tensors.items()}, shards)
    write_json(folder / "config.json", config)


def published_config(s: Sizes, format: str) -> dict[str, Any]:
    """config.json with the keys of the published one."""
    is_v2 = s.family == "deepseek_v2"
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[s.family]],
        "model_type": s.family,
        "attention_bias": False,
        "first_k_dense_replace": s.dense_layers,
        "hidden_act": "silu",
        "hidden_size": s.d,
        "intermediate_size": s.w,
        "kv_lora_rank": s.latent,
        "max_position_embeddings": 1024,
        "moe_intermediate_size": s.f,
        "moe_layer_freq": 1,
        "n_group": s.groups,
        "n_routed_experts": s.experts,
        "n_shared_experts": s.shared,
        "norm_topk_prob": not is_v2,
        "num_attention_heads": s.heads,
        "num_experts_per_tok": s.experts_per_token,
        "num_hidden_layers": s.layers,
        "num_key_value_heads": s.heads,
        "q_lora_rank": s.query_rank,
        "qk_nope_head_dim": s.nope,
        "qk_rope_head_dim": s.rotary,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "type": "yarn",
            "factor": 8,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 128,
            "mscale": s.mscale,
            "mscale_all_dim": s.mscale,
        },
        "rope_theta": 10000,
        "routed_scaling_factor": s.routed_scale,
        "scoring_func": "softmax" if is_v2 else "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": s.limited_groups,
        "topk_method": "noaux_tc" if not is_v2 else "greedy",
        "v_head_dim": s.value,
        "vocab_size": s.vocab,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if s.groups > 1 and is_v2:
        config["topk_method"] = "group_limited_greedy"
    if s.mtp_layers:
        config["num_nextn_predict_layers"] = s.mtp_layers
    if s.family == "deepseek_v32":
        config |= {
            "index_head_dim": s.index_width,
            "index_n_heads": s.index_heads,
            "index_topk": s.index_topk,
        }
    if format != "bf16":
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
        if format == "fp8_e8m0":
            config["quantization_config"]["scale_fmt"] = "ue8m0"
    return config
