"""DeepSeek V3.2 in plain torch: V3 whose attention sees the tokens that an indexer chooses.

The indexer's rope turns pairs (i, i + P/2) of the first P columns, unlike the attention's. The
vendor's code multiplies its queries and keys by a Hadamard matrix before it rounds them; their
products are the same without both.

T tokens, S cached tokens, I index heads, J index width, P rotary width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from moe_runtime.layers.activation_rounding import hadamard
from moe_runtime.layers.compressed_attention import index_is_chosen
from moe_runtime.models.deepseek_v3 import DeepseekV3Reference

_NORM_EPS = 1e-6


class DeepseekV32Reference(DeepseekV3Reference):
    """One DeepSeek V3.2 model on one device; its cache has the indexer's keys too."""

    def reset(self) -> None:
        """Forget the cached sequence."""
        super().reset()
        assert self.config.indexer is not None
        none = torch.zeros((0, self.config.indexer.width), device=self.device)
        self.index_keys = [none] * self.config.num_layers

    def _seen(self, layer: int, x_TD: Tensor, query_TX: Tensor, positions_T: Tensor) -> Tensor:
        index = self.config.indexer
        assert index is not None
        name = f"layers.{layer}.attention.indexer."
        cos, sin = self._rope(positions_T)
        keys_TJ = layer_norm(
            self.linear(x_TD, name + "key"),
            (index.width,),
            self.weight(name + "norm"),
            self.weight(name + "norm_bias"),
            _NORM_EPS,
        )
        keys_TJ = self._index_row(name, rotate_first(keys_TJ, cos, sin))
        self.index_keys[layer] = torch.cat((self.index_keys[layer], keys_TJ))
        q_TIJ = self.linear(query_TX, name + "query").unflatten(-1, (index.heads, -1))
        scale = (index.heads * index.width) ** -0.5
        return index_is_chosen(
            self._index_row(name, rotate_first(q_TIJ, cos[:, None], sin[:, None])),
            scale * (x_TD @ self.weight(name + "head_weights").T),
            self.index_keys[layer],
            super()._seen(layer, x_TD, query_TX, positions_T),
            index.top_k,
        )

    def _index_row(self, name: str, rows: Tensor) -> Tensor:
        """Queries or keys of the indexer, [.., J], as it compares them."""
        if name + "query" not in self.rounded:
            return rows
        return self._input_of(rows @ hadamard(rows.shape[-1], rows.device), name + "query")


def rotate_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * P' columns of x in pairs (i, i + P'); cos and sin end in [.., P']."""
    half = cos.shape[-1]
    first, second, still = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, still), dim=-1)
