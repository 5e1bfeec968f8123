"""Gluon's names that have changed: one for each, whatever Triton is there (3.6 to 3.9)."""

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# Until all warps of the partition are here.
wait_for_warps = getattr(gl, "barrier", None) or gl.thread_barrier
# Rows of a descriptor into shared memory, by the copy engine.
copy_rows = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@builtin
def seen_as(memory: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """Shared memory as another type, shape and layout."""
    view = getattr(memory, "reinterpret", None) or memory._reinterpret
    return view(dtype, shape, layout, _semantic=_semantic)
