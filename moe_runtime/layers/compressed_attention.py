"""DeepSeek V4's attention over a window and over compressed rows, in plain torch fp32.

A layer keeps one row of C values a token, key and value at once. The last W rows are seen as they
are. Older tokens are seen through compressed rows: every `ratio` tokens become one row, a weighted
mean whose weights are a softmax over the tokens, for each channel apart. With overlap (ratio 4)
two windows share a row, and an indexer chooses which rows a query sees.

T tokens, H heads, C row width, S rows, N compressed rows, W window, I index heads, r ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_SCORES = 1 << 25  # at once: bounds the memory


@dataclass
class Compressor:
    """Compressed rows of a sequence and what is needed to make the next one.

    With overlap a token is projected to 2C values: the first C count in the row of the next window,
    the last C in that of its own.
    """

    ratio: int
    overlap: bool
    rows: Tensor  # [N, C], normed and rotated
    values: Tensor  # [0 to r - 1, C or 2C] of the unfinished window
    gates: Tensor  # the same, logits of the softmax
    last_values: Tensor  # [r, C] first halves of the last full window
    last_gates: Tensor  # the same; -inf before there is such a window

    @classmethod
    def empty(cls, ratio: int, width: int, *, overlap: bool, device: torch.device) -> Compressor:
        """The compressor of a sequence that has not begun; width C."""
        pending = torch.zeros((0, 2 * width if overlap else width), device=device)
        last = torch.zeros((ratio, width), device=device)
        none = torch.full_like(last, float("-inf"))
        rows = torch.zeros((0, width), device=device)
        return cls(ratio, overlap, rows, pending, pending, last, none)

    def add_tokens(self, values: Tensor, gates: Tensor) -> Tensor:
        """Take projected tokens; returns the rows of windows that are full now, not yet normed.

        values, gates: [T, C] or [T, 2C]; gates with the bias of the place in the window added
        The caller norms and rotates what is returned and appends it to `rows`.
        """
        values, gates = torch.cat((self.values, values)), torch.cat((self.gates, gates))
        windows = len(values) // self.ratio
        full = windows * self.ratio
        self.values, self.gates = values[full:], gates[full:]
        values = values[:full].unflatten(0, (windows, self.ratio))
        gates = gates[:full].unflatten(0, (windows, self.ratio))
        if self.overlap:
            values, self.last_values = _with_last_window(values, self.last_values)
            gates, self.last_gates = _with_last_window(gates, self.last_gates)
        return (gates.softmax(dim=1) * values).sum(dim=1)


def _with_last_window(windows: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """[n, r, 2C] to [n, 2r, C]: first halves of the window before, then own second halves.

    Also returns the first halves of the last window, for the next call.
    """
    first_halves, second_halves = windows.chunk(2, dim=-1)
    first_halves = torch.cat((last[None], first_halves))
    return torch.cat((first_halves[:-1], second_halves), dim=1), first_halves[-1]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last 2 * P columns of x in pairs (2i, 2i + 1); cos and sin end in [.., P]."""
    still, turned = x.split((x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    first, second = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((still, pairs.flatten(-2)), dim=-1)


def window_is_seen(positions_T: Tensor, row_positions_S: Tensor, window: int) -> Tensor:
    """[T, S]: the query's own row and the window - 1 before it."""
    distance_TS = positions_T[:, None] - row_positions_S
    return (distance_TS >= 0) & (distance_TS < window)


def compressed_is_seen(positions_T: Tensor, num_rows: int, ratio: int) -> Tensor:
    """[T, N]: rows of windows that end at the query or before it."""
    rows_N = torch.arange(num_rows, device=positions_T.device)
    return rows_N < (positions_T[:, None] + 1) // ratio


def index_is_chosen(
    q_TIC: Tensor, head_weights_TI: Tensor, rows_NC: Tensor, seen_TN: Tensor, top_k: int
) -> Tensor:
    """[T, N]: the indexer's top_k rows among those that a query sees.

    The score of a row is the weighted sum over index heads of relu(q . row).
    """
    if len(rows_NC) <= top_k:
        return seen_TN
    chosen = []
    size = _queries_at_once(q_TIC, rows_NC)
    for q, weights, seen in zip(
        q_TIC.split(size), head_weights_TI.split(size), seen_TN.split(size), strict=True
    ):
        scores = torch.einsum("ti,tin->tn", weights, (q @ rows_NC.T).relu())
        best = scores.masked_fill(~seen, float("-inf")).topk(top_k, dim=-1).indices
        chosen.append(torch.zeros_like(seen).scatter(1, best, True))
    return torch.cat(chosen) & seen_TN


def shared_row_attention(
    q_THC: Tensor, rows_SC: Tensor, seen_TS: Tensor, sinks_H: Tensor
) -> Tensor:
    """Attention of all heads over rows that are key and value at once, [T, H, C].

    sinks_H: one logit a head in the softmax denominator, not scaled
    """
    out = []
    size = _queries_at_once(q_THC, rows_SC)
    for q, seen in zip(q_THC.split(size), seen_TS.split(size), strict=True):
        scores_THS = (q @ rows_SC.T) * q.shape[-1] ** -0.5
        scores_THS = scores_THS.masked_fill(~seen[:, None], float("-inf"))
        sinks = sinks_H[:, None].expand(len(q), -1, 1)
        weights_THS = torch.cat((scores_THS, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        out.append(weights_THS @ rows_SC)
    return torch.cat(out)


def _queries_at_once(q_THC: Tensor, rows_SC: Tensor) -> int:
    return max(1, _MAX_SCORES // (q_THC.shape[1] * len(rows_SC)))
