"""DeepSeek V4 (Flash, Pro) in plain torch: fp32 arithmetic on decoded weights.

Points that are easy to get wrong: rope turns pairs (2i, 2i + 1) of the last columns, and the
attention's output is turned back at the query's position; rows of a compressed layer are rotated
with its own theta, each at the first token of its window; a row is seen when its window has ended;
queries are normed per head without a weight; the gate is clamped from above only, the shared
expert's too; router weights are scores without the bias; the mixing matrix is used transposed.

Activations are not quantized unless asked for: the vendor's code rounds the input of every FP8 and
FP4 projection but out_a, the cached rows without their rotary part, and the indexer's queries and
keys, these multiplied by a Hadamard matrix before.

T tokens, D model width, H heads, C row width, G output groups, N streams, E experts, K experts per
token, F expert width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kernels.reference.rms_norm import rms_norm
from kernels.reference.rope_kv import inverse_frequencies
from loaders.errors import CheckpointError
from moe_runtime.layers.activation_rounding import (
    hadamard,
    rounded_to_e2m1,
    rounded_to_e4m3,
)
from moe_runtime.layers.compressed_attention import (
    Compressor,
    compressed_is_seen,
    index_is_chosen,
    rotate,
    shared_row_attention,
    window_is_seen,
)
from moe_runtime.layers.hyper_connections import HyperWeights, Mixing, merge_streams, mixing
from moe_runtime.layers.routing import choose_experts
from moe_runtime.models.deepseek_v4_config import INDEXED_RATIO, DeepseekV4Config
from moe_runtime.models.reference_model import ReferenceModel, Weights, decoded
from quant.formats import FP8_BLOCK128, FP8_BLOCK128_E8M0, MXFP4

_ROW_BLOCK = 64  # columns of a cached row that share a scale where rows are rounded
_LEAST_SUM = 1e-20  # added to the sum of a token's scores, which can all be 0


@dataclass
class LayerCache:
    """What one layer keeps of the sequence."""

    window_SC: Tensor  # the last W - 1 rows, or all there are
    compressor: Compressor | None
    indexer: Compressor | None


class DeepseekV4Reference(ReferenceModel):
    """One DeepSeek V4 model on one device with its caches (fp32)."""

    config: DeepseekV4Config
    has_vendor_rounding = True
    rounded_formats = (FP8_BLOCK128, FP8_BLOCK128_E8M0, MXFP4)

    def __init__(self, config: DeepseekV4Config, weights: Weights, device: torch.device) -> None:
        check_hash_tables(config, weights)
        self._frequencies = {
            bool(ratio): inverse_frequencies(config.rope_of(layer), config.rotary_width).to(device)
            for layer, ratio in enumerate(config.compress_ratios)
        }
        super().__init__(config, weights, device)

    def reset(self) -> None:
        """Forget the cached sequence."""
        self.caches = [self._empty_cache(ratio) for ratio in self.config.compress_ratios]
        self.length = 0

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """Run tokens after what is cached; returns the merged streams [T, D] fp32."""
        token_ids_T = token_ids_T.to(self.device)
        positions_T = torch.arange(self.length, self.length + len(token_ids_T), device=self.device)
        streams_TND = self.embed(token_ids_T)[:, None].repeat(1, self.config.streams, 1)
        for layer in range(self.config.num_layers):
            mix = self._mixing(layer, "attention", streams_TND)
            result_TD = self._attention(layer, mix.read(streams_TND), positions_T)
            streams_TND = mix.write(streams_TND, result_TD)
            mix = self._mixing(layer, "moe", streams_TND)
            result_TD = self._experts(layer, mix.read(streams_TND), token_ids_T)
            streams_TND = mix.write(streams_TND, result_TD)
        self.length += len(token_ids_T)
        c = self.config
        head = self._hyper_weights("hyper.head_")
        return merge_streams(streams_TND, head, eps=c.hyper_eps, norm_eps=c.norm_eps)

    def _empty_cache(self, ratio: int) -> LayerCache:
        c, device = self.config, self.device
        window_SC = torch.zeros((0, c.head_width), device=device)
        overlap = ratio == INDEXED_RATIO
        compressor = indexer = None
        if ratio:
            compressor = Compressor.empty(ratio, c.head_width, overlap=overlap, device=device)
        if overlap:
            indexer = Compressor.empty(ratio, c.index_width, overlap=True, device=device)
        return LayerCache(window_SC, compressor, indexer)

    def _hyper_weights(self, name: str) -> HyperWeights:
        return HyperWeights(*(self.weight(name + part) for part in ("function", "base", "scale")))

    def _mixing(self, layer: int, block: str, streams_TND: Tensor) -> Mixing:
        c = self.config
        return mixing(
            streams_TND,
            self._hyper_weights(f"layers.{layer}.hyper.{block}_"),
            iterations=c.sinkhorn_iterations,
            eps=c.hyper_eps,
            norm_eps=c.norm_eps,
        )

    def _attention(self, layer: int, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        c = self.config
        name = f"layers.{layer}.attention."
        x_TD = self._norm(x_TD, name + "norm")
        cos, sin = self._rope(layer, positions_T)
        query_TR = self._norm(self._linear(x_TD, name + "query_a"), name + "query_norm")
        q_THC = self._linear(query_TR, name + "query_b").unflatten(-1, (-1, c.head_width))
        q_THC = rms_norm(q_THC, torch.ones(c.head_width, device=self.device), c.norm_eps)
        q_THC = rotate(q_THC, cos[:, None], sin[:, None])
        rows_SC, seen_TS = self._window_rows(layer, x_TD, positions_T, cos, sin)
        if c.compress_ratios[layer]:
            more_NC, seen_TN = self._compressed_rows(layer, x_TD, query_TR, positions_T)
            rows_SC, seen_TS = torch.cat((rows_SC, more_NC)), torch.cat((seen_TS, seen_TN), dim=1)
        out_THC = shared_row_attention(q_THC, rows_SC, seen_TS, self.weight(name + "sinks"))
        out_THC = rotate(out_THC, cos[:, None], -sin[:, None])
        return self._project_out(name, out_THC)

    def _window_rows(
        self, layer: int, x_TD: Tensor, positions_T: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows of the window and of the new tokens, and which of them each query sees."""
        name, window = f"layers.{layer}.attention.", self.config.sliding_window
        new_TC = self._norm(self._linear(x_TD, name + "row"), name + "row_norm")
        new_TC = self._cached_row(layer, rotate(new_TC, cos, sin))
        cache = self.caches[layer]
        rows_SC = torch.cat((cache.window_SC, new_TC))
        first = self.length - len(cache.window_SC)
        row_positions_S = torch.arange(first, first + len(rows_SC), device=self.device)
        cache.window_SC = rows_SC[max(0, len(rows_SC) - window + 1) :]
        return rows_SC, window_is_seen(positions_T, row_positions_S, window)

    def _compressed_rows(
        self, layer: int, x_TD: Tensor, query_TR: Tensor, positions_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All compressed rows so far, and which of them each query sees."""
        c = self.config
        name, cache = f"layers.{layer}.attention.", self.caches[layer]
        assert cache.compressor is not None
        new_NC = self._compress(layer, cache.compressor, name + "compressor.", x_TD, positions_T)
        cache.compressor.rows = torch.cat((cache.compressor.rows, self._cached_row(layer, new_NC)))
        rows_NC = cache.compressor.rows
        seen_TN = compressed_is_seen(positions_T, len(rows_NC), cache.compressor.ratio)
        if cache.indexer is None:
            return rows_NC, seen_TN
        name += "indexer."
        new_NJ = self._compress(layer, cache.indexer, name + "compressor.", x_TD, positions_T)
        new_NJ = self._index_row(name, new_NJ)
        cache.indexer.rows = torch.cat((cache.indexer.rows, new_NJ))
        cos, sin = self._rope(layer, positions_T)
        q_TIJ = self._linear(query_TR, name + "query_b").unflatten(-1, (-1, c.index_width))
        q_TIJ = self._index_row(name, rotate(q_TIJ, cos[:, None], sin[:, None]))
        scale = (c.index_heads * c.index_width) ** -0.5
        weights_TI = scale * (x_TD @ self.weight(name + "head_weights").T)
        chosen_TN = index_is_chosen(q_TIJ, weights_TI, cache.indexer.rows, seen_TN, c.index_top_k)
        return rows_NC, chosen_TN

    def _compress(
        self, layer: int, compressor: Compressor, name: str, x_TD: Tensor, positions_T: Tensor
    ) -> Tensor:
        """Give new tokens to a compressor; returns the rows that are finished by them."""
        bias = self.weight(name + "position_bias")[positions_T % compressor.ratio]
        values = x_TD @ self.weight(name + "row").T
        gates = x_TD @ self.weight(name + "gate").T + bias
        finished = len(compressor.rows)
        new_NC = self._norm(compressor.add_tokens(values, gates), name + "norm")
        windows_N = torch.arange(finished, finished + len(new_NC), device=self.device)
        cos, sin = self._rope(layer, windows_N * compressor.ratio)
        return rotate(new_NC, cos, sin)

    def _project_out(self, name: str, out_THC: Tensor) -> Tensor:
        """Each group of heads to its own columns, then all columns to the model width."""
        c = self.config
        groups_TGX = out_THC.flatten(1).unflatten(-1, (c.output_groups, -1))
        out_a = self.weight(name + "out_a").unflatten(0, (c.output_groups, -1))
        out = torch.einsum("tgx,gox->tgo", groups_TGX, out_a).flatten(1)
        return self._linear(out, name + "out_b")

    def _experts(self, layer: int, x_TD: Tensor, token_ids_T: Tensor) -> Tensor:
        c = self.config
        name = f"layers.{layer}.moe."
        x_TD = self._norm(x_TD, name + "norm")
        scores_TE = softplus(x_TD @ self.weight(name + "router").T).sqrt()
        if layer < c.num_hash_layers:
            ids_TK = self.tensor(name + "hash_ids")[token_ids_T].long()
        else:
            biased_TE = scores_TE + self.weight(name + "router_bias")
            ids_TK = choose_experts(biased_TE, c.experts_per_token)
        weights_TK = scores_TE.gather(1, ids_TK)
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + _LEAST_SUM)
        weights_TK = c.routed_scale * weights_TK
        out_TD = self._shared_expert(name, x_TD)
        x_TD = self._input_of(x_TD, name + "gate_up")
        for expert in ids_TK.unique().tolist():
            tokens, slots = (ids_TK == expert).nonzero(as_tuple=True)
            gate_up = decoded(self.weights[name + "gate_up"][expert])
            down = decoded(self.weights[name + "down"][expert])
            gate, up = (x_TD[tokens] @ gate_up.T).chunk(2, dim=-1)
            hidden = weights_TK[tokens, slots, None] * clamped_swiglu(gate, up, c.swiglu_limit)
            # A token has an expert once unless its hash names it twice: both count.
            out_TD.index_add_(0, tokens, self._input_of(hidden, name + "down") @ down.T)
        return out_TD

    def _shared_expert(self, name: str, x_TD: Tensor) -> Tensor:
        gate = self._linear(x_TD, name + "shared_gate")
        up = self._linear(x_TD, name + "shared_up")
        hidden = clamped_swiglu(gate, up, self.config.swiglu_limit)
        return self._linear(hidden, name + "shared_down")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return self._input_of(x, name) @ self.weight(name).T

    def _input_of(self, x: Tensor, name: str) -> Tensor:
        """x as a weight's projection takes it."""
        return rounded_to_e4m3(x, powers_of_two=True) if name in self.rounded else x

    def _cached_row(self, layer: int, rows: Tensor) -> Tensor:
        """Rows of the window or compressed ones, [.., C], as they are cached."""
        if f"layers.{layer}.attention.row" not in self.rounded:
            return rows
        width = self.config.rotary_width
        still = rounded_to_e4m3(rows[..., :-width], powers_of_two=True, block=_ROW_BLOCK)
        return torch.cat((still, rows[..., -width:]), dim=-1)

    def _index_row(self, name: str, rows: Tensor) -> Tensor:
        """Queries or keys of the indexer, [.., J], as it compares them."""
        if name + "query_b" not in self.rounded:
            return rows
        return rounded_to_e2m1(rows @ hadamard(rows.shape[-1], rows.device))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weight(name), self.config.norm_eps)

    def _rope(self, layer: int, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, P / 2] fp32; YaRN's growth of both is not part of this model."""
        frequencies = self._frequencies[self.config.compress_ratios[layer] > 0]
        angles = positions_T.double()[:, None] * frequencies
        return angles.cos().float(), angles.sin().float()


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(gate) * up with the gate clamped from above and up on both sides."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate) * up


def check_hash_tables(config: DeepseekV4Config, weights: Weights) -> None:
    """CheckpointError for a table from tokens to experts that names an expert there is not."""
    for layer in range(config.num_hash_layers):
        table = weights[f"layers.{layer}.moe.hash_ids"]
        assert isinstance(table, Tensor)
        wrong = ((table < 0) | (table >= config.num_experts)).nonzero()
        if len(wrong):
            token, slot = wrong[0].tolist()
            raise CheckpointError(
                f"layer {layer}: tid2eid: expected experts from 0 to {config.num_experts - 1}, "
                f"found {int(table[token, slot])} for token {token}, {len(wrong)} such values in "
                "all",
                hint="the weights are damaged or of another model: download them again",
            )
