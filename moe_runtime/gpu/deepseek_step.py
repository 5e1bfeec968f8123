"""The decode step of DeepSeek V2 to V3.2: one token in, the next token out, without the host.

A layer with experts is ten launches: two for the projections of the attention, four for the
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
from kernels.latent_index import cut_scratch, index_choose, index_rows
from kernels.sampling import sample
from kernels.swiglu import Swiglu
from moe_runtime.gpu.captured_step import CapturedStep
from moe_runtime.gpu.deepseek_weights import (
    AttentionWeights,
    LayerWeights,
    ModelWeights,
)
from moe_runtime.gpu.expert_launches import ExpertLaunches, Mixture, other_form
from moe_runtime.gpu.latent_cache import LatentCache
from moe_runtime.gpu.projections import project_token
from moe_runtime.models.deepseek_config import DeepseekConfig, Indexer

INNER_EPS = 1e-6  # of norms within the attention, whatever the config says
PLAIN_GATE = Swiglu()


@dataclass(frozen=True)
class IndexBuffers:
    """The indexer's buffers for one token."""

    raw_key: Tensor  # [1, J], as projected
    raw_query: Tensor  # [1, I, J], as projected
    query: Tensor  # [1, I, J] of the cache's dtype
    head_weights: Tensor  # [1, I]
    scores: Tensor  # [1, positions]
    chosen: Tensor  # [1, C] int32
    cut: Tensor | None  # scratch, there if a context can have rows enough


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
                cut=cut_scratch(cache.max_context, device),
            )
        splits = num_splits(c.num_heads)
        self.split_acc = buffer(c.num_heads, splits, c.latent_width)
        self._split_stats = buffer(c.num_heads, splits, 2)
        self._attention = buffer(c.num_heads, c.value_width)
        self._experts = ExpertLaunches(c, PLAIN_GATE, device)
        self._mixtures = [self._experts.of_layer(w.routed, w.always) for w in weights.layers]
        self.logits = buffer(c.vocab_size)

    def step(self, *, filtered: bool) -> None:
        """Launch the kernels of one token."""
        embedding(self.state.token, self.weights.embedding, self.residual)
        for layer, weights in enumerate(self.weights.layers):
            self._attend(layer, weights.attention)
            self._mix(weights, self._mixtures[layer])
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
        project_token(self.residual, w.inputs, self._inputs, w.norm, c.norm_eps)
        if w.query_norm is not None:
            latent = self._inputs[: c.query_rank]
            project_token(latent, w.queries, self._from_latent, w.query_norm, INNER_EPS)
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
            acc=self.split_acc,
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
        weights, scores = i.head_weights, i.scores
        return index_choose(i.query, weights, keys, position, scores, i.chosen, cut=i.cut)[0]

    def _mix(self, w: LayerWeights, mixtures: Sequence[Mixture]) -> None:
        c, e = self.config, self._experts
        if w.router is None:
            norm_and_pack(self.residual, w.mlp_norm, mixtures[0].packed, eps=c.norm_eps)
        else:
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
                logits=e.logits,
                ticket=e.ticket,
                expert_ids=e.ids,
                expert_weights=e.weights,
                packed=mixtures[0].packed,
                also=other_form(mixtures),
            )
        e.run(mixtures, self.residual)
