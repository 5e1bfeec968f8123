"""Which Triton is installed."""

import triton

TRITON_RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])  # as (3, 6)
