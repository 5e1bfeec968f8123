"""What DeepSeek V2 to V3.2 cache on the GPU: latents with their keys, and the indexer's keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.models.deepseek_config import DeepseekConfig


@dataclass(frozen=True)
class LatentCache:
    """One row a position in each layer; addresses never change, the decode step is captured."""

    latents: list[Tensor]  # per layer [positions, L + P]: a token's latent, then its rotated key
    index_keys: list[Tensor]  # per layer [positions, J]; empty without an indexer

    @classmethod
    def allocate(
        cls,
        config: DeepseekConfig,
        max_context: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        shared: bool = False,
    ) -> LatentCache:
        """Zeroed caches for max_context positions; shared: all layers in the same memory."""

        def rows(width: int) -> list[Tensor]:
            shape = (max_context, width)
            if shared:
                return [torch.zeros(shape, dtype=dtype, device=device)] * config.num_layers
            return [
                torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
            ]

        latents = rows(config.latent_width + config.rotary_width)
        return cls(latents, [] if config.indexer is None else rows(config.indexer.width))

    @property
    def max_context(self) -> int:
        """Positions."""
        return len(self.latents[0])
