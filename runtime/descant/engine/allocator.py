"""The C allocator of the executor's process: freed memory is kept for the next step.

By default glibc returns freed blocks above a threshold of at most 32 MiB, and often far less, to the kernel. A step
allocates the same tensors again in every layer, and each time the kernel has to find and clear their pages. That was
measured to take several times as long as the attention that used them.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1  # glibc's malloc.h
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 1 << 30  # size up to which blocks come from the heap, and free memory that stays at its end
_OLD_LIMIT_BYTES = 32 << 20  # maximum that older glibc accepts


def keep_freed_memory() -> bool:
    """Configure the allocator to keep freed memory. Return whether that was possible: only glibc has `mallopt`."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    is_raised = mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES) or mallopt(_M_MMAP_THRESHOLD, _OLD_LIMIT_BYTES)
    return bool(is_raised and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
