"""The KV cache of the Triton backend: per layer keys and values [G, slots, C] in bf16.

Position p of a layer stands in slot p % slots: full layers have a slot for every position, sliding
layers a ring of the window and one prefill chunk.
"""

from __future__ import annotations

import math
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
    memory: Tensor  # [n], what all of them are parts of

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

        shapes = [
            (config.num_kv_heads, cache_slots(config, layer, max_context), config.head_width)
            for layer in range(config.num_layers)
        ]
        sizes = [math.prod(shape) for shape in shapes for _ in range(1 if shared else 2)]
        memory = torch.zeros(sum(sizes), dtype=dtype, device=device)
        parts = iter(memory.split(sizes))
        keys, values = [], []
        for shape in shapes:
            keys.append(next(parts).view(shape))
            values.append(keys[-1] if shared else next(parts).view(shape))
        return cls(keys, values, memory)
