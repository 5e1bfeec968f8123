"""The KV cache of the Triton backend: per layer keys and values [G, slots, C] in bf16.

Position p of a layer stands in slot p % slots: full layers have a slot for every position, sliding
layers a ring of the window and one prefill chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.config import ModelConfig
from moe_runtime.plan import cache_slots


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers; addresses never change, the decode step is captured."""

    keys: list[Tensor]  # per layer [G, slots, C]
    values: list[Tensor]

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        max_context: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        shared: bool = False,
    ) -> KVCache:
        """Zeroed caches for max_context positions; shared: keys and values in the same memory."""

        def layer_cache(layer: int) -> Tensor:
            slots = cache_slots(config, layer, max_context)
            shape = (config.num_kv_heads, slots, config.head_width)
            return torch.zeros(shape, dtype=dtype, device=device)

        keys = [layer_cache(i) for i in range(config.num_layers)]
        return cls(keys, keys if shared else [torch.zeros_like(k) for k in keys])
