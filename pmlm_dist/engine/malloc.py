"""What becomes of freed memory on a CPU: kept in the process, which is fast, or given back, which is small.

glibc gives large blocks back to the system when they are freed and asks for them anew a moment later; every page of
them then faults and is zeroed again: a sixth of a training step. A step allocates the same sizes over and over, so they
can be kept; the price are the gaps between blocks of the heap (devices.py, `HEAP_SLACK`). Where every large block is
mapped by itself and given back, the process holds what its tensors need and no more. Accelerators have caching
allocators of their own.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1  # mallopt takes an int; a block above it is mapped as before
_USUAL = 128 * 1024  # where glibc starts; told so, it leaves the threshold there


def keep_freed_memory(*, keep: bool = True) -> bool:
    """Tell glibc's malloc to keep what is freed from now on, or not to.

    Returns False, with nothing changed, where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc, threshold = ctypes.CDLL(None), _LARGEST if keep else _USUAL
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, threshold)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, threshold))
