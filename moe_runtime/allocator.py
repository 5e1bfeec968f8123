"""How the C library keeps memory between uses."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 1 << 25  # glibc takes no more
_KEPT_AT_THE_END = 1 << 28


def keep_freed_memory() -> None:
    """Have freed buffers used again instead of given back; for the process, where glibc is.

    Work in chunks frees and asks for the same few megabytes all the time. Given back each time,
    they come as fresh pages: on two cores a fifth of a conversion's time goes into page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_AT_THE_END)
