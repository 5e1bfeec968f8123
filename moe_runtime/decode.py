"""The decode step: one token in, the next token out, without the host.

step() launches, for every layer, seven kernels; on CUDA it is captured once as a graph and
replayed. Every buffer is allocated here, once: a captured graph keeps addresses.

Buffers, all on the device: residual [D] fp32 is the stream through the layers; the request's
state (token, position, step, settings) is SamplingState, which the last kernel moves on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gemv import embedding, gemv
from kernels.moe_gemv import moe_down, moe_gate_up
from kernels.packed_vector import activation_scale, packed_vectors
from kernels.persistent.formats import EXPERT_TILES
from kernels.persistent.pack import TiledExperts, tiles_of
from kernels.router_topk import router_topk
from kernels.sampling import sample
from kernels.sink_attention_decode import SPLITS, head_group, sink_attention_decode
from kernels.swiglu import Swiglu
from loaders.logical_schemes import scale_shape
from moe_runtime.cache import KVCache
from moe_runtime.config import ModelConfig
from moe_runtime.gpu.captured_step import CapturedStep
from quant.formats import BF16, MXFP4, QuantFormat
from quant.tensor import QuantTensor


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights as the kernels read them: experts as published, qkv and out in bf16 or
    packed by rows in FP8, all else bf16."""

    attention_norm: Tensor
    qkv: Tensor | QuantTensor
    qkv_bias: Tensor
    sinks: Tensor
    out: Tensor | QuantTensor
    out_bias: Tensor
    moe_norm: Tensor
    router: Tensor
    router_bias: Tensor
    gate_up: QuantTensor | TiledExperts
    gate_up_bias: Tensor
    down: QuantTensor | TiledExperts
    down_bias: Tensor


@dataclass(frozen=True)
class ModelWeights:
    """All weights of a GPT-OSS model on one device."""

    embedding: Tensor
    final_norm: Tensor
    head: Tensor | QuantTensor
    layers: list[LayerWeights]

    @classmethod
    def from_named(
        cls, weights: dict[str, Tensor | QuantTensor], config: ModelConfig
    ) -> ModelWeights:
        """Gather the loader's names into the order of use."""

        def dense(name: str) -> Tensor:
            tensor = weights[name]
            assert isinstance(tensor, Tensor), name
            return tensor

        def experts(name: str) -> QuantTensor | TiledExperts:
            tensor = weights[name]
            if isinstance(tensor, QuantTensor | TiledExperts):
                return tensor
            return QuantTensor(tensor, None, BF16, tuple(tensor.shape))

        layers = []
        for i in range(config.num_layers):
            attention, moe = f"layers.{i}.attention.", f"layers.{i}.moe."
            layers.append(
                LayerWeights(
                    attention_norm=dense(attention + "norm"),
                    qkv=weights[attention + "qkv"],
                    qkv_bias=dense(attention + "qkv_bias"),
                    sinks=dense(attention + "sinks"),
                    out=weights[attention + "out"],
                    out_bias=dense(attention + "out_bias"),
                    moe_norm=dense(moe + "norm"),
                    router=dense(moe + "router"),
                    router_bias=dense(moe + "router_bias"),
                    gate_up=experts(moe + "gate_up"),
                    gate_up_bias=dense(moe + "gate_up_bias"),
                    down=experts(moe + "down"),
                    down_bias=dense(moe + "down_bias"),
                )
            )
        return cls(dense("embedding"), dense("final_norm"), weights["head"], layers)


def zero_weights(
    config: ModelConfig,
    device: torch.device,
    expert_formats: tuple[QuantFormat, QuantFormat] = (MXFP4, MXFP4),
    dense_format: QuantFormat | None = None,
    *,
    tiled: bool = False,
) -> ModelWeights:
    """Weights of zeros of one layer, used for all: to run kernels before the real ones are read.

    expert_formats: of gate_up and of down
    dense_format:   of what moe_runtime/dense_format.py packs; None: bf16
    tiled:          whether experts are in tiles
    A router of zeros takes the first K experts, so no others are allocated.
    """
    c = config

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)

    table = zeros(c.vocab_size, c.model_width)

    def projection(rows: int, columns: int) -> Tensor | QuantTensor:
        if dense_format is None:
            return table if rows == c.vocab_size else zeros(rows, columns)
        # The head's zeros are those of the embedding: the largest matrices are there once.
        fits = rows * columns <= table.numel()
        memory = table if fits else zeros(rows, columns)
        values = memory.view(dense_format.value_dtype).view(-1)[: rows * columns]
        scales = torch.zeros(rows, 1, device=device)
        return QuantTensor(values.view(rows, columns), scales, dense_format, (rows, columns))

    half_tiles = [
        tiles_of(rows, columns)
        for rows, columns in ((2 * c.expert_width, c.model_width), (c.model_width, c.expert_width))
    ]
    tiles = torch.zeros(0, dtype=torch.uint8, device=device)
    if tiled:
        tile_bytes = EXPERT_TILES[expert_formats[0].name].bytes
        tiles = tiles.new_zeros((c.experts_per_token, sum(half_tiles), tile_bytes))

    def experts(half: int, rows: int, columns: int) -> QuantTensor | TiledExperts:
        format = expert_formats[half]
        if tiled:
            return TiledExperts(tiles, half * half_tiles[0], (c.num_experts, rows, columns), format)
        shape = (c.experts_per_token, rows, columns)
        packed = (*shape[:2], columns // format.values_per_byte)
        values = torch.zeros(packed, dtype=format.value_dtype, device=device)
        scales = whole = None
        if format.scale_dtype is not None:
            scales = torch.zeros(
                scale_shape(format, shape), dtype=format.scale_dtype, device=device
            )
        if format.tensor_scale:
            whole = torch.ones((), device=device)
        return QuantTensor(values, scales, format, (c.num_experts, rows, columns), whole)

    layer = LayerWeights(
        attention_norm=zeros(c.model_width),
        qkv=projection(c.qkv_width, c.model_width),
        qkv_bias=zeros(c.qkv_width),
        sinks=zeros(c.num_heads),
        out=projection(c.model_width, c.attention_width),
        out_bias=zeros(c.model_width),
        moe_norm=zeros(c.model_width),
        router=zeros(c.num_experts, c.model_width),
        router_bias=zeros(c.num_experts),
        gate_up=experts(0, 2 * c.expert_width, c.model_width),
        gate_up_bias=zeros(c.num_experts, 2 * c.expert_width),
        down=experts(1, c.model_width, c.expert_width),
        down_bias=zeros(c.num_experts, c.model_width),
    )
    head = projection(c.vocab_size, c.model_width)
    return ModelWeights(table, layer.moe_norm, head, [layer] * c.num_layers)


def in_rows(layer: LayerWeights) -> tuple[QuantTensor, QuantTensor]:
    """gate_up and down, which this step reads in rows."""
    assert isinstance(layer.gate_up, QuantTensor) and isinstance(layer.down, QuantTensor)
    return layer.gate_up, layer.down


class DecodeStep(CapturedStep):
    """The kernels of one token, captured as CUDA graphs with and without a cut distribution."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        cache: KVCache,
        rope: tuple[Tensor, Tensor],
        max_context: int,
    ) -> None:
        c = config
        device = weights.embedding.device
        self.config, self.weights, self.cache, self.rope = config, weights, cache, rope
        super().__init__(c.vocab_size, max_context, device)
        group = head_group(c.num_heads, c.num_kv_heads)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.residual = buffer(c.model_width)
        self.qkv = buffer(c.qkv_width)
        self.attention = buffer(c.num_heads, c.head_width)
        self.split_acc = buffer(c.num_kv_heads, SPLITS, group, c.head_width)
        self.split_stats = buffer(c.num_kv_heads, SPLITS, group, 2)
        self.router_logits = buffer(c.num_experts)
        self.router_ticket = buffer(1, dtype=torch.int32)
        self.expert_ids = buffer(c.experts_per_token, dtype=torch.int32)
        self.expert_weights = buffer(c.experts_per_token)
        self.activation = Swiglu(c.swiglu_limit, c.swiglu_alpha, offset=1.0, alternating=True)
        unscale = 1.0 / activation_scale(c.swiglu_limit)
        formats = {(g.format, d.format) for g, d in map(in_rows, weights.layers)}
        self._packed = {
            (g, d): (
                packed_vectors(g, 1, c.model_width, device),
                packed_vectors(d, c.experts_per_token, c.expert_width, device, unscale),
            )
            for g, d in formats
        }
        self.logits = buffer(c.vocab_size)

    def step(self, *, filtered: bool) -> None:
        """Launch the kernels of one token."""
        embedding(self.state.token, self.weights.embedding, self.residual)
        for layer, weights in enumerate(self.weights.layers):
            self._attend(layer, weights)
            self._mix_experts(weights)
        self.sample_residual(filtered=filtered)

    def sample_residual(self, *, filtered: bool) -> None:
        """Logits of the residual, then one draw; moves the request one step on."""
        w = self.weights
        eps = self.config.norm_eps
        gemv(self.residual, w.head, self.logits, norm=w.final_norm, eps=eps)
        sample(self.logits, self.state, filtered=filtered)

    def _attend(self, layer: int, w: LayerWeights) -> None:
        c = self.config
        eps = c.norm_eps
        gemv(
            self.residual,
            w.qkv,
            self.qkv,
            norm=w.attention_norm,
            bias=w.qkv_bias,
            eps=eps,
            start_next_first=False,  # attention reads position and cache before its wait
        )
        k_cache, v_cache = self.cache.keys[layer], self.cache.values[layer]
        sink_attention_decode(
            self.qkv,
            self.rope,
            k_cache,
            v_cache,
            w.sinks,
            self.state.position,
            self.attention,
            window=c.sliding_window if c.layer_is_sliding[layer] else 0,
            acc=self.split_acc,
            stats=self.split_stats,
        )
        gemv(self.attention.view(-1), w.out, self.residual, bias=w.out_bias, add=True)

    def _mix_experts(self, w: LayerWeights) -> None:
        c = self.config
        gate_up, down = in_rows(w)
        packed, hidden = self._packed[gate_up.format, down.format]
        router_topk(
            self.residual,
            w.moe_norm,
            w.router,
            w.router_bias,
            eps=c.norm_eps,
            logits=self.router_logits,
            ticket=self.router_ticket,
            expert_ids=self.expert_ids,
            expert_weights=self.expert_weights,
            packed=packed,
        )
        moe_gate_up(packed, gate_up, w.gate_up_bias, self.expert_ids, hidden, self.activation)
        moe_down(hidden, down, w.down_bias, self.expert_ids, self.expert_weights, self.residual)
