"""Build lock for DeepSpeed's CPU Adam, which is compiled on first use.

torch guards a compilation by a lock file. A killed process leaves the file behind, and later ones wait for it for ever.
Here the ranks of a machine serialize by `flock`, which the system releases when its owner dies. The next owner removes
each folder with a stale lock file: the compiler of the killed process may still be writing into it. The build folder
belongs to this project and machine, so no other program's build is removed.
"""

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
    """Provide a folder to compile in, to one process of this machine at a time.

    Raises `ConfigError` when the folder cannot be written to or locked.
    """
    given, folder = os.environ.get(_FOLDER), _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_file = (folder / "build.lock").open("w")
        fcntl.flock(lock_file, fcntl.LOCK_EX)
    except OSError as error:
        raise ConfigError(
            [f"DeepSpeed's CPU Adam cannot be compiled in {folder}: {error}; set {_FOLDER} to a folder on a local disk"]
        ) from error
    with lock_file:
        for stale in folder.glob("*/lock"):  # of a killed process: this one has the only build lock
            shutil.rmtree(stale.parent)
        os.environ[_FOLDER] = str(folder)
        try:
            yield
        finally:
            os.environ.pop(_FOLDER)
            if given is not None:
                os.environ[_FOLDER] = given


def _folder() -> Path:
    """Build folder of this machine: a shared home may serve machines with other processors."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get(_FOLDER) or get_default_build_root()
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return Path(root) / f"pmlm_dist-{platform.node()}-{python}-torch{torch.__version__}"
