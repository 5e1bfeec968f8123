"""GPT-OSS's decode step as one persistent kernel (kernels/persistent): where it runs, and how its
weights are laid out while they are loaded.

Experts stand in tiles only; prefill reads the same tiles. Dense weights stand in rows for prefill
and in tiles for the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kernels.gemv import gemv
from kernels.persistent.launch import (
    CACHE_UNIT,
    StepBuffers,
    StepWeights,
    arguments,
    compile_step,
    descriptors,
    launch,
    pack_router,
)
from kernels.persistent.pack import (
    EXPERT_TILE_BYTES,
    TiledExperts,
    pack_dense,
    pack_experts,
    tiles_of,
)
from kernels.persistent.sizes import StepSizes, cdiv
from kernels.sampling import sample
from loaders.weights import Relayout
from moe_runtime.cache import KVCache
from moe_runtime.config import ModelConfig
from moe_runtime.decode import LayerWeights, ModelWeights
from moe_runtime.gpu.captured_step import CapturedStep
from quant.formats import MXFP4, QuantFormat
from quant.tensor import QuantTensor

_HOPPER = (9, 0)  # its tensor core and copy instructions are this generation's own
_SHARED_BYTES = 227 << 10  # of a program
_EXPERTS_AT_ONCE = 8  # packed in one go: bounds the memory that takes


def why_not(
    config: ModelConfig,
    formats: Iterable[tuple[QuantFormat, QuantFormat]],
    device: torch.device,
) -> str | None:
    """The reason that a model's step cannot be one kernel there; None when it can."""
    c = config
    if device.type != "cuda":
        return "it needs a GPU"
    if torch.cuda.get_device_capability(device) != _HOPPER:
        return "it is written for Hopper GPUs (H100, H200)"
    facts = torch.cuda.get_device_properties(device)
    if tuple(formats) != ((MXFP4, MXFP4),):
        return "its experts are not in MXFP4"
    if c.head_width != 64 or c.num_heads // c.num_kv_heads > 14 or c.experts_per_token != 4:
        return "it is for heads of 64 numbers, up to 14 of them to a kv head, and 4 experts a token"
    if c.num_experts > 128 or c.model_width % 32 or c.expert_width % 32 or c.model_width > 4096:
        return "it is for up to 128 experts and widths up to 4096 that divide by 32"
    try:
        step_sizes(c, fp8=False, device=device)
    except (AssertionError, ValueError):
        return f"{facts.multi_processor_count} processors are too few for it"
    return None


def step_sizes(config: ModelConfig, *, fp8: bool, device: torch.device) -> StepSizes:
    """The kernel's constants for a model on a GPU."""
    c = config
    facts = torch.cuda.get_device_properties(device)
    programs = facts.multi_processor_count
    group = c.num_heads // c.num_kv_heads
    splits = 1 << (max(1, min(16, programs // c.num_kv_heads)).bit_length() - 1)
    while group * c.head_width % splits:
        splits //= 2
    sizes = StepSizes(
        layers=c.num_layers,
        width=c.model_width,
        heads=c.num_heads,
        kv_heads=c.num_kv_heads,
        head_width=c.head_width,
        experts=c.num_experts,
        top_k=c.experts_per_token,
        hidden=c.expert_width,
        vocabulary=c.vocab_size,
        window=c.sliding_window,
        eps=c.norm_eps,
        limit=c.swiglu_limit,
        alpha=c.swiglu_alpha,
        fp8=fp8,
        programs=programs,
        splits=splits,
    )
    return sizes.with_rings(_SHARED_BYTES - 1024)


def tile_bytes(config: ModelConfig, *, fp8: bool) -> int:
    """Bytes that tiles take more than the weights that they are made of."""
    c = config
    rows = {"qkv": c.qkv_width, "out": c.model_width, "head": c.vocab_size}
    columns = {"qkv": c.model_width, "out": c.attention_width, "head": c.model_width}
    each = {
        name: cdiv(rows[name], 128) * 128 * cdiv(columns[name], 320) * 320 * (1 if fp8 else 2)
        for name in rows
    }
    dense = c.num_layers * (each["qkv"] + each["out"]) + each["head"]
    stored = 3 * c.expert_width * c.model_width * 17 // 32  # of an expert, codes and scales
    padded = sum(_half_tiles(c)) * EXPERT_TILE_BYTES
    return dense + c.num_layers * c.num_experts * (padded - stored)


def packing_bytes(config: ModelConfig) -> int:
    """Bytes taken for a while when a layer's experts are packed: themselves, and copies of a few."""
    c = config
    expert = 3 * c.expert_width * c.model_width // 2
    return c.num_experts * expert * 17 // 16 + 12 * _EXPERTS_AT_ONCE * expert


def _half_tiles(config: ModelConfig) -> tuple[int, int]:
    """Tiles of an expert's gate_up and of its down."""
    c = config
    return tiles_of(2 * c.expert_width, c.model_width), tiles_of(c.model_width, c.expert_width)


def relayout(config: ModelConfig, device: torch.device) -> Relayout:
    """Experts put into tiles layer by layer, all in one piece of memory."""
    c = config
    shape = (c.num_layers, c.num_experts, sum(_half_tiles(c)), EXPERT_TILE_BYTES)
    memory = torch.empty(shape, dtype=torch.uint8, device=device)
    up_tiles, _ = _half_tiles(c)

    def take(weights: dict[str, Tensor | QuantTensor]) -> dict[str, Any]:
        found: dict[str, Any] = dict(weights)
        for half, first in (("gate_up", 0), ("down", up_tiles)):
            name = next(name for name in weights if name.endswith(f".{half}"))
            weight, tiles = weights[name], memory[int(name.split(".")[1])]
            assert isinstance(weight, QuantTensor), name
            fill_tiles(tiles, first, weight, weights[f"{name}_bias"])
            found[name] = TiledExperts(tiles, first, weight.shape)
        return found

    names = ("gate_up", "gate_up_bias", "down", "down_bias")
    return Relayout([[f"layers.{i}.moe.{n}" for n in names] for i in range(c.num_layers)], take)


def fill_tiles(tiles: Tensor, first: int, weight: QuantTensor, bias: Tensor) -> None:
    """Pack experts [E, ..] into tiles [E, n, bytes] from tile `first` on, a few at a time."""
    assert weight.scales is not None
    scales = weight.scales.view(torch.uint8)
    for e in range(0, len(bias), _EXPERTS_AT_ONCE):
        some = slice(e, e + _EXPERTS_AT_ONCE)
        packed = pack_experts(weight.values[some], scales[some], bias[some])
        tiles[some, first : first + packed.shape[1]] = packed


def step_weights(weights: ModelWeights) -> StepWeights:
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

    return StepWeights(
        embedding=weights.embedding,
        dense=_dense_tiles(weights),
        experts=_whole_memory(layers),
        norms=stack("attention_norm"),
        moe_norms=stack("moe_norm"),
        final_norm=weights.final_norm,
        qkv_scale=scales([layer.qkv for layer in layers]),
        qkv_bias=stack("qkv_bias"),
        sinks=stack("sinks"),
        out_scale=scales([layer.out for layer in layers]),
        out_bias=stack("out_bias"),
        router=torch.stack([pack_router(layer.router) for layer in layers]),
        router_bias=stack("router_bias"),
        head_scale=scales([weights.head]),
    )


def _dense_tiles(weights: ModelWeights) -> Tensor:
    matrices = [matrix for layer in weights.layers for matrix in (layer.qkv, layer.out)]
    packed = [(matrix, False) for matrix in matrices] + [(weights.head, True)]
    first = pack_dense(_values(packed[0][0]))
    counts = [_tile_count(matrix) for matrix, _ in packed]
    memory = first.new_empty((sum(counts), first.shape[1]))
    for part, (matrix, by_rows) in zip(memory.split(counts), packed, strict=True):
        part.copy_(pack_dense(_values(matrix), by_rows=by_rows))
    return memory


def _values(matrix: Tensor | QuantTensor) -> Tensor:
    return matrix.values if isinstance(matrix, QuantTensor) else matrix


def _tile_count(matrix: Tensor | QuantTensor) -> int:
    rows, columns = matrix.shape
    return cdiv(rows, 128) * cdiv(columns, 320)


def _whole_memory(layers: list[LayerWeights]) -> Tensor:
    """The memory that all layers' tiles are parts of, one after the other."""
    tiles = [layer.gate_up.tiles for layer in layers if isinstance(layer.gate_up, TiledExperts)]
    begin, size = tiles[0], tiles[0].numel()
    places = [t.data_ptr() - begin.data_ptr() for t in tiles]
    assert places == [i * size for i in range(len(layers))], "tiles are not in one piece"
    return begin.as_strided((len(layers) * size,), (1,))


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
    """One launch from the token to its logits, and the draw; captured as CUDA graphs."""

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
        self.sizes = step_sizes(config, fp8=isinstance(weights.head, QuantTensor), device=device)
        packed = step_weights(weights)
        self._tensors = arguments(
            packed,
            StepBuffers.allocate(self.sizes, device),
            self.state.token,
            self.state.position,
            rope,
            cache.memory,
            cache_table(config, cache),
            self.logits,
        )
        self._descriptors = descriptors(packed)

    def step(self, *, filtered: bool) -> None:
        """Launch the kernels of one token."""
        launch(self.sizes, self._tensors, self._descriptors)
        sample(self.logits, self.state, filtered=filtered)


def cache_table(config: ModelConfig, cache: KVCache) -> Tensor:
    """[L, 4] int64: where a layer's keys and values begin, its slots, whether it is sliding."""
    begin = cache.memory.data_ptr()
    unit = CACHE_UNIT * cache.memory.element_size()
    rows = [
        [(k.data_ptr() - begin) // unit, (v.data_ptr() - begin) // unit, k.shape[1], int(slides)]
        for k, v, slides in zip(cache.keys, cache.values, config.layer_is_sliding, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=cache.memory.device)


def compile_persistent(config: ModelConfig, device: torch.device, *, fp8: bool) -> None:
    """Compile the step's kernel without any weights."""
    compile_step(step_sizes(config, fp8=fp8, device=device), device)
