"""The C library's allocator, which gives memory back to the system too soon for networks on a CPU."""

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST_MMAP = 1 << 25
"""The largest that glibc allows: what is larger is mapped anew at each allocation."""


def keep_freed_memory(limit: int = 1 << 30) -> bool:
    """Let glibc keep up to `limit` bytes that were freed for what is allocated next; whether it could be told.

    By default it gives the end of its heap back after each large tensor, and the next one's pages are filled with
    zeros again, one fault each: half the time of a timestep of 128 small images. It concerns the whole process, so
    that programs decide, not libraries; MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ in the environment do the
    same. Under another allocator (jemalloc) nothing changes.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_THRESHOLD, MOST_MMAP) and mallopt(M_TRIM_THRESHOLD, limit))
    return False
