"""Prefill: the prompt through all layers, a chunk of tokens at a time, filling the cache.

Dense projections are torch's own matrix products; norms, rope, attention and experts are our
kernels. The residual stream is fp32. Nothing waits for the device.

A matrix packed in FP8 is cast for each use into a buffer that all share, its scales multiply the
products: for a layer of gpt-oss 27 MB are read and 53 MB written, about 30 us on an H100.

T tokens of a chunk, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels import moe_gemm
from kernels.moe_gemm import add_expert_outputs, rows_per_block
from kernels.moe_routing import route_tokens
from kernels.persistent.pack import TiledExperts
from kernels.rms_norm import rms_norm
from kernels.rope_kv import rope_and_cache
from kernels.sink_attention_prefill import rows_per_program, sink_attention_prefill
from kernels.swiglu import Swiglu
from moe_runtime.cache import KVCache
from moe_runtime.config import ModelConfig
from moe_runtime.decode import LayerWeights, ModelWeights
from quant.tensor import QuantTensor


class Prefill:
    """Runs prompts; shares weights, cache and rope tables with the decode step."""

    may_pad = True

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        cache: KVCache,
        rope: tuple[Tensor, Tensor],
        chunk: int,
    ) -> None:
        self.config, self.weights, self.cache, self.rope = config, weights, cache, rope
        self.chunk = chunk
        self._gemm: ModuleType = moe_gemm
        if isinstance(weights.layers[0].gate_up, TiledExperts):
            from kernels.tile_gemm import launch as tile_gemm  # needs Gluon

            self._gemm = tile_gemm
        # Routing is decided in fp32, as the decode step does: a rounded logit flips experts.
        self._routers = [w.router.float() for w in weights.layers]
        self._router_biases = [w.router_bias.float() for w in weights.layers]
        self.dtype = weights.embedding.dtype  # of activations
        device = weights.embedding.device
        self._position = torch.zeros(1, dtype=torch.int32, device=device)
        packed = [m for w in weights.layers for m in (w.qkv, w.out) if isinstance(m, QuantTensor)]
        most = max((m.values.numel() for m in packed), default=config.model_width)
        self._plain = torch.empty(most, dtype=self.dtype, device=device)

    def run(self, token_ids: Tensor) -> Iterator[Tensor]:
        """Run ids [N] int64 from position 0; yields each chunk's residual [T, D] fp32."""
        for start in range(0, len(token_ids), self.chunk):
            self._position.fill_(start)
            x_TD = self.weights.embedding[token_ids[start : start + self.chunk]].float()
            for layer, weights in enumerate(self.weights.layers):
                self._attend(layer, weights, x_TD)
                self._mix_experts(layer, weights, x_TD)
            yield x_TD

    def head(self, x_TD: Tensor) -> Tensor:
        """Logits [T, V] of residual rows."""
        w = self.weights
        x_TD = rms_norm(x_TD, w.final_norm, self.config.norm_eps, self.dtype)
        if not isinstance(w.head, QuantTensor):
            return linear(x_TD, w.head)
        assert w.head.scales is not None
        logits_TV = torch.empty(len(x_TD), w.head.shape[0], device=x_TD.device)
        rows = self._plain.numel() // w.head.shape[1]
        for first in range(0, w.head.shape[0], rows):
            part = slice(first, first + rows)
            products = linear(x_TD, self._as_plain(w.head.values[part]))
            torch.mul(products, w.head.scales[part].T, out=logits_TV[:, part])
        return logits_TV

    def warm_up_lengths(self) -> list[int]:
        """One prompt length for every combination of kernel variants that a prompt can need."""
        c = self.config
        lengths: dict[tuple[int, int], int] = {}
        for tokens in range(1, self.chunk + 1):
            attention = rows_per_program(tokens, c.num_heads // c.num_kv_heads)
            experts = self._rows_per_block(tokens)
            lengths.setdefault((attention, experts), tokens)
        return list(lengths.values())

    def _rows_per_block(self, tokens: int) -> int:
        c, experts = self.config, self.weights.layers[0].gate_up
        if isinstance(experts, TiledExperts):
            return int(self._gemm.rows_per_block(tokens, c.experts_per_token, experts))
        return rows_per_block(tokens, c.experts_per_token, c.num_experts)

    def _attend(self, layer: int, w: LayerWeights, x_TD: Tensor) -> None:
        c = self.config
        normed_TD = rms_norm(x_TD, w.attention_norm, c.norm_eps, self.dtype)
        qkv = self._project(normed_TD, w.qkv, w.qkv_bias)
        k_cache, v_cache = self.cache.keys[layer], self.cache.values[layer]
        q_THC = k_cache.new_empty((len(x_TD), c.num_heads, c.head_width))
        cos, sin = self.rope
        rope_and_cache(qkv, cos, sin, self._position, k_cache, v_cache, q_THC)
        out = normed_TD.new_empty((len(x_TD), c.attention_width))
        window = c.sliding_window if c.layer_is_sliding[layer] else 0
        sink_attention_prefill(q_THC, k_cache, v_cache, w.sinks, self._position, out, window=window)
        x_TD += self._project(out, w.out, w.out_bias)

    def _project(self, x: Tensor, weight: Tensor | QuantTensor, bias: Tensor) -> Tensor:
        """x [T, K] times weight [N, K] plus bias: [T, N], in fp32 if the weight is packed."""
        if not isinstance(weight, QuantTensor):
            return linear(x, weight, bias)
        assert weight.scales is not None
        # The codes are exact in bf16; their scales would be rounded.
        products = linear(x, self._as_plain(weight.values))
        return torch.addcmul(bias.float(), products, weight.scales.T)

    def _as_plain(self, codes: Tensor) -> Tensor:
        """Codes of FP8 in the activations' dtype, exact; valid until the next call."""
        return self._plain[: codes.numel()].view(codes.shape).copy_(codes)

    def _mix_experts(self, layer: int, w: LayerWeights, x_TD: Tensor) -> None:
        c = self.config
        normed_TD = rms_norm(x_TD, w.moe_norm, c.norm_eps, torch.float32)
        logits_TE = linear(normed_TD, self._routers[layer], self._router_biases[layer])
        block_rows = self._rows_per_block(len(x_TD))
        routing = route_tokens(logits_TE, c.experts_per_token, block_rows)
        activation = Swiglu(c.swiglu_limit, c.swiglu_alpha, offset=1.0, alternating=True)
        rounded_TD = normed_TD.to(self.dtype)
        experts = w.gate_up, w.gate_up_bias
        hidden = self._gemm.moe_gemm_gate_up(rounded_TD, *experts, routing, activation)
        pairs = self._gemm.moe_gemm_down(hidden, w.down, w.down_bias, routing)
        add_expert_outputs(pairs, x_TD)
