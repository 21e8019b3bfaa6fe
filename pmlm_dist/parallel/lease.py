"""The lock of an output, held by rank 0 for all ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pmlm_dist.config import raise_if_any
from pmlm_dist.folder_lock import FolderInUse, FolderLock
from pmlm_dist.parallel.groups import Topology


@contextmanager
def lease(output: Path, topology: Topology, *, beside: bool = False) -> Iterator[tuple[str, Callable[[], None]]]:
    """Hold the lock of `output` on rank 0 for all (`FolderLock`); yields the attempt's name and the check of the lock.

    Raises `FolderInUse`, or `ConfigError` if the lock cannot be written, on every rank.
    """
    lock, in_use, problems = None, "", []
    if topology.is_rank_zero:
        try:
            lock = FolderLock.acquire(output, beside=beside)
        except FolderInUse as error:
            in_use = str(error)
        except OSError as error:
            problems = [f"{output} cannot be written: {error}; name another output"]
    name, in_use, problems = topology.broadcast_object((lock.attempt if lock else "", in_use, problems))
    raise_if_any(problems)
    if in_use:
        raise FolderInUse(in_use)
    try:
        yield name, (lock.check if lock else lambda: None)
    finally:
        if lock:
            lock.release()
