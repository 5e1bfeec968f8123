"""Prefill of DeepSeek V4: the prompt through all layers, a chunk of tokens at a time.

Rows, compressed rows, index keys and the compressors' states end up where the decode step goes on
with them. Dense projections are torch's matrix products; routed experts are decoded tile by tile.
The streams are fp32. Nothing waits for the device.

T tokens of a chunk, D model width, H heads, C row width, R query rank, G output groups, N streams,
I index heads, J index width, K experts a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from kernels.compressed_rows import compressed_rows
from kernels.hyper_connections import hyper_read, hyper_write
from kernels.latent_index import index_choose
from kernels.moe_gemm import (
    add_expert_outputs,
    moe_gemm_down,
    moe_gemm_gate_up,
    rows_per_block,
)
from kernels.moe_routing import route_chosen
from kernels.rms_norm import rms_norm
from kernels.shared_row_attention import shared_row_attention_prefill
from kernels.shared_rows import shared_rows
from kernels.swiglu import Swiglu
from moe_runtime.gpu.compressed_cache import CompressedCache
from moe_runtime.gpu.deepseek_v4_step import Ropes, chooses
from moe_runtime.gpu.deepseek_v4_weights import HyperWeights, V4Attention, V4Layer, V4Weights
from moe_runtime.gpu.deepseek_weights import Matrix
from moe_runtime.gpu.projections import PromptProjections
from moe_runtime.layers.routing import choose_experts
from moe_runtime.models.deepseek_v4_config import INDEXED_RATIO, DeepseekV4Config

_MAX_SCORES = 1 << 24  # of the indexer at once: bounds the memory
_LEAST_SUM = 1e-20  # added to the sum of a token's scores


class DeepseekV4Prefill:
    """Runs prompts; shares weights, cache and rope tables with the decode step."""

    may_pad = False  # compressors' states are of the last token

    def __init__(
        self,
        config: DeepseekV4Config,
        weights: V4Weights,
        cache: CompressedCache,
        ropes: Ropes,
        chunk: int,
    ) -> None:
        self.config, self.weights, self.cache, self.ropes = config, weights, cache, ropes
        self.chunk = chunk
        self.dtype = weights.embedding.dtype  # of activations
        device = weights.embedding.device
        self._position = torch.zeros(1, dtype=torch.int32, device=device)
        self._activation = Swiglu(config.swiglu_limit)
        self._indexed = chooses(config, cache.max_context)
        matrices = [weights.head, *(m for w in weights.layers for m in _matrices(w))]
        self._projections = PromptProjections(self.dtype, matrices, device)

    def run(self, token_ids: Tensor) -> Iterator[Tensor]:
        """Run ids [N] int64 from position 0; yields each chunk's merged streams [T, D] fp32."""
        c = self.config
        for start in range(0, len(token_ids), self.chunk):
            self._position.fill_(start)
            ids_T = token_ids[start : start + self.chunk]
            x_TD = self.weights.embedding[ids_T].float()
            streams_TND = x_TD[:, None].repeat(1, c.streams, 1)
            mix = streams_TND.new_empty((len(ids_T), c.streams * (1 + c.streams)))
            for layer, w in enumerate(self.weights.layers):
                x_TD = self._read(w.attention_hyper, streams_TND, mix)
                hyper_write(streams_TND, self._attend(layer, w.attention, x_TD, start), mix)
                x_TD = self._read(w.moe_hyper, streams_TND, mix)
                hyper_write(streams_TND, self._run_experts(w, x_TD, ids_T), mix)
            yield self._read(self.weights.head_hyper, streams_TND, mix)

    def head(self, x_TD: Tensor) -> Tensor:
        """Logits [T, V] of merged streams."""
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
        if self._indexed:  # a chunk that does not see all compressed rows before it
            lengths[-1] = INDEXED_RATIO * (c.index_top_k + 1)
        return list(lengths.values())

    def _read(self, w: HyperWeights, streams_TND: Tensor, mix: Tensor) -> Tensor:
        """What a block is given; how its result is written back stands in `mix` then."""
        c = self.config
        z = linear(streams_TND.flatten(1), w.function.float())
        return hyper_read(
            streams_TND,
            z,
            w.base,
            w.scale,
            mix,
            iterations=c.sinkhorn_iterations,
            eps=c.hyper_eps,
            norm_eps=c.norm_eps,
        )

    def _attend(self, layer: int, w: V4Attention, x_TD: Tensor, start: int) -> Tensor:
        c, cache, slots = self.config, self.cache.layers[layer], self.cache.slots
        ratio, tokens, projections = c.compress_ratios[layer], len(x_TD), self._projections
        rope = self.ropes.of(ratio)
        normed_TD = rms_norm(x_TD, w.norm, c.norm_eps, self.dtype)
        inputs = projections.project(normed_TD, w.inputs)
        latent, row_TC = inputs.split((c.query_rank, c.head_width), dim=1)
        latent = rms_norm(latent.float().contiguous(), w.query_norm, c.norm_eps, self.dtype)
        queries = projections.project(latent, w.queries)
        width = c.num_heads * c.head_width
        q_THC = queries[:, :width].unflatten(1, (c.num_heads, c.head_width))
        index_q = index_query = None
        if w.indexer is not None and self._indexed:
            index_q = queries[:, width:].unflatten(1, (c.index_heads, c.index_width))
            index_query = cache.rows.new_empty(index_q.shape)
        query_THC = cache.rows.new_empty(q_THC.shape)
        shared_rows(
            q_THC,
            row_TC,
            w.row_norm,
            rope,
            self._position,
            cache.rows[:slots],
            query_THC,
            eps=c.norm_eps,
            index_q=index_q,
            index_query=index_query,
        )
        head_weights = self._compress(layer, w, normed_TD)
        out_THC = torch.empty_like(q_THC, dtype=self.dtype, memory_format=torch.contiguous_format)
        shared_row_attention_prefill(
            query_THC,
            cache.rows,
            self._position,
            w.sinks,
            rope,
            out_THC,
            slots=slots,
            window=c.sliding_window,
            ratio=ratio,
            chosen=self._choose_rows(layer, index_query, head_weights, start + tokens),
        )
        groups_GTY = out_THC.view(tokens, c.output_groups, -1).transpose(0, 1)
        out_a = projections.plain(w.out_a).unflatten(0, (c.output_groups, -1))
        grouped = torch.bmm(groups_GTY, out_a.transpose(1, 2))
        return projections.project(grouped.transpose(0, 1).flatten(1), (w.out_b,))

    def _compress(self, layer: int, w: V4Attention, normed_TD: Tensor) -> Tensor:
        """Give the tokens to the layer's compressors; returns what is behind their projections:
        weights of the index heads [T, I]."""
        c, cache = self.config, self.cache.layers[layer]
        if w.compressor is None:
            return normed_TD[:, :0]
        taken = self._projections.project(normed_TD, w.compressed)
        for compressor, state, rows in (
            (w.compressor, cache.state, cache.rows[self.cache.slots :]),
            (w.indexer, cache.index_state, cache.index_keys),
        ):
            if compressor is None:
                continue
            assert state is not None and rows is not None
            width = compressor.projected_width
            compressed_rows(
                taken[:, :width],
                compressor.position_bias,
                compressor.norm,
                self.ropes.compressed,
                self._position,
                state.clone(),
                state,
                rows,
                eps=c.norm_eps,
            )
            taken = taken[:, width:]
        return taken

    def _choose_rows(
        self, layer: int, index_query: Tensor | None, head_weights: Tensor, end: int
    ) -> Tensor | None:
        """The compressed rows that each token of the chunk sees [T, K], None for all.

        end: position behind the chunk's last token
        """
        c, keys = self.config, self.cache.layers[layer].index_keys
        seen = end // INDEXED_RATIO
        if index_query is None or keys is None or seen <= c.index_top_k:
            return None
        tokens = len(index_query)
        weights = head_weights.float().contiguous()
        chosen = torch.empty((tokens, c.index_top_k), dtype=torch.int32, device=keys.device)
        at_once = max(1, _MAX_SCORES // seen)
        for first in range(0, tokens, at_once):
            some = slice(first, first + at_once)
            scores = torch.empty((len(chosen[some]), seen), device=keys.device)
            index_choose(
                index_query[some],
                weights[some],
                keys,
                self._position + first,
                scores,
                chosen[some],
                ratio=INDEXED_RATIO,
            )
        return chosen

    def _run_experts(self, w: V4Layer, x_TD: Tensor, ids_T: Tensor) -> Tensor:
        """Routed and shared experts, [T, D] fp32."""
        c = self.config
        normed_TD = rms_norm(x_TD, w.mlp_norm, c.norm_eps, torch.float32)
        rounded_TD = normed_TD.to(self.dtype)
        # Decided in fp32, as the decode step does: a rounded logit flips experts.
        scores_TE = softplus(linear(normed_TD, w.router.float())).sqrt()
        ids_TK, weights_TK = self._choose_experts(w, scores_TE, ids_T)
        block_rows = rows_per_block(len(x_TD), c.experts_per_token, c.num_experts)
        routing = route_chosen(ids_TK, weights_TK, c.num_experts, block_rows)
        hidden = moe_gemm_gate_up(rounded_TD, w.routed.gate_up, None, routing, self._activation)
        out_TD = torch.zeros_like(x_TD)
        add_expert_outputs(moe_gemm_down(hidden, w.routed.down, None, routing), out_TD)
        self._projections.add_gated(w.always, rounded_TD, out_TD, self._activation)
        return out_TD

    def _choose_experts(
        self, w: V4Layer, scores_TE: Tensor, ids_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Ids [T, K] int32 and weights [T, K] fp32 of each token's experts."""
        if w.hash_ids is not None:
            ids_TK = w.hash_ids[ids_T].long()
        else:
            biased_TE = scores_TE if w.router_bias is None else scores_TE + w.router_bias.float()
            # NaN (weights that overflow) must not lead to an expert that does not exist.
            biased_TE = biased_TE.nan_to_num(nan=float("-inf"), neginf=float("-inf"))
            ids_TK = choose_experts(biased_TE, self.config.experts_per_token)
        weights_TK = scores_TE.gather(1, ids_TK)
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + _LEAST_SUM)
        return ids_TK.to(torch.int32), self.config.routed_scale * weights_TK


def _matrices(w: V4Layer) -> Iterator[Matrix]:
    """The matrices of a layer that are used whole; experts one at a time, their halves apart."""
    a = w.attention
    yield from (*a.inputs, *a.compressed, *a.queries, a.out_a, a.out_b, w.always.down[0])
