"""The optimizer that DeepSpeed compiles when it is first used, for offloading to the CPU.

torch guards a compilation by a file, which a process that is killed leaves behind: whoever comes later waits for it for
ever. Here ranks of a machine take turns by a lock that the system takes back when its holder dies; who has it removes
torch's. For no other program's compilation to be disturbed, ours has a folder of its own.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_FOLDER = "TORCH_EXTENSIONS_DIR"


@contextmanager
def compiling() -> Iterator[None]:
    """A place to compile in, one process of this machine at a time; a compiler that was killed in it is forgotten."""
    from torch.utils.cpp_extension import get_default_build_root

    given = os.environ.get(_FOLDER)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}-torch{torch.__version__}"
    folder = Path(given or get_default_build_root()) / f"pmlm_dist-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "in-turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for left in folder.glob("*/lock"):
            left.unlink()
        os.environ[_FOLDER] = str(folder)
        try:
            yield
        finally:
            if given is None:
                del os.environ[_FOLDER]
            else:
                os.environ[_FOLDER] = given
