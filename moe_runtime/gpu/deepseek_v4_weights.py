"""DeepSeek V4: weights as the kernels read them, made from the loader's names.

Projections of the same input are joined where their stored forms allow it: queries' latent and row,
what a layer's compressors and its indexer take of a token, queries and the indexer's queries.

D model width, H heads, C row width, R query rank, G output groups, I index heads, J index width,
N streams, E experts, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_runtime.gpu.deepseek_weights import (
    GatedExperts,
    Matrix,
    as_stack,
    gated,
    plain,
    rows_joined,
)
from moe_runtime.models.deepseek_v4_config import DeepseekV4Config
from moe_runtime.models.reference_model import Weights


@dataclass(frozen=True)
class HyperWeights:
    """What makes the mixing of the streams in front of a block."""

    function: Tensor  # [M, N * D]
    base: Tensor  # [M]
    scale: Tensor  # [3], or [1] behind the last layer


@dataclass(frozen=True)
class CompressorWeights:
    """A compressor's weights but for its projections."""

    position_bias: Tensor  # [ratio, width of a token's gates]
    norm: Tensor

    @property
    def projected_width(self) -> int:
        """Of what it takes of a token: values and gates."""
        return 2 * self.position_bias.shape[1]


@dataclass(frozen=True)
class V4Attention:
    """Attention over shared rows.

    inputs:      of the normed input, rows in order: the queries' latent [R], the row [C]
    compressed:  of the same: values and gates of the compressor, then of the indexer's, then the
                 weights of the index heads [I]; empty without a compressor
    queries:     of the queries' normed latent: queries [H * C], then index queries [I * J]
    """

    norm: Tensor
    inputs: tuple[Matrix, ...]
    compressed: tuple[Matrix, ...]
    query_norm: Tensor
    queries: tuple[Matrix, ...]
    row_norm: Tensor
    sinks: Tensor
    out_a: Matrix  # [G * output rank, H * C / G]: each group of rows of its own heads
    out_b: Matrix
    compressor: CompressorWeights | None
    indexer: CompressorWeights | None


@dataclass(frozen=True)
class V4Layer:
    """One layer; experts are named by a table, or chosen with a bias."""

    attention_hyper: HyperWeights
    attention: V4Attention
    moe_hyper: HyperWeights
    mlp_norm: Tensor
    router: Tensor
    router_bias: Tensor | None
    hash_ids: Tensor | None  # [V, K]
    routed: GatedExperts
    always: GatedExperts


@dataclass(frozen=True)
class V4Weights:
    """All weights of a model on one device."""

    embedding: Tensor
    final_norm: Tensor
    head: Matrix
    head_hyper: HyperWeights
    layers: tuple[V4Layer, ...]

    @classmethod
    def from_named(cls, weights: Weights, config: DeepseekV4Config) -> V4Weights:
        """Take the loader's weights out of their dict, one layer after the other.

        A layer that is laid out anew is there twice meanwhile, but for its routed experts.
        """
        layers = tuple(_layer(weights, f"layers.{i}.") for i in range(config.num_layers))
        return cls(
            embedding=plain(weights.pop("embedding")),
            final_norm=plain(weights.pop("final_norm")),
            head=weights.pop("head"),
            head_hyper=_hyper(weights, "hyper.head_"),
            layers=layers,
        )


def _layer(weights: Weights, name: str) -> V4Layer:
    moe = name + "moe."
    bias, table = (weights.pop(moe + part, None) for part in ("router_bias", "hash_ids"))
    return V4Layer(
        attention_hyper=_hyper(weights, name + "hyper.attention_"),
        attention=_attention(weights, name + "attention."),
        moe_hyper=_hyper(weights, name + "hyper.moe_"),
        mlp_norm=plain(weights.pop(moe + "norm")),
        router=plain(weights.pop(moe + "router")),
        router_bias=None if bias is None else plain(bias),
        hash_ids=None if table is None else plain(table),
        routed=GatedExperts(
            as_stack(weights.pop(moe + "gate_up")), as_stack(weights.pop(moe + "down"))
        ),
        always=gated(weights, moe + "shared_", 1),
    )


def _attention(weights: Weights, name: str) -> V4Attention:
    compressed, queries = [], ["query_b"]
    compressor = indexer = None
    if name + "compressor.norm" in weights:
        compressor = _compressor(weights, name + "compressor.")
        compressed += ["compressor.row", "compressor.gate"]
    if name + "indexer.query_b" in weights:
        indexer = _compressor(weights, name + "indexer.compressor.")
        compressed += ["indexer.compressor.row", "indexer.compressor.gate", "indexer.head_weights"]
        queries.append("indexer.query_b")

    def joined(parts: list[str]) -> tuple[Matrix, ...]:
        return rows_joined([weights.pop(name + part) for part in parts])

    return V4Attention(
        norm=plain(weights.pop(name + "norm")),
        inputs=joined(["query_a", "row"]),
        compressed=joined(compressed),
        query_norm=plain(weights.pop(name + "query_norm")),
        queries=joined(queries),
        row_norm=plain(weights.pop(name + "row_norm")),
        sinks=plain(weights.pop(name + "sinks")),
        out_a=weights.pop(name + "out_a"),
        out_b=weights.pop(name + "out_b"),
        compressor=compressor,
        indexer=indexer,
    )


def _compressor(weights: Weights, name: str) -> CompressorWeights:
    return CompressorWeights(
        plain(weights.pop(name + "position_bias")), plain(weights.pop(name + "norm"))
    )


def _hyper(weights: Weights, name: str) -> HyperWeights:
    parts = (plain(weights.pop(name + part)) for part in ("function", "base", "scale"))
    return HyperWeights(*parts)
