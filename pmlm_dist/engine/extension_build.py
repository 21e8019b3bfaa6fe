"""The optimizer that DeepSpeed compiles when it is first used, for offloading to the CPU.

torch guards a compilation by a file, which a process that is killed leaves behind: whoever comes later waits for it for
ever. Here the ranks of a machine take turns by a lock that the system takes back when its holder dies. Whoever has it
and finds torch's removes all that was begun there, the folder too: the compiler itself may still be writing to it.
A folder of this project and machine is compiled in, so that nobody else's work is disturbed.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pmlm_dist.config import ConfigError

_FOLDER = "TORCH_EXTENSIONS_DIR"


@contextmanager
def build_lock() -> Iterator[None]:
    """A place to compile in, one process of this machine at a time.

    Raises `ConfigError` where there is none that can be written to and locked.
    """
    given, folder = os.environ.get(_FOLDER), _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        turn = (folder / "in-turn").open("w")
        fcntl.flock(turn, fcntl.LOCK_EX)
    except OSError as error:
        raise ConfigError(
            [f"DeepSpeed's CPU Adam cannot be compiled in {folder}: {error}; set {_FOLDER} to a folder on a local disk"]
        ) from error
    with turn:
        for left in folder.glob("*/lock"):
            shutil.rmtree(left.parent)
        os.environ[_FOLDER] = str(folder)
        try:
            yield
        finally:
            os.environ.pop(_FOLDER)
            if given is not None:
                os.environ[_FOLDER] = given


def _folder() -> Path:
    """Machines may share a home and have other processors."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get(_FOLDER) or get_default_build_root()
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return Path(root) / f"pmlm_dist-{platform.node()}-{python}-torch{torch.__version__}"
