"""The demo model as a published-format GPT-OSS checkpoint: write it and read it back.

gate_up here [2, E, F, D]   ->   file [E, 2 F, D / 32, 16]: rows gate 0, up 0, gate 1, up 1, ...
experts MXFP4 (blocks and scales, uint8), everything else bf16
"""

import json
import shutil
from pathlib import Path

import torch
from demo_model import DemoConfig, DemoModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant import mxfp4
from quant.e8m0 import SCALE_RULES

MAX_FOLDER_BYTES = 16_000_000
END_OF_TEXT = "<|endoftext|>"

_TOP_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_LAYER_NAMES = {
    "input_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key": "self_attn.k_proj.weight",
    "key_bias": "self_attn.k_proj.bias",
    "value": "self_attn.v_proj.weight",
    "value_bias": "self_attn.v_proj.bias",
    "output": "self_attn.o_proj.weight",
    "output_bias": "self_attn.o_proj.bias",
    "sinks": "self_attn.sinks",
    "post_norm": "post_attention_layernorm.weight",
    "router": "mlp.router.weight",
    "router_bias": "mlp.router.bias",
    "down_bias": "mlp.experts.down_proj_bias",
}
_EXPERTS = "mlp.experts."
_CHAT_TEMPLATE = """\
{#- A plain language model: the messages become paragraphs and the model writes the next one. -#}
{%- for message in messages -%}
{{- message['content'] | trim + '\\n\\n' -}}
{%- endfor -%}
"""


def published_tensors(model: DemoModel, scale_rule: str) -> dict[str, Tensor]:
    """Every tensor of the file, on the CPU."""
    tensors = {name: getattr(model, own).bfloat16() for own, name in _TOP_NAMES.items()}
    for index, layer in enumerate(model.blocks):
        prefix = f"model.layers.{index}."
        for own, name in _LAYER_NAMES.items():
            tensors[prefix + name] = getattr(layer, own).bfloat16()
        bias = layer.gate_up_bias.permute(1, 2, 0).flatten(1)
        tensors[prefix + _EXPERTS + "gate_up_proj_bias"] = bias.bfloat16()
        gate_up_E2FD = layer.gate_up.permute(1, 2, 0, 3).flatten(1, 2)
        for name, weight in (("gate_up_proj", gate_up_E2FD), ("down_proj", layer.down)):
            packed = mxfp4.encode(weight.float(), scale_rule)
            groups = weight.shape[-1] // mxfp4.GROUP
            stem = prefix + _EXPERTS + name
            tensors[stem + "_blocks"] = packed.values.view(*weight.shape[:2], groups, 16)
            tensors[stem + "_scales"] = packed.scales.view(*weight.shape[:2], groups)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_checkpoint(folder: Path, model: DemoModel, tokenizer: Path, scale_rule: str) -> None:
    """Weights, configs, tokenizer and chat template; the model card and the report come later."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    save_file(published_tensors(model, scale_rule), weights, metadata={"format": "pt"})
    # safetensors writes for the owner alone; a packaged file is for everybody.
    weights.chmod(0o644)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    write_json(folder / "config.json", published_config(model.config))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(model.config))
    write_json(folder / "generation_config.json", _GENERATION_CONFIG)
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE)


def read_checkpoint(folder: Path, config: DemoConfig) -> DemoModel:
    """The model of a written folder in fp32, decoded from its bytes without the encoder's help."""
    tensors = load_file(folder / "model.safetensors")
    model = DemoModel(config)
    state = {own: tensors.pop(name).float() for own, name in _TOP_NAMES.items()}
    inner = config.intermediate_size
    for index in range(config.num_hidden_layers):
        published, own_prefix = f"model.layers.{index}.", f"layers.{index}."
        for own, name in _LAYER_NAMES.items():
            state[own_prefix + own] = tensors.pop(published + name).float()
        stem = published + _EXPERTS
        bias = tensors.pop(stem + "gate_up_proj_bias").float()
        state[own_prefix + "gate_up_bias"] = bias.unflatten(1, (inner, 2)).permute(2, 0, 1)
        gate_up = _decode(
            tensors.pop(stem + "gate_up_proj_blocks"), tensors.pop(stem + "gate_up_proj_scales")
        )
        state[own_prefix + "gate_up"] = gate_up.unflatten(1, (inner, 2)).permute(2, 0, 1, 3)
        state[own_prefix + "down"] = _decode(
            tensors.pop(stem + "down_proj_blocks"), tensors.pop(stem + "down_proj_scales")
        )
    assert not tensors, f"tensors nobody read: {sorted(tensors)}"
    model.load_state_dict(state)
    return model


def with_rounded_dense(model: DemoModel) -> DemoModel:
    """A CPU copy whose experts stay in fp32 and whose other weights are rounded to bf16."""
    experts = (".gate_up", ".down")
    copy = DemoModel(model.config)
    copy.load_state_dict(
        {
            n: t.cpu() if n.endswith(experts) else t.cpu().bfloat16().float()
            for n, t in model.state_dict().items()
        }
    )
    return copy


def scale_rule_errors(model: DemoModel) -> dict[str, float]:
    """Relative mean square error of all expert weights under each MXFP4 scale rule."""
    weights = [w.detach() for layer in model.blocks for w in (layer.gate_up, layer.down)]
    power = sum(w.square().sum().item() for w in weights)
    return {
        rule: sum((mxfp4.decode(mxfp4.encode(w, rule)) - w).square().sum().item() for w in weights)
        / power
        for rule in SCALE_RULES
    }


def published_config(config: DemoConfig) -> dict:
    """config.json with the keys of the published 20b model."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 0,
        "experts_per_token": config.num_experts_per_tok,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initial_context_length": config.initial_context_length,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_types": [
            "full_attention" if i % 2 else "sliding_attention"
            for i in range(config.num_hidden_layers)
        ],
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "gpt_oss",
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_local_experts": config.num_local_experts,
        "output_router_logits": False,
        "pad_token_id": 0,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": config.yarn_beta_fast,
            "beta_slow": config.yarn_beta_slow,
            "factor": config.yarn_factor,
            "original_max_position_embeddings": config.initial_context_length,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": config.rope_theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


_GENERATION_CONFIG = {
    "do_sample": True,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "temperature": 0.8,
    "top_p": 0.95,
    "transformers_version": "4.55.0",
}


def _tokenizer_config(config: DemoConfig) -> dict:
    return {
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": config.max_position_embeddings,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [E, rows, groups, 16] and [E, rows, groups] -> fp32 [E, rows, columns]."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat((magnitudes, -magnitudes))
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).int()
    return torch.ldexp(table[codes], scales.int()[..., None] - 127).flatten(-2)


def write_json(path: Path, content: dict) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def folder_bytes(folder: Path) -> dict[str, int]:
    """Size of each file."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
