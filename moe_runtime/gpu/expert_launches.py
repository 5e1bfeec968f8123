"""The launches of one token's experts: routed and always taken ones, and the buffers they share.

Experts that every token takes go with the routed ones where formats and widths are equal, else in
launches of their own. Layers without a router have those alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.moe_gemv import can_join, moe_down, moe_gate_up
from kernels.packed_vector import PackedVectors, activation_scale, packed_vectors, takes_digits
from kernels.swiglu import Swiglu
from moe_runtime.config import DecoderConfig
from moe_runtime.gpu.deepseek_weights import GatedExperts


@dataclass(frozen=True)
class Mixture:
    """Experts of one stack, with the buffers of one token."""

    experts: GatedExperts
    always: GatedExperts | None  # taken besides, by every token
    packed: PackedVectors  # the normed token
    hidden: PackedVectors  # between the experts' halves
    ids: Tensor
    weights: Tensor


class ExpertLaunches:
    """Buffers of one token that all layers share, and the launches that use them.

    ids, weights:  [K] of the router's choice
    logits, ticket: its scratch
    """

    def __init__(self, config: DecoderConfig, activation: Swiglu, device: torch.device) -> None:
        self.activation = activation
        self._config, self._device = config, device
        self.logits = torch.zeros(config.num_experts, device=device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self.ids = torch.zeros(config.experts_per_token, dtype=torch.int32, device=device)
        self.weights = torch.zeros(config.experts_per_token, device=device)
        self._vectors: dict[tuple[object, ...], PackedVectors] = {}

    def of_layer(self, routed: GatedExperts | None, always: GatedExperts) -> list[Mixture]:
        """What `run` launches for a layer: routed experts first, if it has any; the others with
        them where that is possible, else after them."""
        count = always.gate_up.shape[0]
        own = (
            torch.arange(count, dtype=torch.int32, device=self._device),
            torch.ones(count, device=self._device),
        )
        if routed is None:
            return [self._mixture(always, None, *own)]
        chosen = self.ids, self.weights
        joined = can_join(routed.gate_up, always.gate_up)
        if joined and can_join(routed.down, always.down):
            return [self._mixture(routed, always, *chosen)]
        return [self._mixture(routed, None, *chosen), self._mixture(always, None, *own)]

    def run(self, mixtures: Sequence[Mixture], out: Tensor) -> None:
        """Add a layer's experts to out [D] fp32; their packed vectors are there."""
        for m in mixtures:
            always = None if m.always is None else m.always.gate_up
            gate_up = m.experts.gate_up
            moe_gate_up(
                m.packed, gate_up, None, m.ids, m.hidden, self.activation,
                always=always, in_order=m.ids is not self.ids,
            )  # fmt: skip
        for m in mixtures:
            always = None if m.always is None else m.always.down
            moe_down(m.hidden, m.experts.down, None, m.ids, m.weights, out, always=always)

    def _mixture(
        self, experts: GatedExperts, always: GatedExperts | None, ids: Tensor, weights: Tensor
    ) -> Mixture:
        """With its buffers, which all layers share; routed and others are there at once."""
        device, width = self._device, self._config.model_width
        outer, inner = experts.gate_up.format, experts.down.format
        packed_key = (takes_digits(outer),)
        if packed_key not in self._vectors:
            self._vectors[packed_key] = packed_vectors(outer, 1, width, device)
        count = len(ids) + (0 if always is None else always.gate_up.shape[0])
        hidden_key = (ids is self.ids, takes_digits(inner), count, experts.width)
        if hidden_key not in self._vectors:
            unscale = 1.0 / activation_scale(self.activation.limit)
            self._vectors[hidden_key] = packed_vectors(inner, count, experts.width, device, unscale)
        vectors = self._vectors[packed_key], self._vectors[hidden_key]
        return Mixture(experts, always, *vectors, ids, weights)


def other_form(mixtures: Sequence[Mixture]) -> PackedVectors | None:
    """The packed vector that a layer's last launch takes, if it is not that of the first."""
    first, last = mixtures[0].packed, mixtures[-1].packed
    return None if first is last else last
