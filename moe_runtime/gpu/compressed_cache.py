"""What DeepSeek V4 caches on the GPU: rows of each layer, keys of its indexer, and the running
states of the compressors that make compressed rows of both.

C row width, J index width, S slots of the ring, N compressed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.models.deepseek_v4_config import INDEXED_RATIO, STATE_ROWS, DeepseekV4Config
from moe_runtime.plan import PREFILL_CHUNK


@dataclass(frozen=True)
class V4LayerCache:
    """One layer; addresses never change, the decode step is captured."""

    rows: Tensor  # [S + N, C]: token t in row t % S, compressed row n in S + n
    state: Tensor | None  # of the compressor, see kernels/compressed_rows.py
    index_keys: Tensor | None  # [N, J]
    index_state: Tensor | None

    @property
    def nbytes(self) -> int:
        """Of everything."""
        parts = (self.rows, self.state, self.index_keys, self.index_state)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class CompressedCache:
    """All layers.

    slots:  S: the window and one prefill chunk, or all positions
    """

    layers: tuple[V4LayerCache, ...]
    slots: int
    max_context: int

    @classmethod
    def allocate(
        cls,
        config: DeepseekV4Config,
        max_context: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> CompressedCache:
        """Zeroed caches for max_context positions."""
        slots = min(max_context, config.sliding_window + PREFILL_CHUNK)

        def layer(ratio: int) -> V4LayerCache:
            num_rows = -(-max_context // ratio) if ratio else 0
            indexed = ratio == INDEXED_RATIO
            parts = 3 if indexed else 1

            def zeros(rows: int, width: int) -> Tensor:
                return torch.zeros((rows, width), dtype=dtype, device=device)

            def state(width: int) -> Tensor:
                return torch.zeros((parts, STATE_ROWS, width), device=device)

            return V4LayerCache(
                rows=zeros(slots + num_rows, config.head_width),
                state=state(config.head_width) if ratio else None,
                index_keys=zeros(num_rows, config.index_width) if indexed else None,
                index_state=state(config.index_width) if indexed else None,
            )

        return cls(tuple(layer(ratio) for ratio in config.compress_ratios), slots, max_context)
