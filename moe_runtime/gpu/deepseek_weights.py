"""DeepSeek V2, V3 and V3.2: weights as the kernels read them, made from the loader's names.

Projections of the same input are joined, so that one launch computes them. Shared experts, and the
MLP of a layer without a router, become stacks of experts that are always chosen. What cannot be
joined in its stored form, because blocks of scales do not line up, is decoded to the dtype of the
plain weights.

D model width, H heads, L latent width, N and U widths of a head's part without rope and of its
values, E experts, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.latent_cache import can_project
from moe_runtime.models.deepseek_config import DeepseekConfig
from moe_runtime.models.reference_model import Weights
from quant.codecs import decode
from quant.formats import BF16
from quant.tensor import QuantTensor

Matrix = Tensor | QuantTensor


@dataclass(frozen=True)
class GatedExperts:
    """Experts of one width F: [E, 2F, D], all gate rows first, and [E, D, F]."""

    gate_up: QuantTensor
    down: QuantTensor

    @property
    def width(self) -> int:
        """F, of which the last few may be zeros that fill a block."""
        return self.down.shape[2]


@dataclass(frozen=True)
class IndexWeights:
    """What V3.2's indexer has besides its parts of AttentionWeights."""

    head_weights: Matrix  # [I, D]
    norm: Tensor  # of keys
    norm_bias: Tensor


@dataclass(frozen=True)
class AttentionWeights:
    """Multi-head latent attention.

    inputs:   of the normed residual, rows in order: queries or their latent, index keys, latent
    queries:  of the queries' normed latent: queries, then index queries
    """

    norm: Tensor
    inputs: tuple[Matrix, ...]
    query_norm: Tensor | None  # of the queries' latent; None: the queries are in inputs
    queries: tuple[Matrix, ...]
    latent_norm: Tensor
    projection: Matrix  # [H * (N + U), L]: a head's rows for keys, then for values
    out: Matrix
    indexer: IndexWeights | None


@dataclass(frozen=True)
class LayerWeights:
    """One layer: with a router and experts, or with a dense MLP alone."""

    attention: AttentionWeights
    mlp_norm: Tensor
    router: Tensor | None
    router_bias: Tensor | None
    routed: GatedExperts | None
    always: GatedExperts  # the shared experts, or the dense MLP


@dataclass(frozen=True)
class ModelWeights:
    """All weights of a model on one device."""

    embedding: Tensor
    final_norm: Tensor
    head: Matrix
    layers: tuple[LayerWeights, ...]

    @classmethod
    def from_named(cls, weights: Weights, config: DeepseekConfig) -> ModelWeights:
        """Take the loader's weights out of their dict, one layer after the other.

        A layer that is laid out anew is there twice meanwhile, but for its routed experts.
        """
        embedding = plain(weights.pop("embedding"))
        layers = tuple(
            _layer(weights, f"layers.{i}.", config, embedding.dtype)
            for i in range(config.num_layers)
        )
        return cls(embedding, plain(weights.pop("final_norm")), weights.pop("head"), layers)


def plain(weight: Matrix) -> Tensor:
    """A weight that is stored in plain floats."""
    assert isinstance(weight, Tensor)
    return weight


def as_stack(weight: Matrix) -> QuantTensor:
    """Stacked experts as the expert kernels take them."""
    if isinstance(weight, QuantTensor):
        return weight
    assert weight.dtype == torch.bfloat16, weight.dtype
    return QuantTensor(weight, None, BF16, tuple(weight.shape))


def _layer(weights: Weights, name: str, config: DeepseekConfig, dtype: torch.dtype) -> LayerWeights:
    attention = _attention(weights, name + "attention.", config, dtype)
    mlp = name + "mlp."
    if mlp + "gate" in weights:
        dense = gated(weights, mlp, 1)
        return LayerWeights(attention, plain(weights.pop(mlp + "norm")), None, None, None, dense)
    moe = name + "moe."
    bias = weights.pop(moe + "router_bias", None)
    return LayerWeights(
        attention=attention,
        mlp_norm=plain(weights.pop(moe + "norm")),
        router=plain(weights.pop(moe + "router")),
        router_bias=None if bias is None else plain(bias),
        routed=GatedExperts(
            as_stack(weights.pop(moe + "gate_up")), as_stack(weights.pop(moe + "down"))
        ),
        always=gated(weights, moe + "shared_", config.shared_width // config.expert_width),
    )


def _attention(
    weights: Weights, name: str, config: DeepseekConfig, dtype: torch.dtype
) -> AttentionWeights:
    query_norm = weights.pop(name + "query_norm", None)
    index = name + "indexer."
    from_residual = ["query" if query_norm is None else "query_a", "latent_a"]
    from_latent = [] if query_norm is None else ["query_b"]
    indexer = None
    if config.indexer is not None:
        from_residual.insert(1, "indexer.key")
        from_latent.append("indexer.query")
        indexer = IndexWeights(
            weights.pop(index + "head_weights"),
            plain(weights.pop(index + "norm")),
            plain(weights.pop(index + "norm_bias")),
        )
    projection = weights.pop(name + "latent_b")
    if not can_project(projection, config.nope_width, config.value_width):
        assert isinstance(projection, QuantTensor)
        projection = decode(projection).to(dtype)
    return AttentionWeights(
        norm=plain(weights.pop(name + "norm")),
        inputs=rows_joined([weights.pop(name + part) for part in from_residual]),
        query_norm=None if query_norm is None else plain(query_norm),
        queries=rows_joined([weights.pop(name + part) for part in from_latent]),
        latent_norm=plain(weights.pop(name + "latent_norm")),
        projection=projection,
        out=weights.pop(name + "out"),
        indexer=indexer,
    )


def rows_joined(parts: list[Matrix]) -> tuple[Matrix, ...]:
    """Matrices of the same columns under each other, in as few as their formats allow."""
    joined = parts[:1]
    for part in parts[1:]:
        whole = _under_each_other(joined[-1], part)
        joined[-1:] = [joined[-1], part] if whole is None else [whole]
    return tuple(joined)


def _under_each_other(first: Matrix, second: Matrix) -> Matrix | None:
    """One matrix of both, None if their stored forms do not allow it."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat((first, second)) if first.dtype == second.dtype else None
    if not (isinstance(first, QuantTensor) and isinstance(second, QuantTensor)):
        return None
    high = (first.format.block or (1, 1))[0]
    if first.format is not second.format or first.tensor_scale is not None:
        return None
    if not high or first.shape[-2] % high:
        return None
    shape = (*first.shape[:-2], first.shape[-2] + second.shape[-2], first.shape[-1])
    scales = None
    if first.scales is not None and second.scales is not None:
        scales = torch.cat((first.scales, second.scales), dim=-2)
    return QuantTensor(
        torch.cat((first.values, second.values), dim=-2), scales, first.format, shape
    )


def gated(weights: Weights, name: str, count: int) -> GatedExperts:
    """Gate, up and down of `count` experts side by side, as a stack."""
    gate, up, down = (weights.pop(name + part) for part in ("gate", "up", "down"))
    stacks = None
    if all(isinstance(part, QuantTensor) for part in (gate, up, down)):
        stacks = _stacked(gate, up, down, count)  # type: ignore[arg-type]
    if stacks is None:
        gate, up, down = (_in_bf16(part) for part in (gate, up, down))
        stacks = _stacked(gate, up, down, count)
    assert stacks is not None
    return GatedExperts(*stacks)


def _stacked(
    gate: QuantTensor, up: QuantTensor, down: QuantTensor, count: int
) -> tuple[QuantTensor, QuantTensor] | None:
    """[count, 2F, D] and [count, D, F]; None if blocks do not line up with the experts."""
    high, wide = gate.format.block or (1, 1)
    width = gate.shape[0] // count
    if up.format is not gate.format or down.format is not gate.format:
        return None
    if gate.tensor_scale is not None or not high or not wide:
        return None
    if width % high or width % wide:
        if count > 1:
            return None
        gate, up, down = _filled(gate), _filled(up), _filled(down, columns=True)
        width = gate.shape[0]
    halves = [_split_rows(part, count) for part in (gate, up)]
    both = _under_each_other(*halves)
    assert isinstance(both, QuantTensor)
    return both, _split_columns(down, count)


def _filled(weight: QuantTensor, *, columns: bool = False) -> QuantTensor:
    """Rows (or columns) of zeros added until the last block is whole."""
    assert weight.format.block is not None and weight.format.values_per_byte == 1
    rows, wide = weight.shape
    more = [-size % block for size, block in zip(weight.shape, weight.format.block, strict=True)]
    right, below = (more[1], 0) if columns else (0, more[0])
    values = weight.values.new_zeros((rows + below, wide + right))
    values[:rows, :wide] = weight.values
    return replace(weight, values=values, shape=tuple(values.shape))


def _split_rows(weight: QuantTensor, count: int) -> QuantTensor:
    """[count * F, D] as [count, F, D], in the same memory."""
    scales = weight.scales
    return QuantTensor(
        weight.values.unflatten(0, (count, -1)),
        None if scales is None else scales.unflatten(0, (count, -1)),
        weight.format,
        (count, weight.shape[0] // count, weight.shape[1]),
    )


def _split_columns(weight: QuantTensor, count: int) -> QuantTensor:
    """[D, count * F] as [count, D, F]."""

    def split(stored: Tensor) -> Tensor:
        return stored.unflatten(1, (count, -1)).transpose(0, 1).contiguous()

    return QuantTensor(
        split(weight.values),
        None if weight.scales is None else split(weight.scales),
        weight.format,
        (count, weight.shape[0], weight.shape[1] // count),
    )


def _in_bf16(weight: Matrix) -> QuantTensor:
    """A matrix decoded, rounded to bf16."""
    values = decode(weight) if isinstance(weight, QuantTensor) else weight
    return QuantTensor(values.to(torch.bfloat16), None, BF16, tuple(weight.shape))
