"""glibc's malloc on a CPU: keep freed memory in the process (fast) or return it to the system (small).

By default glibc returns large blocks on `free` and maps them again a moment later. Every page then faults and is
zeroed again, which took a sixth of a training step. A step allocates the same sizes over and over, so blocks can be
kept. The cost is fragmentation of the heap (devices.py, `HEAP_SLACK`). With blocks returned, the process holds only
what its tensors need. Accelerators have their own caching allocators.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1  # maximum of mallopt's int argument; larger blocks are still mapped
_DEFAULT = 128 * 1024  # glibc's initial threshold; setting it disables its automatic growth


def keep_freed_memory(*, keep: bool = True) -> bool:
    """Set glibc's malloc to keep freed memory from now on, or to return it.

    Returns False, without any effect, when the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc, threshold = ctypes.CDLL(None), _LARGEST if keep else _DEFAULT
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, threshold)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, threshold))
