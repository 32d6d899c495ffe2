"""The C library's allocator in a process that trains: memory that a step frees stays for the next one.

glibc gives the end of its heap back to the system when more than 64 MB of it are free, as after every backward pass, and
the next step takes it again page by page: some 25,000 page faults, 2 to 5 % of a step on two cores.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER = -1  # mallopt(3)
_OWN_MAPPING = 32 << 20  # bytes from which a block is mapped by itself, and given back when it is freed
_SAID = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tells glibc to keep what lies below 32 MB a block; larger ones are still given back. Whether it was told: not another
    C library, nor where the environment says how to do it. For the whole process, so for a command, not for a library."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SAID):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # setting one ends the adaptation of the other, which would have come to this value
    return bool(mallopt(_MMAP_THRESHOLD, _OWN_MAPPING)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
