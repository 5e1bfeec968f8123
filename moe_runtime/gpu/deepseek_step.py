"""The decode step of DeepSeek V2 to V3.2: one token in, the next token out, without the host.

A layer with experts is nine launches: two for the projections of the attention, three for the
attention in the cache of latents, its output, the router, and two for the experts, shared ones with
the routed where their formats and widths are equal. V3.2's indexer takes four more. On CUDA all are
captured once as a graph and replayed.

H heads, L latent width, P rotary width, I index heads, J index width, C tokens that they choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gemv import embedding, gemv
from kernels.grouped_router import grouped_router, norm_and_pack
from kernels.latent_attention import latent_attention_decode, num_splits
from kernels.latent_cache import latent_query
from kernels.latent_index import index_choose, index_rows
from kernels.moe_gemv import can_join, moe_down, moe_gate_up
from kernels.packed_vector import PackedVectors, activation_scale, packed_vectors, takes_digits
from kernels.sampling import sample
from kernels.swiglu import Swiglu
from moe_runtime.gpu.captured_step import CapturedStep
from moe_runtime.gpu.deepseek_weights import (
    AttentionWeights,
    GatedExperts,
    LayerWeights,
    Matrix,
    ModelWeights,
)
from moe_runtime.gpu.latent_cache import LatentCache
from moe_runtime.models.deepseek_config import DeepseekConfig, Indexer

INNER_EPS = 1e-6  # of norms within the attention, whatever the config says
PLAIN_GATE = Swiglu()


@dataclass(frozen=True)
class Mixture:
    """Experts of one stack, with the buffers of one token."""

    experts: GatedExperts
    always: GatedExperts | None  # taken besides, by every token
    packed: PackedVectors  # the normed token
    hidden: PackedVectors  # between the experts' halves
    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class IndexBuffers:
    """The indexer's buffers for one token."""

    raw_key: Tensor  # [1, J], as projected
    raw_query: Tensor  # [1, I, J], as projected
    query: Tensor  # [1, I, J] of the cache's dtype
    head_weights: Tensor  # [1, I]
    scores: Tensor  # [1, positions]
    chosen: Tensor  # [1, C] int32


class DeepseekStep(CapturedStep):
    """The kernels of one token.

    rope:  cos and sin, [positions, P / 2] fp32
    """

    def __init__(
        self,
        config: DeepseekConfig,
        weights: ModelWeights,
        cache: LatentCache,
        rope: tuple[Tensor, Tensor],
    ) -> None:
        c = config
        device = weights.embedding.device
        self.config, self.weights, self.cache, self.rope = config, weights, cache, rope
        super().__init__(c.vocab_size, cache.max_context, device)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        cached_width = c.latent_width + c.rotary_width
        query_rows = c.num_heads * (c.nope_width + c.rotary_width)
        self.residual = buffer(c.model_width)
        index = c.indexer or Indexer(0, 0, 0)
        self._inputs = buffer((c.query_rank or query_rows) + index.width + cached_width)
        self._from_latent = buffer(query_rows + index.heads * index.width)
        queries = self._from_latent if c.query_rank else self._inputs
        self._queries = queries[:query_rows].view(c.num_heads, -1)
        self._latent = self._inputs[-cached_width:]
        self._query = buffer(c.num_heads, cached_width, dtype=cache.latents[0].dtype)
        # A cache that the indexer would always choose whole needs none.
        self._index: IndexBuffers | None = None
        if c.indexer is not None and cache.max_context > index.top_k:
            self._index = IndexBuffers(
                raw_key=self._inputs[c.query_rank :][: index.width].view(1, -1),
                raw_query=self._from_latent[query_rows:].view(1, index.heads, -1),
                query=buffer(1, index.heads, index.width, dtype=cache.latents[0].dtype),
                head_weights=buffer(1, index.heads),
                scores=buffer(1, cache.max_context),
                chosen=buffer(1, index.top_k, dtype=torch.int32),
            )
        splits = num_splits(c.num_heads)
        self._split_acc = buffer(c.num_heads, splits, c.latent_width)
        self._split_stats = buffer(c.num_heads, splits, 2)
        self._attention = buffer(c.num_heads, c.value_width)
        self._router_logits = buffer(c.num_experts)
        self._router_ticket = buffer(1, dtype=torch.int32)
        self._expert_ids = buffer(c.experts_per_token, dtype=torch.int32)
        self._expert_weights = buffer(c.experts_per_token)
        self._vectors: dict[tuple[object, ...], PackedVectors] = {}
        self._layer_mixtures = [self._mixtures(w) for w in weights.layers]
        self.logits = buffer(c.vocab_size)

    def step(self, *, filtered: bool) -> None:
        """Launch the kernels of one token."""
        embedding(self.state.token, self.weights.embedding, self.residual)
        for layer, weights in enumerate(self.weights.layers):
            self._attend(layer, weights.attention)
            self._mix(weights, self._layer_mixtures[layer])
        self.sample_residual(filtered=filtered)

    def sample_residual(self, *, filtered: bool) -> None:
        """Logits of the residual, then one draw; moves the request one step on."""
        w = self.weights
        gemv(self.residual, w.head, self.logits, norm=w.final_norm, eps=self.config.norm_eps)
        sample(self.logits, self.state, filtered=filtered)

    @property
    def index_scores(self) -> Tensor | None:
        """The indexer's scratch, None where all tokens are seen."""
        return None if self._index is None else self._index.scores

    def _attend(self, layer: int, w: AttentionWeights) -> None:
        c = self.config
        cache = self.cache.latents[layer]
        _project(self.residual, w.inputs, self._inputs, w.norm, c.norm_eps)
        if w.query_norm is not None:
            latent = self._inputs[: c.query_rank]
            _project(latent, w.queries, self._from_latent, w.query_norm, INNER_EPS)
        chosen = self._choose_tokens(layer, w)
        latent_query(
            self._queries,
            self._latent,
            w.latent_norm,
            w.projection,
            self.rope,
            self.state.position,
            cache,
            self._query,
            eps=INNER_EPS,
        )
        latent_attention_decode(
            self._query,
            cache,
            self.state.position,
            w.projection,
            self._attention,
            scale=c.attention_scale,
            acc=self._split_acc,
            stats=self._split_stats,
            chosen=chosen,
        )
        gemv(self._attention.view(-1), w.out, self.residual, add=True)

    def _choose_tokens(self, layer: int, w: AttentionWeights) -> Tensor | None:
        """The cached tokens that the indexer lets the attention see, [C]; None: all."""
        i = self._index
        if i is None or w.indexer is None:
            return None
        eps = self.config.norm_eps
        gemv(self.residual, w.indexer.head_weights, i.head_weights[0], norm=w.norm, eps=eps)
        keys = self.cache.index_keys[layer]
        position = self.state.position
        norms = w.indexer.norm, w.indexer.norm_bias
        index_rows(i.raw_query, i.raw_key, *norms, self.rope, position, keys, i.query)
        return index_choose(i.query, i.head_weights, keys, position, i.scores, i.chosen)[0]

    def _mix(self, w: LayerWeights, mixtures: Sequence[Mixture]) -> None:
        c = self.config
        first, last = mixtures[0], mixtures[-1]
        if w.router is None or first.packed is not last.packed:
            norm_and_pack(self.residual, w.mlp_norm, last.packed, eps=c.norm_eps)
        if w.router is not None:
            grouped_router(
                self.residual,
                w.mlp_norm,
                w.router,
                w.router_bias,
                eps=c.norm_eps,
                scores="softmax" if c.family == "deepseek_v2" else "sigmoid",
                num_groups=c.num_expert_groups,
                num_limited=c.num_limited_groups,
                normalized=c.normalized,
                scale=c.routed_scale,
                logits=self._router_logits,
                ticket=self._router_ticket,
                expert_ids=first.ids,
                expert_weights=first.weights,
                packed=first.packed,
            )
        for m in mixtures:
            always = None if m.always is None else m.always.gate_up
            gate_up = m.experts.gate_up
            moe_gate_up(m.packed, gate_up, None, m.ids, m.hidden, PLAIN_GATE, always=always)
        for m in mixtures:
            always = None if m.always is None else m.always.down
            down = m.experts.down
            moe_down(m.hidden, down, None, m.ids, m.weights, self.residual, always=always)

    def _mixtures(self, w: LayerWeights) -> list[Mixture]:
        """The launches of a layer's experts: routed ones first, if it has any; the others with
        them where that is possible, else after them."""
        device = self.residual.device
        count = w.always.gate_up.shape[0]
        own = (
            torch.arange(count, dtype=torch.int32, device=device),
            torch.ones(count, device=device),
        )
        if w.routed is None:
            return [self._mixture(w.always, None, *own)]
        chosen = self._expert_ids, self._expert_weights
        joined = can_join(w.routed.gate_up, w.always.gate_up)
        if joined and can_join(w.routed.down, w.always.down):
            return [self._mixture(w.routed, w.always, *chosen)]
        return [self._mixture(w.routed, None, *chosen), self._mixture(w.always, None, *own)]

    def _mixture(
        self, experts: GatedExperts, always: GatedExperts | None, ids: Tensor, weights: Tensor
    ) -> Mixture:
        """With its buffers, which all layers share; routed and others are there at once."""
        c, device = self.config, self.residual.device
        outer, inner = experts.gate_up.format, experts.down.format
        packed_key = (takes_digits(outer),)
        if packed_key not in self._vectors:
            self._vectors[packed_key] = packed_vectors(outer, 1, c.model_width, device)
        count = len(ids) + (0 if always is None else always.gate_up.shape[0])
        hidden_key = (ids is self._expert_ids, takes_digits(inner), count, experts.width)
        if hidden_key not in self._vectors:
            unscale = 1.0 / activation_scale(PLAIN_GATE.limit)
            self._vectors[hidden_key] = packed_vectors(inner, count, experts.width, device, unscale)
        vectors = self._vectors[packed_key], self._vectors[hidden_key]
        return Mixture(experts, always, *vectors, ids, weights)


def _project(x: Tensor, weights: Sequence[Matrix], out: Tensor, norm: Tensor, eps: float) -> None:
    """Projections of the same normed vector, one after the other in `out`."""
    first = 0
    for weight in weights:
        rows = weight.shape[0]
        gemv(x, weight, out[first : first + rows], norm=norm, eps=eps)
        first += rows
