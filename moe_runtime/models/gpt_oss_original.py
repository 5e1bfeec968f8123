"""GPT-OSS in the vendor's original/ layout, seen as the Hugging Face one: other names, same bytes.

block.0.mlp.mlp1_weight.blocks      model.layers.0.mlp.experts.gate_up_proj_blocks
block.0.attn.qkv.weight [QKV, D]    model.layers.0.self_attn.q_proj.weight: its first Q rows
                                    .. k_proj, v_proj: the KV rows after, and the last KV
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from loaders.checkpoint import Checkpoint
from loaders.errors import CheckpointError
from loaders.names.gpt_oss import HUGGINGFACE, ORIGINAL
from loaders.names.table import Source, resolve_shape
from loaders.safetensors_header import TensorInfo
from moe_runtime.config import ModelConfig
from moe_runtime.models.gpt_oss_config import read_config

# The vendor's ending of a quantized tensor -> the published one.
_ENDINGS = {".blocks": "_blocks", ".scales": "_scales"}


def as_huggingface(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint in the vendor's layout by the names and config of the other; others as they are.

    Tensors that the vendor's layout does not have keep their names.
    Raises CheckpointError or UnsupportedModelError for a config that cannot be read.
    """
    if checkpoint.layout != "original":
        return checkpoint
    config = read_config(checkpoint.config, checkpoint.generation_config, checkpoint.layout)
    sources = dict(_sources(config))
    renamed = [
        part for info in checkpoint.tensors.values() for part in _renamed(info, sources, config)
    ]
    return Checkpoint(
        checkpoint.files,
        layout="huggingface",
        config=_published_config(config, checkpoint.tensors),
        generation_config=checkpoint.generation_config,
        tensors={info.name: info for info in renamed},
        folder=checkpoint.folder,
    )


def _sources(config: ModelConfig) -> Iterator[tuple[str, list[Source]]]:
    """The vendor's names -> the published tensors that follow each other in theirs."""
    for weight, spec in ORIGINAL.weights.items():
        layers = range(config.num_layers) if "{i}" in weight else range(1)
        (theirs,) = spec.sources
        for layer in layers:
            yield (
                theirs.name.replace("{i}", str(layer)),
                [
                    Source(one.name.replace("{i}", str(layer)), one.shape)
                    for one in HUGGINGFACE.weights[weight].sources
                ],
            )


def _renamed(
    info: TensorInfo, sources: Mapping[str, list[Source]], config: ModelConfig
) -> Iterator[TensorInfo]:
    ending = next((one for one in _ENDINGS if info.name.endswith(one)), "")
    published = sources.get(info.name.removesuffix(ending))
    if published is None:
        yield info
    elif len(published) == 1:
        yield replace(info, name=published[0].name + _ENDINGS.get(ending, ""))
    else:
        yield from _rows(info, published, config)


def _rows(info: TensorInfo, published: list[Source], config: ModelConfig) -> Iterator[TensorInfo]:
    """A tensor cut into those whose rows it holds."""
    heights = [resolve_shape(one.shape, config.dims)[0] for one in published]
    if not info.shape or info.shape[0] != sum(heights):
        raise CheckpointError(
            f"{info.name}: expected {sum(heights)} rows by config.json, found shape {info.shape}",
            hint="config.json and the weights do not belong together: download them again",
        )
    row_bytes = info.nbytes // info.shape[0]
    start = info.start
    for one, height in zip(published, heights, strict=True):
        end = start + height * row_bytes
        yield replace(info, name=one.name, shape=(height, *info.shape[1:]), start=start, end=end)
        start = end


def _published_config(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """config.json as the Hugging Face layout has it."""
    rope, stops = config.rope, list(config.eos_token_ids)
    kinds = {True: "sliding_attention", False: "full_attention"}
    quantized = any(name.endswith(".blocks") for name in tensors)
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        **({"eos_token_id": stops} if stops else {}),
        "experts_per_token": config.experts_per_token,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "hidden_size": config.model_width,
        "initial_context_length": rope.original_context,
        "intermediate_size": config.expert_width,
        "layer_types": [kinds[sliding] for sliding in config.layer_is_sliding],
        "max_position_embeddings": config.max_context,
        "num_attention_heads": config.num_heads,
        "num_experts_per_tok": config.experts_per_token,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_local_experts": config.num_experts,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_context,
            "rope_type": "yarn",
            "truncate": rope.truncate,
        },
        "rope_theta": rope.theta,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
        **({"quantization_config": {"quant_method": "mxfp4"}} if quantized else {}),
    }
