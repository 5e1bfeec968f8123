"""Batch-1, low-latency decoding of Mixture-of-Experts models in FP8 and FP4.

    from moe_runtime import MoeModel
    model = MoeModel.from_pretrained("openai/gpt-oss-20b")
    print(model.generate("The capital of France is", max_new_tokens=16).text)

Importing this package does not import torch; the first use of MoeModel does.
"""

from typing import TYPE_CHECKING, Any

from loaders.errors import CheckpointError, UnsupportedModelError
from moe_runtime.errors import DoesNotFitError

if TYPE_CHECKING:
    from moe_runtime.model import MoeModel

__version__ = "1.0.0"
__all__ = [
    "CheckpointError",
    "DoesNotFitError",
    "MoeModel",
    "UnsupportedModelError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "MoeModel":
        from moe_runtime.model import MoeModel  # slow import: torch

        return MoeModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
