"""Keep the memory of freed tensors in the process, where the C library is glibc.

Evaluations allocate and free the same few megabytes thousands of times. By default glibc gives
such memory back to the kernel each time and pays for every page again, about a twentieth of an
evaluation on a CPU.
"""

from __future__ import annotations

import ctypes
import platform

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
# The largest that glibc accepts; blocks above it are mapped one by one.
MMAP_BYTES = 32 << 20
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let this process keep up to `KEPT_BYTES` of freed memory; for programs, not for libraries.

    Threads share one arena, because the small arenas of threads would be given back all the same.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_ARENA_MAX, 1)
