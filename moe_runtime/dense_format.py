"""Dense weights packed to FP8 when a model is opened: the projections of attention, and the head.

One E4M3 code a weight and one fp32 scale a row. Experts stay as published, and so does the
embedding, of which a token reads one row: where it is the head too, the head is a packed copy.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch

from loaders.errors import UnsupportedModelError
from loaders.names.table import LoadPlan
from moe_runtime.models.reference_model import Weights
from moe_runtime.planning.variants import stored_bytes
from moe_runtime.support import FP8_CAPABILITY
from quant.codecs import encode
from quant.formats import FP8_ROW, QuantFormat

AS_PUBLISHED = "as-published"
DENSE_FORMATS: dict[str, QuantFormat | None] = {AS_PUBLISHED: None, "fp8": FP8_ROW}
ENCODING_BYTES = 3 << 29  # what encoding takes for a while: fp32 copies of 64 million weights

# Family -> the weights that are packed, by our names.
_PACKED = {"gpt_oss": re.compile(r"layers\.\d+\.attention\.(qkv|out)|head")}


def packed_names(plan: LoadPlan, family: str, dense_format: str) -> frozenset[str]:
    """Weights that are packed after loading: plain floats alone, what is quantized stays.

    dense_format: "as-published" (none) or "fp8"
    Raises ValueError for another one, UnsupportedModelError for a family that has none packed.
    """
    if dense_format not in DENSE_FORMATS:
        known = " or ".join(DENSE_FORMATS)
        raise ValueError(f"dense_format must be {known}, got {dense_format!r}")
    if DENSE_FORMATS[dense_format] is None:
        return frozenset()
    if not packs(family):
        raise UnsupportedModelError(
            f"dense_format={dense_format!r} is not there for {family} models",
            hint=f"supported: {', '.join(_PACKED)}; leave out dense_format (--dense-format)",
        )
    names = _PACKED[family]
    return frozenset(w.name for w in plan.weights if not w.format and names.fullmatch(w.name))


def packs(family: str) -> bool:
    """Whether dense weights of a family can be packed."""
    return family in _PACKED


def bytes_as_loaded(plan: LoadPlan, packed: Collection[str]) -> dict[str, int]:
    """Bytes of each weight, by our name, once those of `packed` are packed."""
    shapes = {weight.name: weight.shape for weight in plan.weights if weight.name in packed}
    return plan.nbytes | {name: stored_bytes(shape, FP8_ROW) for name, shape in shapes.items()}


def packing_bytes(plan: LoadPlan, packed: Collection[str]) -> int:
    """Bytes more than the model takes that are needed while weights are packed."""
    if not packed:
        return 0
    loaded = bytes_as_loaded(plan, packed)
    return plan.total_bytes - sum(loaded.values()) + ENCODING_BYTES


def knows_fp8(device: torch.device) -> bool:
    """Whether the kernels can read packed weights there: Triton has E4M3 from Ada on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def pack(weights: Weights, names: Collection[str]) -> Weights:
    """Pack the named weights where they are, one at a time, in place of the plain ones.

    Raises ValueError for NaN or infinity.
    """
    for name in sorted(names):
        plain = weights.pop(name)
        assert isinstance(plain, torch.Tensor), name
        weights[name] = encode(plain, FP8_ROW)
        del plain  # before the next one is packed
    if names and torch.cuda.is_available():
        torch.cuda.empty_cache()  # the plain ones' memory is the cache's of keys and values
    return weights
