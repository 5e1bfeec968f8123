"""Prefill of DeepSeek V2 to V3.2: the prompt through all layers, a chunk of tokens at a time.

Attention is in absorbed form here too, over the same cache as in decode: 3.4 times the operations
of expanded keys and values, but nothing is expanded, and up to a few thousand tokens the experts
take most of the time. Dense projections are torch's matrix products; routed experts are decoded
tile by tile. The residual is fp32. Nothing waits for the device.

T tokens of a chunk, D model width, H heads, L latent width, P rotary width, N and U widths of a
head's part without rope and of its values, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.latent_attention import latent_attention_prefill
from kernels.latent_cache import latent_cache
from kernels.latent_index import index_choose, index_rows
from kernels.moe_gemm import (
    add_expert_outputs,
    moe_gemm_down,
    moe_gemm_gate_up,
    rows_per_block,
)
from kernels.moe_routing import route_chosen
from kernels.rms_norm import rms_norm
from moe_runtime.gpu.deepseek_step import INNER_EPS, PLAIN_GATE
from moe_runtime.gpu.deepseek_weights import (
    AttentionWeights,
    LayerWeights,
    Matrix,
    ModelWeights,
)
from moe_runtime.gpu.latent_cache import LatentCache
from moe_runtime.gpu.projections import PromptProjections
from moe_runtime.layers.routing import choose_experts, limit_groups
from moe_runtime.models.deepseek_config import DeepseekConfig, Indexer

_MAX_SCORES = 1 << 24  # of the indexer at once: bounds the memory
_LEAST_SUM = 1e-20  # added to the sum of a token's weights


class DeepseekPrefill:
    """Runs prompts; shares weights, cache and rope tables with the decode step."""

    may_pad = True

    def __init__(
        self,
        config: DeepseekConfig,
        weights: ModelWeights,
        cache: LatentCache,
        rope: tuple[Tensor, Tensor],
        chunk: int,
    ) -> None:
        self.config, self.weights, self.cache, self.rope = config, weights, cache, rope
        self.chunk = chunk
        self.dtype = weights.embedding.dtype  # of activations
        device = weights.embedding.device
        self._position = torch.zeros(1, dtype=torch.int32, device=device)
        matrices = [weights.head, *(m for w in weights.layers for m in _matrices(w))]
        self._projections = PromptProjections(self.dtype, matrices, device)
        # A cache that the indexer would always choose whole needs none.
        self._indexed = config.indexer is not None and cache.max_context > config.indexer.top_k

    def run(self, token_ids: Tensor) -> Iterator[Tensor]:
        """Run ids [N] int64 from position 0; yields each chunk's residual [T, D] fp32."""
        for start in range(0, len(token_ids), self.chunk):
            self._position.fill_(start)
            x_TD = self.weights.embedding[token_ids[start : start + self.chunk]].float()
            for layer, weights in enumerate(self.weights.layers):
                self._attend(layer, weights.attention, x_TD, start)
                self._mix(weights, x_TD)
            yield x_TD

    def head(self, x_TD: Tensor) -> Tensor:
        """Logits [T, V] of residual rows."""
        w = self.weights
        x_TD = rms_norm(x_TD, w.final_norm, self.config.norm_eps, self.dtype)
        return self._projections.project(x_TD, (w.head,))

    def warm_up_lengths(self) -> list[int]:
        """One prompt length for every combination of kernel variants that a prompt can need."""
        c = self.config
        lengths: dict[int, int] = {}
        for tokens in range(1, self.chunk + 1):
            rows = rows_per_block(tokens, c.experts_per_token, c.num_experts)
            lengths.setdefault(rows, tokens)
        if c.indexer is not None and self._indexed:  # a chunk that does not see all before it
            lengths[-1] = c.indexer.top_k + 1
        return list(lengths.values())

    def _attend(self, layer: int, w: AttentionWeights, x_TD: Tensor, start: int) -> None:
        c = self.config
        tokens, cache = len(x_TD), self.cache.latents[layer]
        index = c.indexer or Indexer(0, 0, 0)
        cached_width = c.latent_width + c.rotary_width
        normed_TD = rms_norm(x_TD, w.norm, c.norm_eps, self.dtype)
        inputs = self._projections.project(normed_TD, w.inputs)
        query_width = inputs.shape[1] - index.width - cached_width
        queries, index_key, latent = inputs.split((query_width, index.width, cached_width), dim=1)
        if w.query_norm is not None:
            queries = rms_norm(queries.float().contiguous(), w.query_norm, INNER_EPS, self.dtype)
            queries = self._projections.project(queries, w.queries)
        index_width = index.heads * index.width
        queries, index_q = queries.split((queries.shape[1] - index_width, index_width), dim=1)
        chosen = self._choose_tokens(layer, w, normed_TD, index_q, index_key, start)
        q_THC = queries.contiguous().view(tokens, c.num_heads, -1)
        query = cache.new_empty((tokens, c.num_heads, cached_width))
        projection_HXL = self._projections.plain(w.projection).unflatten(0, (c.num_heads, -1))
        for_keys_HNL = projection_HXL[:, : c.nope_width]
        absorbed = torch.bmm(q_THC[..., : c.nope_width].transpose(0, 1), for_keys_HNL)
        query[..., : c.latent_width] = absorbed.transpose(0, 1)
        latent_cache(
            q_THC,
            latent.contiguous(),
            w.latent_norm,
            self.rope,
            self._position,
            cache,
            query,
            eps=INNER_EPS,
        )
        means_THL = query.new_empty((tokens, c.num_heads, c.latent_width))
        latent_attention_prefill(
            query, cache, self._position, means_THL, scale=c.attention_scale, chosen=chosen
        )
        for_values_HLU = projection_HXL[:, c.nope_width :].transpose(1, 2)
        values_HTU = torch.bmm(means_THL.transpose(0, 1).to(self.dtype), for_values_HLU)
        x_TD += self._projections.project(values_HTU.transpose(0, 1).flatten(1), (w.out,))

    def _choose_tokens(
        self,
        layer: int,
        w: AttentionWeights,
        normed_TD: Tensor,
        q: Tensor,
        key: Tensor,
        start: int,
    ) -> Tensor | None:
        """Cache the index keys; the tokens that each one of the chunk sees [T, C], None for all."""
        if not self._indexed:
            return None
        index, v = self.config.indexer, w.indexer
        assert index is not None and v is not None
        tokens, end = len(q), start + len(q)
        keys = self.cache.index_keys[layer]
        query = keys.new_empty((tokens, index.heads, index.width))
        raw = q.contiguous().view(query.shape), key.contiguous()
        index_rows(*raw, v.norm, v.norm_bias, self.rope, self._position, keys, query)
        if end <= index.top_k:
            return None
        weights = self._projections.project(normed_TD, (v.head_weights,)).float()
        chosen = torch.empty((tokens, index.top_k), dtype=torch.int32, device=q.device)
        at_once = max(1, _MAX_SCORES // end)
        for first in range(0, tokens, at_once):
            some = slice(first, first + at_once)
            scores = torch.empty((len(query[some]), end), device=q.device)
            position = self._position + first
            index_choose(query[some], weights[some], keys, position, scores, chosen[some])
        return chosen

    def _mix(self, w: LayerWeights, x_TD: Tensor) -> None:
        c = self.config
        normed_TD = rms_norm(x_TD, w.mlp_norm, c.norm_eps, torch.float32)
        rounded_TD = normed_TD.to(self.dtype)
        if w.router is not None and w.routed is not None:
            # Decided in fp32, as the decode step does: a rounded logit flips experts.
            logits_TE = linear(normed_TD, w.router.float())
            ids_TK, weights_TK = self._choose_experts(logits_TE, w.router_bias)
            block_rows = rows_per_block(len(x_TD), c.experts_per_token, c.num_experts)
            routing = route_chosen(ids_TK, weights_TK, c.num_experts, block_rows)
            hidden = moe_gemm_gate_up(rounded_TD, w.routed.gate_up, None, routing, PLAIN_GATE)
            add_expert_outputs(moe_gemm_down(hidden, w.routed.down, None, routing), x_TD)
        self._projections.add_gated(w.always, rounded_TD, x_TD, PLAIN_GATE)

    def _choose_experts(self, logits_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids [T, K] int32 and weights [T, K] fp32 of each token's experts."""
        c = self.config
        is_v2 = c.family == "deepseek_v2"
        scores_TE = logits_TE.softmax(dim=-1) if is_v2 else logits_TE.sigmoid()
        # NaN (weights that overflow) must not lead to an expert that does not exist.
        limited_TE = limit_groups(
            scores_TE if bias_E is None else scores_TE + bias_E.float(),
            num_groups=c.num_expert_groups,
            num_limited=c.num_limited_groups,
            best_of_group=1 if is_v2 else 2,
        ).nan_to_num(nan=float("-inf"), neginf=float("-inf"))
        ids_TK = choose_experts(limited_TE, c.experts_per_token)
        weights_TK = scores_TE.gather(1, ids_TK)
        if c.normalized:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + _LEAST_SUM)
        return ids_TK.to(torch.int32), c.routed_scale * weights_TK


def _matrices(w: LayerWeights) -> Iterator[Matrix]:
    """The matrices of a layer that are used whole; experts one at a time, their halves apart."""
    a = w.attention
    yield from (*a.inputs, *a.queries, a.projection, a.out, w.always.down[0])
