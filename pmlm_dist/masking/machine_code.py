"""Compiled functions: numba, with the machine code cached on disk wherever this user can write.

    beside the module | NUMBA_CACHE_DIR | the user's cache | a temporary folder of the user | in memory alone

The first three are numba's own. It fails if none of them can be written to: a container with a read-only home.
"""

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit


def compiled(function: Callable[..., Any]) -> Any:
    """Compile `function` at its first call, or load its machine code from the cache."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:
        folder = _temporary_folder()
    if folder is None:
        return njit(function)
    os.environ["NUMBA_CACHE_DIR"] = str(folder)  # loader workers read the same cache
    config.reload_config()
    return njit(cache=True)(function)


def _temporary_folder() -> Path | None:
    """Return a folder that only this user can write to: code is loaded from it. None if there is no such folder."""
    try:
        folder = Path(tempfile.gettempdir()) / f"pmlm_dist-numba-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if is_own and os.access(folder, os.W_OK) else None
