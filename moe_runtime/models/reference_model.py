"""What the reference models of all families have in common: fp32 arithmetic on decoded weights.

T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.reference.rms_norm import rms_norm
from moe_runtime.config import DecoderConfig
from quant import codecs
from quant.formats import FP8_BLOCK128, FP8_BLOCK128_E8M0, QuantFormat
from quant.tensor import QuantTensor

Weights = dict[str, Tensor | QuantTensor]

# Below this many decoded bytes all weights are decoded once at load; above it, at each use.
DECODE_AT_LOAD_BYTES = 2 << 30


class ReferenceModel:
    """One model on one device with its cache (fp32, grown as needed); a family adds its layers."""

    has_vendor_rounding = False  # whether the family looks at `rounded`
    # Formats of weights whose inputs the vendor's code rounds.
    rounded_formats: tuple[QuantFormat, ...] = (FP8_BLOCK128, FP8_BLOCK128_E8M0)
    # Names of weights whose inputs are rounded as in the vendor's code.
    rounded: frozenset[str] = frozenset()

    def __init__(self, config: DecoderConfig, weights: Weights, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.weights: Weights = {name: w.to(device) for name, w in weights.items()}
        decoded_bytes = sum(4 * math.prod(w.shape) for w in self.weights.values())
        if decoded_bytes <= DECODE_AT_LOAD_BYTES:
            self.weights = {name: decoded(w) for name, w in self.weights.items()}
        self.length = 0
        self.reset()

    def reset(self) -> None:
        """Forget the cached sequence."""
        raise NotImplementedError

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """Run tokens through all layers after what is cached; returns the residual [T, D] fp32."""
        raise NotImplementedError

    def head(self, x_TD: Tensor) -> Tensor:
        """Logits [T, V] fp32 of residual rows."""
        x_TD = rms_norm(x_TD, self.weight("final_norm"), self.config.norm_eps)
        return x_TD @ self.weight("head").T

    def close(self) -> None:
        """Let go of weights and cache; the model cannot be used again."""
        self.reset()
        self.weights = {}

    def weight(self, name: str) -> Tensor:
        """A weight in fp32."""
        return decoded(self.weights[name])

    def tensor(self, name: str) -> Tensor:
        """A weight in plain floats, in the dtype that it is held in."""
        tensor = self.weights[name]
        assert isinstance(tensor, Tensor), name
        return tensor

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Rows of the embedding, [T, D] fp32."""
        return self.tensor("embedding")[token_ids_T.to(self.device)].float()


def decoded(weight: Tensor | QuantTensor) -> Tensor:
    """A weight in fp32, whatever it is stored in."""
    return weight.float() if isinstance(weight, Tensor) else codecs.decode(weight)
