"""GPT-OSS's decode step as one persistent kernel: its weights as it reads them, its launch."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from kernels.gemv import gemv
from kernels.persistent.formats import TILE_COLUMNS, TILE_ROWS
from kernels.persistent.launch import (
    CACHE_UNIT,
    StepBuffers,
    StepWeights,
    arguments,
    compile_step,
    descriptors,
    launch,
    pack_router,
    phase_stamps,
    phases,
)
from kernels.persistent.pack import TiledExperts, mixed_projection, pack_dense
from kernels.persistent.sizes import StepSizes
from kernels.persistent.watch import where_programs_stand
from kernels.sampling import sample
from moe_runtime.cache import KVCache
from moe_runtime.config import ModelConfig
from moe_runtime.decode import LayerWeights, ModelWeights
from moe_runtime.gpu.captured_step import CapturedStep
from moe_runtime.gpu.persistent import step_sizes
from quant.formats import QuantFormat
from quant.tensor import QuantTensor


def step_weights(sizes: StepSizes, weights: ModelWeights) -> StepWeights:
    """A model's weights as the kernel reads them; experts must be in tiles of one memory."""
    layers = weights.layers

    def stack(name: str) -> Tensor:
        return torch.stack([getattr(layer, name) for layer in layers])

    def scales(matrices: list[Tensor | QuantTensor]) -> Tensor:
        found = [
            m.scales.view(-1)
            for m in matrices
            if isinstance(m, QuantTensor) and m.scales is not None
        ]
        return torch.cat(found) if found else torch.zeros(1, device=weights.embedding.device)

    dense, out_scale, out_bias = _dense_tiles(sizes, weights)
    return StepWeights(
        embedding=weights.embedding,
        dense=dense,
        experts=_whole_memory(layers),
        norms=stack("attention_norm"),
        moe_norms=stack("moe_norm"),
        final_norm=weights.final_norm,
        qkv_scale=scales([layer.qkv for layer in layers]),
        qkv_bias=stack("qkv_bias"),
        sinks=stack("sinks"),
        out_scale=out_scale,
        out_bias=out_bias,
        router=torch.stack([pack_router(layer.router) for layer in layers]),
        router_bias=stack("router_bias"),
        head_scale=scales([weights.head]),
    )


def _dense_tiles(sizes: StepSizes, weights: ModelWeights) -> tuple[Tensor, Tensor, Tensor]:
    """All dense tiles; scales and biases of the mixed projections' rows, [L, rows]."""
    s = sizes
    head = s.layers * s.layer_tiles
    shape = (
        head + s.head_blocks * s.width_columns,
        TILE_ROWS * TILE_COLUMNS * _values(weights.head).element_size(),
    )
    memory = torch.empty(shape, dtype=torch.uint8, device=weights.embedding.device)
    scales, biases = [], []

    def put(first: int, matrix: Tensor, *, by_rows: bool = False) -> None:
        packed = pack_dense(matrix, by_rows=by_rows)
        memory[first : first + len(packed)] = packed

    for i, layer in enumerate(weights.layers):
        put(i * s.layer_tiles, _values(layer.qkv))
        rows, scale, bias = mixed_projection(
            s, layer.out, layer.out_bias, layer.router, layer.moe_norm
        )
        put(i * s.layer_tiles + s.qkv_tiles, rows)
        scales.append(scale)
        biases.append(bias)
    put(head, _values(weights.head), by_rows=True)
    return memory, torch.stack(scales), torch.stack(biases)


def _values(matrix: Tensor | QuantTensor) -> Tensor:
    return matrix.values if isinstance(matrix, QuantTensor) else matrix


def _whole_memory(layers: list[LayerWeights]) -> Tensor:
    """The memory that all layers' tiles are parts of, one after the other."""
    tiles = [layer.gate_up.tiles for layer in layers if isinstance(layer.gate_up, TiledExperts)]
    begin, size = tiles[0], tiles[0].numel()
    places = [t.data_ptr() - begin.data_ptr() for t in tiles]
    assert places == [i * size for i in range(len(layers))], "tiles are not in one piece"
    return begin.as_strided((len(layers) * size,), (1,))


WATCH = "MOE_RUNTIME_WATCH_STEP"


class Draw(CapturedStep):
    """The end of a step: logits of a residual, and the draw."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, max_context: int) -> None:
        device = weights.embedding.device
        super().__init__(config.vocab_size, max_context, device)
        self.config, self.weights = config, weights
        self.residual = torch.zeros(config.model_width, device=device)
        self.logits = torch.zeros(config.vocab_size, device=device)

    def sample_residual(self, *, filtered: bool) -> None:
        """Logits of the residual, then one draw; moves the request one step on."""
        w = self.weights
        gemv(self.residual, w.head, self.logits, norm=w.final_norm, eps=self.config.norm_eps)
        sample(self.logits, self.state, filtered=filtered)


class PersistentStep(Draw):
    """One launch from a token to the next one, captured as a CUDA graph. A distribution that is cut
    needs the vocabulary sorted: then the kernel ends with the logits, and others draw.

    With MOE_RUNTIME_WATCH_STEP=1 in the environment programs write when they are in which phase, so
    that an error of the GPU can say where it happened.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        cache: KVCache,
        rope: tuple[Tensor, Tensor],
        max_context: int,
    ) -> None:
        super().__init__(config, weights, max_context)
        device = weights.embedding.device
        self.cache = cache
        experts = weights.layers[0].gate_up
        assert isinstance(experts, TiledExperts)
        fp8 = isinstance(weights.head, QuantTensor)
        self.sizes = step_sizes(config, experts.format, fp8=fp8, device=device)
        packed = step_weights(self.sizes, weights)
        self._tensors = arguments(
            packed,
            StepBuffers.allocate(self.sizes, device),
            self.state,
            rope,
            cache.memory,
            cache_table(config, cache),
            self.logits,
        )
        self._descriptors = descriptors(self.sizes, packed)
        watched = os.environ.get(WATCH) == "1"
        self._stamps = phase_stamps(self.sizes) if watched else None

    def where_it_stands(self) -> str | None:
        """See CapturedStep."""
        if self._stamps is None:
            return f"run again with {WATCH}=1 to see in which phase"
        return where_programs_stand(self._stamps, phases(self.sizes))

    def step(self, *, filtered: bool) -> None:
        """Launch the kernels of one token."""
        launch(self.sizes, self._tensors, self._descriptors, self._stamps, draws=not filtered)
        if filtered:
            sample(self.logits, self.state, filtered=True)


def cache_table(config: ModelConfig, cache: KVCache) -> Tensor:
    """[L, 4] int64: where a layer's keys and values begin, its slots, whether it is sliding."""
    begin = cache.memory.data_ptr()
    unit = CACHE_UNIT * cache.memory.element_size()
    rows = [
        [(k.data_ptr() - begin) // unit, (v.data_ptr() - begin) // unit, k.shape[1], int(slides)]
        for k, v, slides in zip(cache.keys, cache.values, config.layer_is_sliding, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=cache.memory.device)


def compile_persistent(
    config: ModelConfig, format: QuantFormat, device: torch.device, *, fp8: bool
) -> None:
    """Compile the step's kernel without any weights; experts are in `format`."""
    compile_step(step_sizes(config, format, fp8=fp8, device=device), device)
