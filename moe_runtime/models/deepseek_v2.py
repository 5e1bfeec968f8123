"""DeepSeek V2 (V2-Lite) in plain torch: fp32 arithmetic on decoded weights.

Points that are easy to get wrong: rope turns pairs (2i, 2i + 1); YaRN's mscale_all_dim grows the
softmax scale, squared, and not cos and sin; latents are normed and their keys are not; a head's
rows of the second latent projection are its keys', then its values'; router weights are not
divided by their sum; shared experts have no gate and no factor.

V3 and V3.2 are this model with another router and an indexer: see their files. Activations are not
quantized unless asked for: the vendor's code rounds the inputs of all weights in FP8 but of the
second latent projection, which it uses in absorbed form too.

T tokens, D model width, H heads, S cached tokens, L latent width, P rotary width, E experts, K
experts per token, F expert width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.reference.rms_norm import rms_norm
from kernels.reference.rope_kv import inverse_frequencies
from moe_runtime.layers.activation_rounding import rounded_to_e4m3
from moe_runtime.layers.compressed_attention import rotate
from moe_runtime.layers.latent_attention import causal_is_seen, latent_attention
from moe_runtime.layers.routing import choose_experts, limit_groups
from moe_runtime.models.deepseek_config import DeepseekConfig
from moe_runtime.models.reference_model import ReferenceModel, decoded

_INNER_EPS = 1e-6  # of norms within the attention, whatever the config says


class DeepseekV2Reference(ReferenceModel):
    """One DeepSeek V2 model on one device with its cache of latents and rotated keys."""

    config: DeepseekConfig
    has_vendor_rounding = True

    def reset(self) -> None:
        """Forget the cached sequence."""
        c = self.config
        none = torch.zeros((0, c.latent_width), device=self.device)
        self.latents = [none] * c.num_layers
        self.keys = [torch.zeros((0, c.rotary_width), device=self.device)] * c.num_layers
        self.length = 0

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """See ReferenceModel.forward."""
        positions_T = torch.arange(self.length, self.length + len(token_ids_T), device=self.device)
        x_TD = self.embed(token_ids_T)
        for layer in range(self.config.num_layers):
            x_TD = x_TD + self._attention(layer, x_TD, positions_T)
            x_TD = x_TD + self._mlp(layer, x_TD)
        self.length += len(token_ids_T)
        return x_TD

    def _attention(self, layer: int, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        c = self.config
        name = f"layers.{layer}.attention."
        x_TD = rms_norm(x_TD, self.weight(name + "norm"), c.norm_eps)
        cos, sin = self._rope(positions_T)
        query_TX, query_name = self._query_input(name, x_TD)
        q_THC = self.linear(query_TX, query_name).unflatten(-1, (c.num_heads, -1))
        q_THN, q_THP = q_THC.split((c.nope_width, c.rotary_width), dim=-1)
        latents, keys = self.linear(x_TD, name + "latent_a").split(
            (c.latent_width, c.rotary_width), dim=-1
        )
        latents = rms_norm(latents, self.weight(name + "latent_norm"), _INNER_EPS)
        self.latents[layer] = torch.cat((self.latents[layer], latents))
        self.keys[layer] = torch.cat((self.keys[layer], rotate(keys, cos, sin)))
        out_TO = latent_attention(
            q_THN,
            rotate(q_THP, cos[:, None], sin[:, None]),
            self.latents[layer],
            self.keys[layer],
            self.weight(name + "latent_b").unflatten(0, (c.num_heads, -1)),
            self._seen(layer, x_TD, query_TX, positions_T),
            c.attention_scale,
        )
        return self.linear(out_TO, name + "out")

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x times a weight [rows, columns]."""
        return self._input_of(x, name) @ self.weight(name).T

    def _input_of(self, x: Tensor, name: str) -> Tensor:
        """x as a weight's projection takes it."""
        if name not in self.rounded:
            return x
        return rounded_to_e4m3(x, powers_of_two=self.config.power_of_two_scales)

    def _query_input(self, name: str, x_TD: Tensor) -> tuple[Tensor, str]:
        """What the queries are projected from, and the name of that projection."""
        if self.config.query_rank is None:
            return x_TD, name + "query"
        query_TR = self.linear(x_TD, name + "query_a")
        return rms_norm(query_TR, self.weight(name + "query_norm"), _INNER_EPS), name + "query_b"

    def _seen(self, layer: int, x_TD: Tensor, query_TX: Tensor, positions_T: Tensor) -> Tensor:
        """[T, S]: the cached tokens that each query attends to.

        x_TD, query_TX: the normed input of the attention, and what its queries come from
        """
        return causal_is_seen(positions_T, len(self.keys[layer]))

    def _rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, P / 2] fp32."""
        frequencies = inverse_frequencies(self.config.rope, self.config.rotary_width)
        angles = positions_T.double()[:, None] * frequencies.to(self.device)
        growth = self.config.rope_growth
        return (angles.cos() * growth).float(), (angles.sin() * growth).float()

    def _mlp(self, layer: int, x_TD: Tensor) -> Tensor:
        if layer >= self.config.num_dense_layers:
            return self._experts(f"layers.{layer}.moe.", x_TD)
        name = f"layers.{layer}.mlp."
        x_TD = rms_norm(x_TD, self.weight(name + "norm"), self.config.norm_eps)
        return self._gated_mlp(name, x_TD)

    def _experts(self, name: str, x_TD: Tensor) -> Tensor:
        x_TD = rms_norm(x_TD, self.weight(name + "norm"), self.config.norm_eps)
        weights_TK, ids_TK = self._route(name, x_TD @ self.weight(name + "router").T)
        out_TD = self._gated_mlp(name + "shared_", x_TD)
        x_TD = self._input_of(x_TD, name + "gate_up")
        for expert in ids_TK.unique().tolist():
            tokens, slots = (ids_TK == expert).nonzero(as_tuple=True)
            gate_up = decoded(self.weights[name + "gate_up"][expert])
            down = decoded(self.weights[name + "down"][expert])
            gate, up = (x_TD[tokens] @ gate_up.T).chunk(2, dim=-1)
            hidden = self._input_of(silu(gate) * up, name + "down")
            out_TD[tokens] += weights_TK[tokens, slots, None] * (hidden @ down.T)
        return out_TD

    def _route(self, name: str, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids of each token's experts, both [T, K]."""
        c = self.config
        scores_TE = logits_TE.softmax(dim=-1)
        limited_TE = limit_groups(
            scores_TE,
            num_groups=c.num_expert_groups,
            num_limited=c.num_limited_groups,
            best_of_group=1,
        )
        ids_TK = choose_experts(limited_TE, c.experts_per_token)
        return c.routed_scale * scores_TE.gather(1, ids_TK), ids_TK

    def _gated_mlp(self, name: str, x_TD: Tensor) -> Tensor:
        hidden = silu(self.linear(x_TD, name + "gate")) * self.linear(x_TD, name + "up")
        return self.linear(hidden, name + "down")
