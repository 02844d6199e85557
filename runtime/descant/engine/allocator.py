"""The C allocator of the executor's process: freed memory is kept for the next step.

By default glibc gives every block beyond 32 MiB at most, and often far smaller ones, straight back to the kernel. A
step allocates the same tensors again in every layer, and each time the kernel would have to find and clear their pages:
that was measured to take several times as long as the attention that used them.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1  # glibc's malloc.h
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 1 << 30  # blocks up to this come from the heap, and so much free memory at its end stays there
_OLD_LIMIT_BYTES = 32 << 20  # what older glibc takes at most


def keep_freed_memory() -> bool:
    """Tell the allocator; returns whether there is one to tell: glibc has `mallopt`, others need no telling."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    is_raised = mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES) or mallopt(_M_MMAP_THRESHOLD, _OLD_LIMIT_BYTES)
    return bool(is_raised and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
