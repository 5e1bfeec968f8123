"""Published models that this version runs, as facts: enough to say where they fit without them."""

from __future__ import annotations

from dataclasses import dataclass

from moe_runtime.config import ModelConfig, YarnRope


@dataclass(frozen=True)
class PublishedModel:
    """One model on the hub."""

    repo_id: str
    config: ModelConfig
    weight_bytes: dict[str, int]  # by component of moe_runtime.plan


def _gpt_oss(repo_id: str, *, layers: int, experts: int) -> PublishedModel:
    """The two GPT-OSS models differ in layers and experts alone."""
    rope = YarnRope(
        theta=150000.0,
        factor=32.0,
        beta_fast=32.0,
        beta_slow=1.0,
        original_context=4096,
        truncate=False,
    )
    config = ModelConfig(
        family="gpt_oss",
        num_layers=layers,
        model_width=2880,
        num_heads=64,
        num_kv_heads=8,
        head_width=64,
        num_experts=experts,
        experts_per_token=4,
        expert_width=2880,
        vocab_size=201088,
        sliding_window=128,
        layer_is_sliding=tuple(layer % 2 == 0 for layer in range(layers)),
        norm_eps=1e-5,
        rope=rope,
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        max_context=131072,
        eos_token_ids=(200002, 199999, 200012),
    )
    width, qkv, out = config.model_width, config.qkv_width, config.attention_width
    attention = 2 * (qkv * (width + 1) + width * (out + 1) + config.num_heads)
    rows = 2 * config.expert_width + width  # of gate_up and down; both have `width` columns
    expert = rows * width // 2 + rows * width // 32 + 2 * rows  # codes, scales, biases
    table = 2 * config.vocab_size * width
    weight_bytes = {
        "embedding": table,
        "attention": layers * attention,
        "router": layers * 2 * experts * (width + 1),
        "experts": layers * experts * expert,
        "norms": 2 * width * (2 * layers + 1),
        "head": table,
    }
    return PublishedModel(repo_id, config, weight_bytes)


PUBLISHED = (
    _gpt_oss("openai/gpt-oss-20b", layers=24, experts=32),
    _gpt_oss("openai/gpt-oss-120b", layers=36, experts=128),
)
