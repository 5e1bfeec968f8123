"""GPT-OSS in plain torch: fp32 arithmetic on decoded weights, the numbers everything is held to.

Formulas: the model's reference implementation and shared model notes agree on these points, each of
which is easy to get wrong: rope pairs (i, i + C/2); sinks only in the softmax denominator, not
scaled; a window of W counts the query; top-k before softmax; gate and up rows interleaved; the gate
clamped from above only; (up + 1); the down bias inside the weighted sum.

T tokens, D model width, H query heads, G kv heads, C head width, S cached positions, E experts,
K experts per token, F expert width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.rms_norm import rms_norm
from kernels.reference.rope_kv import rope_table
from moe_runtime.config import ModelConfig
from moe_runtime.models.reference_model import ReferenceModel, decoded


class GptOssReference(ReferenceModel):
    """One GPT-OSS model with its cache of keys and values."""

    config: ModelConfig

    def reset(self) -> None:
        """Forget the cached sequence."""
        shape = (0, self.config.num_kv_heads, self.config.head_width)
        self.keys = [torch.zeros(shape, device=self.device) for _ in range(self.config.num_layers)]
        self.values = [k.clone() for k in self.keys]
        self.length = 0

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """See ReferenceModel.forward."""
        positions_T = torch.arange(self.length, self.length + len(token_ids_T), device=self.device)
        x_TD = self.embed(token_ids_T)
        for layer in range(self.config.num_layers):
            x_TD = x_TD + self._attention(layer, x_TD, positions_T)
            x_TD = x_TD + self._experts(layer, x_TD)
        self.length += len(token_ids_T)
        return x_TD

    def _attention(self, layer: int, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        c = self.config
        name = f"layers.{layer}.attention."
        x_TD = rms_norm(x_TD, self.weight(name + "norm"), c.norm_eps)
        qkv = x_TD @ self.weight(name + "qkv").T + self.weight(name + "qkv_bias")
        kv_width = c.num_kv_heads * c.head_width
        q, k, v = qkv.split((c.attention_width, kv_width, kv_width), dim=-1)
        cos, sin = rope_table(c.rope, c.head_width, positions_T)
        q_THC = apply_rope(q.unflatten(-1, (c.num_heads, c.head_width)), cos, sin)
        k_TGC = apply_rope(k.unflatten(-1, (c.num_kv_heads, c.head_width)), cos, sin)
        v_TGC = v.unflatten(-1, (c.num_kv_heads, c.head_width))
        self.keys[layer] = torch.cat((self.keys[layer], k_TGC))
        self.values[layer] = torch.cat((self.values[layer], v_TGC))
        out_TQ = sink_attention(
            q_THC,
            self.keys[layer],
            self.values[layer],
            self.weight(name + "sinks"),
            positions_T,
            window=c.sliding_window if c.layer_is_sliding[layer] else 0,
        )
        return out_TQ @ self.weight(name + "out").T + self.weight(name + "out_bias")

    def _experts(self, layer: int, x_TD: Tensor) -> Tensor:
        c = self.config
        name = f"layers.{layer}.moe."
        x_TD = rms_norm(x_TD, self.weight(name + "norm"), c.norm_eps)
        logits_TE = x_TD @ self.weight(name + "router").T + self.weight(name + "router_bias")
        top_TK, ids_TK = route(logits_TE, c.experts_per_token)
        out_TD = torch.zeros_like(x_TD)
        for expert in ids_TK.unique().tolist():
            tokens, slots = (ids_TK == expert).nonzero(as_tuple=True)
            gate_up = decoded(self.weights[name + "gate_up"][expert])
            down = decoded(self.weights[name + "down"][expert])
            hidden = x_TD[tokens] @ gate_up.T + self.tensor(name + "gate_up_bias")[expert].float()
            hidden = clamped_swiglu(hidden, limit=c.swiglu_limit, alpha=c.swiglu_alpha)
            result = hidden @ down.T + self.tensor(name + "down_bias")[expert].float()
            out_TD[tokens] += top_TK[tokens, slots, None] * result
        return out_TD


def apply_rope(x_THC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + C/2); cos and sin are [T, C/2]."""
    first, second = x_THC.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def sink_attention(
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    sinks_H: Tensor,
    positions_T: Tensor,
    *,
    window: int,
) -> Tensor:
    """Causal attention with one sink logit a head in the denominator; window 0 is unbounded.

    Returns [T, H * C]. Key j is seen from position p if 0 <= p - j, and p - j < window.
    """
    heads_per_kv = q_THC.shape[1] // k_SGC.shape[1]
    k_SHC = k_SGC.repeat_interleave(heads_per_kv, dim=1)
    v_SHC = v_SGC.repeat_interleave(heads_per_kv, dim=1)
    scores_HTS = torch.einsum("thc,shc->hts", q_THC, k_SHC) * q_THC.shape[-1] ** -0.5
    distance_TS = positions_T[:, None] - torch.arange(len(k_SGC), device=q_THC.device)
    hidden_TS = distance_TS < 0
    if window:
        hidden_TS |= distance_TS >= window
    scores_HTS = scores_HTS.masked_fill(hidden_TS, float("-inf"))
    sinks_HT1 = sinks_H[:, None, None].expand(-1, len(q_THC), 1)
    weights_HTS = torch.cat((scores_HTS, sinks_HT1), dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("hts,shc->thc", weights_HTS, v_SHC).flatten(1)


def route(logits_TE: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """Weights [T, K] (softmax over the chosen) and expert ids [T, K]; a tie takes the lower id."""
    ordered = logits_TE.sort(dim=-1, descending=True, stable=True)
    top_TK = ordered.values[:, :experts_per_token]
    return top_TK.softmax(dim=-1), ordered.indices[:, :experts_per_token]


def clamped_swiglu(hidden: Tensor, *, limit: float, alpha: float) -> Tensor:
    """GPT-OSS activation on interleaved (gate, up) columns: [..., 2F] -> [..., F]."""
    gate = hidden[..., 0::2].clamp(max=limit)
    up = hidden[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)
