"""The decode step of DeepSeek V4: one token in, the next token out, without the host.

A layer with an indexer is 19 launches, one without compressor 14; two of them end a block and begin
the next one, in which the residual streams are mixed. Rows, compressed rows, and the indexer's keys
are brought up to date on the way: what a token adds to a compressor is one of the launches, whether
or not it finishes a row. On CUDA all are captured once as a graph and replayed.

H heads, C row width, R query rank, G output groups, O output rank, I index heads, J index width,
K compressed rows that the indexer chooses, N streams, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.compressed_rows import compressed_rows
from kernels.gemv import embedding, gemv
from kernels.grouped_router import grouped_router
from kernels.hyper_connections import hyper_step, num_programs
from kernels.latent_index import cut_scratch, index_choose
from kernels.sampling import sample
from kernels.shared_row_attention import SPLITS, shared_row_attention_decode
from kernels.shared_rows import shared_rows
from kernels.swiglu import Swiglu
from moe_runtime.gpu.captured_step import CapturedStep
from moe_runtime.gpu.compressed_cache import CompressedCache
from moe_runtime.gpu.deepseek_v4_weights import HyperWeights, V4Attention, V4Layer, V4Weights
from moe_runtime.gpu.expert_launches import ExpertLaunches, Mixture, other_form
from moe_runtime.gpu.projections import project_token
from moe_runtime.models.deepseek_v4_config import INDEXED_RATIO, DeepseekV4Config


@dataclass(frozen=True)
class Ropes:
    """cos and sin, [positions, P / 2] fp32 each: of layers with a window alone, and of others."""

    window: tuple[Tensor, Tensor]
    compressed: tuple[Tensor, Tensor]

    def of(self, ratio: int) -> tuple[Tensor, Tensor]:
        """The rope of a layer of this ratio."""
        return self.compressed if ratio else self.window


@dataclass(frozen=True)
class IndexBuffers:
    """The indexer's buffers for one token."""

    query: Tensor  # [1, I, J] of the cache's dtype
    scores: Tensor  # [1, compressed rows]
    chosen: Tensor  # [1, K] int32
    cut: Tensor | None  # scratch, there if a context can have rows enough


class DeepseekV4Step(CapturedStep):
    """The kernels of one token; `residual` is the merged streams behind the last layer."""

    def __init__(
        self, config: DeepseekV4Config, weights: V4Weights, cache: CompressedCache, ropes: Ropes
    ) -> None:
        c = config
        device = weights.embedding.device
        self.config, self.weights, self.cache, self.ropes = config, weights, cache, ropes
        super().__init__(c.vocab_size, cache.max_context, device)
        cache_dtype = cache.layers[0].rows.dtype

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        mixing = c.streams * (2 + c.streams)
        self.residual = buffer(c.model_width)
        self._streams = buffer(c.streams, c.model_width)
        self._mix = buffer(c.streams * (1 + c.streams))
        self._partial = buffer(num_programs(c.model_width), mixing + 1)
        self._hyper_ticket = buffer(1, dtype=torch.int32)
        self._block_input = buffer(c.model_width)
        self._result = buffer(c.model_width)
        self._inputs = buffer(c.query_rank + c.head_width)
        compressors = 4 * (c.head_width + c.index_width) + c.index_heads
        self._compressed = buffer(compressors)
        queries = c.num_heads * c.head_width
        self._from_latent = buffer(queries + c.index_heads * c.index_width)
        self._queries = self._from_latent[:queries].view(1, c.num_heads, c.head_width)
        self._index_queries = self._from_latent[queries:].view(1, c.index_heads, c.index_width)
        self._query = buffer(1, c.num_heads, c.head_width, dtype=cache_dtype)
        self._index: IndexBuffers | None = None
        if chooses(c, cache.max_context):
            rows = -(-cache.max_context // INDEXED_RATIO)
            self._index = IndexBuffers(
                query=buffer(1, c.index_heads, c.index_width, dtype=cache_dtype),
                scores=buffer(1, rows),
                chosen=buffer(1, c.index_top_k, dtype=torch.int32),
                cut=cut_scratch(rows, device),
            )
        self._split_acc = buffer(c.num_heads, SPLITS, c.head_width)
        self._split_stats = buffer(c.num_heads, SPLITS, 2)
        self._attention = buffer(c.num_heads, c.head_width)
        self._grouped = buffer(c.output_groups * c.output_rank)
        self._experts = ExpertLaunches(c, Swiglu(c.swiglu_limit), device)
        self._mixtures = [self._experts.of_layer(w.routed, w.always) for w in weights.layers]
        self.logits = buffer(c.vocab_size)

    def step(self, *, filtered: bool) -> None:
        """Launch the kernels of one token."""
        w = self.weights
        embedding(self.state.token, w.embedding, self._result)
        for layer, weights in enumerate(w.layers):
            self._next_block(weights.attention_hyper, self._block_input, first=layer == 0)
            self._attend(layer, weights.attention)
            self._next_block(weights.moe_hyper, self._block_input)
            self._run_experts(weights, self._mixtures[layer])
        self._next_block(w.head_hyper, self.residual)
        self.sample_residual(filtered=filtered)

    def sample_residual(self, *, filtered: bool) -> None:
        """Logits of the residual, then one draw; moves the request one step on."""
        w = self.weights
        gemv(self.residual, w.head, self.logits, norm=w.final_norm, eps=self.config.norm_eps)
        sample(self.logits, self.state, filtered=filtered)

    @property
    def index_scores(self) -> Tensor | None:
        """The indexer's scratch, None where all compressed rows are seen."""
        return None if self._index is None else self._index.scores

    def _next_block(self, w: HyperWeights, out: Tensor, *, first: bool = False) -> None:
        """Write the result of the block before into the streams, and mix them for the next."""
        c = self.config
        hyper_step(
            self._streams,
            self._result,
            self._mix,
            w.function,
            w.base,
            w.scale,
            out,
            first=first,
            iterations=c.sinkhorn_iterations,
            eps=c.hyper_eps,
            norm_eps=c.norm_eps,
            partial=self._partial,
            ticket=self._hyper_ticket,
        )

    def _attend(self, layer: int, w: V4Attention) -> None:
        c, cache, position = self.config, self.cache.layers[layer], self.state.position
        ratio, x = c.compress_ratios[layer], self._block_input
        rope = self.ropes.of(ratio)
        project_token(x, w.inputs, self._inputs, w.norm, c.norm_eps)
        latent, row = self._inputs.split((c.query_rank, c.head_width))
        self._compress(layer, w)
        project_token(latent, w.queries, self._from_latent, w.query_norm, c.norm_eps)
        i = self._index if w.indexer is not None else None
        shared_rows(
            self._queries,
            row[None],
            w.row_norm,
            rope,
            position,
            cache.rows[: self.cache.slots],
            self._query,
            eps=c.norm_eps,
            index_q=None if i is None else self._index_queries,
            index_query=None if i is None else i.query,
        )
        shared_row_attention_decode(
            self._query[0],
            cache.rows,
            position,
            w.sinks,
            rope,
            self._attention,
            slots=self.cache.slots,
            window=c.sliding_window,
            ratio=ratio,
            acc=self._split_acc,
            stats=self._split_stats,
            chosen=self._choose_rows(layer, w),
        )
        gemv(self._attention.view(-1), w.out_a, self._grouped, groups=c.output_groups)
        gemv(self._grouped, w.out_b, self._result)

    def _compress(self, layer: int, w: V4Attention) -> None:
        """Give the token to the layer's compressors."""
        if w.compressor is None:
            return
        c, cache = self.config, self.cache.layers[layer]
        rope = self.ropes.compressed
        project_token(self._block_input, w.compressed, self._compressed, w.norm, c.norm_eps)
        first = 0
        for compressor, state, rows in (
            (w.compressor, cache.state, cache.rows[self.cache.slots :]),
            (w.indexer if self._index else None, cache.index_state, cache.index_keys),
        ):
            if compressor is None:
                continue
            assert state is not None and rows is not None
            taken = self._compressed[first : first + compressor.projected_width]
            first += compressor.projected_width
            compressed_rows(
                taken[None],
                compressor.position_bias,
                compressor.norm,
                rope,
                self.state.position,
                state,
                state,
                rows,
                eps=c.norm_eps,
            )

    def _choose_rows(self, layer: int, w: V4Attention) -> Tensor | None:
        """The compressed rows that the indexer lets the attention see, [K]; None: all."""
        i = self._index
        if i is None or w.indexer is None:
            return None
        assert w.compressor is not None
        behind = w.compressor.projected_width + w.indexer.projected_width
        head_weights = self._compressed[behind : behind + self.config.index_heads]
        keys = self.cache.layers[layer].index_keys
        assert keys is not None
        return index_choose(
            i.query,
            head_weights[None],
            keys,
            self.state.position,
            i.scores,
            i.chosen,
            ratio=INDEXED_RATIO,
            cut=i.cut,
        )[0]

    def _run_experts(self, w: V4Layer, mixtures: list[Mixture]) -> None:
        c, e = self.config, self._experts
        grouped_router(
            self._block_input,
            w.mlp_norm,
            w.router,
            w.router_bias,
            eps=c.norm_eps,
            scores="sqrtsoftplus",
            num_groups=1,
            num_limited=1,
            normalized=True,
            scale=c.routed_scale,
            logits=e.logits,
            ticket=e.ticket,
            expert_ids=e.ids,
            expert_weights=e.weights,
            packed=mixtures[0].packed,
            also=other_form(mixtures),
            token=self.state.token,
            table=w.hash_ids,
        )
        e.run(mixtures, self._result)


def chooses(config: DeepseekV4Config, max_context: int) -> bool:
    """Whether the indexer ever leaves out a row of a cache of this length."""
    indexed = INDEXED_RATIO in config.compress_ratios
    return indexed and max_context // INDEXED_RATIO > config.index_top_k
