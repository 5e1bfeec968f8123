"""The facts of a model, read from config.json and checked once: DecoderConfig, what all families
have, and ModelConfig, what GPT-OSS adds. Other families' configs lie beside their models.

Letters: D model width, L layers, H query heads, G kv heads, C head width, E experts,
K experts a token, F expert width, V vocabulary, W sliding window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.json_text import shown

CACHE_ITEM_BYTES = 2  # keys and values are bf16
_LARGEST = 2**31 - 1  # of any single size in a config
MAX_MODEL_SIZE = {
    "num_layers": 1024,
    "model_width": 65536,
    "num_heads": 1024,
    "head_width": 1024,
    "num_experts": 4096,
    "expert_width": 262144,
    "vocab_size": 4_194_304,
    "context": 1 << 28,
}


@dataclass(frozen=True)
class YarnRope:
    """Rotary embedding with YaRN scaling (arXiv 2309.00071) as GPT-OSS uses it."""

    theta: float
    factor: float
    beta_fast: float
    beta_slow: float
    original_context: int
    truncate: bool  # whether the ramp's edges are rounded to whole dimensions


@dataclass(frozen=True)
class CachePart:
    """Rows of one kind that one layer caches: keys and values, latents, keys of an indexer."""

    row_bytes: int
    window: int | None = None  # rows kept for a query, its own counted; None: all
    tokens_per_row: int = 1
    most_read: int | None = None  # rows that a token reads at most (a top-k); None: all kept
    state_rows: int | None = None  # of a running state, the same for every context


@dataclass(frozen=True)
class DecoderConfig:
    """What every family has; a field without a true default has none."""

    family: str  # as in config.json's model_type
    num_layers: int
    model_width: int  # D
    num_heads: int  # H
    num_experts: int  # E
    experts_per_token: int  # K
    expert_width: int  # F
    vocab_size: int  # V
    norm_eps: float
    max_context: int  # positions the model was made for
    eos_token_ids: tuple[int, ...]

    @property
    def dims(self) -> dict[str, int]:
        """Letters of tensor shapes, for the loaders' name tables."""
        raise NotImplementedError

    @property
    def projection_width(self) -> int:
        """Values that the projections of one attention layer make for a token."""
        raise NotImplementedError

    @property
    def residual_width(self) -> int:
        """Values of a token that go from layer to layer."""
        return self.model_width

    @property
    def position_width(self) -> int:
        """Values of the rotary table for one position."""
        raise NotImplementedError

    @property
    def cache_parts(self) -> tuple[CachePart, ...]:
        """What all layers cache."""
        raise NotImplementedError


@dataclass(frozen=True)
class ModelConfig(DecoderConfig):
    """Sizes and constants of a GPT-OSS-like decoder."""

    num_kv_heads: int  # G
    head_width: int  # C
    sliding_window: int  # W, the query counted
    layer_is_sliding: tuple[bool, ...]
    rope: YarnRope
    swiglu_limit: float
    swiglu_alpha: float

    @property
    def qkv_width(self) -> int:
        """Rows of the fused q, k, v projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_width

    @property
    def attention_width(self) -> int:
        """Columns of the output projection: H * C."""
        return self.num_heads * self.head_width

    @property
    def projection_width(self) -> int:
        """q, k, v and the attention's output."""
        return self.qkv_width + self.attention_width

    @property
    def position_width(self) -> int:
        """cos and sin of half a head."""
        return self.head_width

    @property
    def cache_parts(self) -> tuple[CachePart, ...]:
        """Keys and values of each layer."""
        row_bytes = 2 * self.num_kv_heads * self.head_width * CACHE_ITEM_BYTES
        return tuple(
            CachePart(row_bytes, self.sliding_window if slides else None)
            for slides in self.layer_is_sliding
        )

    @property
    def dims(self) -> dict[str, int]:
        """See DecoderConfig.dims."""
        return {
            "D": self.model_width,
            "H": self.num_heads,
            "Q": self.num_heads * self.head_width,
            "KV": self.num_kv_heads * self.head_width,
            "QKV": self.qkv_width,
            "E": self.num_experts,
            "F": self.expert_width,
            "2F": 2 * self.expert_width,
            "V": self.vocab_size,
        }


class ConfigReader:
    """Typed reads from a config mapping; each failure names the file, the key and what it found."""

    def __init__(self, values: Mapping[str, Any], file: str = "config.json") -> None:
        self.values = values
        self.file = file

    def integer(
        self,
        *keys: str,
        minimum: int = 1,
        maximum: int = _LARGEST,
        default: int | None = None,
    ) -> int:
        """The first of `keys` present, as an int within bounds."""
        key, value = self._find(keys, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, value, "a whole number")
        if not minimum <= value <= maximum:
            raise self.error(key, value, f"a whole number from {minimum} to {maximum}")
        return value

    def number(
        self,
        *keys: str,
        above: float = 0.0,
        maximum: float = 1e12,
        default: float | None = None,
    ) -> float:
        """The first of `keys` present, as a float above `above` and at most `maximum`."""
        key, value = self._find(keys, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, value, "a number")
        if not above < value <= maximum:  # NaN fails too
            raise self.error(key, value, f"a number above {above:g}, at most {maximum:g}")
        return float(value)

    def text(self, *keys: str, default: str | None = None) -> str:
        """The first of `keys` present, as a string."""
        key, value = self._find(keys, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a text")
        return value

    def boolean(self, key: str, *, default: bool) -> bool:
        """A JSON true or false."""
        key, value = self._find((key,), default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def mapping(self, key: str) -> ConfigReader:
        """A nested JSON object, read with this reader's rules."""
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            raise self.error(key, value, "a JSON object")
        return ConfigReader(value, f"{self.file}: {key}")

    def error(self, key: str, found: Any, expected: str) -> CheckpointError:
        """The error for a bad value of one key."""
        return CheckpointError(f"{self.file}: {key}: expected {expected}, found {shown(found)}")

    def _find(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for key in keys:
            if self.values.get(key) is not None:
                return key, self.values[key]
        if default is not None:
            return keys[0], default
        raise CheckpointError(
            f"{self.file}: {keys[0]} is missing",
            hint="the file is incomplete: download the checkpoint again",
        )


def eos_ids(value: Any, vocab_size: int, file: str) -> tuple[int, ...]:
    """eos_token_id as a tuple: absent, one id or a list of ids, each within the vocabulary."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise CheckpointError(
                f"{file}: eos_token_id: expected whole numbers, found {shown(value)}"
            )
        if not 0 <= token_id < vocab_size:
            raise CheckpointError(
                f"{file}: eos_token_id: {shown(token_id)} is outside the vocabulary of {vocab_size}"
            )
    return tuple(ids)


def unsupported(feature: str, supported: str) -> UnsupportedModelError:
    """The error for a feature we lack: names it and what there is instead."""
    return UnsupportedModelError(f"not supported: {feature}", hint=f"supported: {supported}")
