"""Worlds of ranks on this machine for benchmarks; several can exist at once and be called in turn.

    with World(prepare, ranks=2, threads=1) as world:      prepare(*args) runs on every rank and returns its function
        results = world.call()                             calls that function once on every rank; results by rank

Ranks are forked from a server that has imported torch and DeepSpeed. Each has its own threads, and its own cores where
there are enough. A world that fails or times out is killed.
"""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ["pmlm_dist.training.run"]
CORES = sorted(os.sched_getaffinity(0))
"""Cores available to this process."""


class World:
    """`ranks` processes with prepared functions."""

    def __init__(
        self,
        prepare: Callable[..., Callable[[], Any]],
        *args: Any,
        ranks: int,
        threads: int = 1,
        timeout_s: float = 300.0,
    ):
        _CONTEXT.set_forkserver_preload(_PRELOADED)
        port, self._timeout_s = _free_port(), timeout_s
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(ranks):
            ours, theirs = _CONTEXT.Pipe()
            place = _Place(rank, ranks, port, threads, _cores(rank, ranks, threads))
            process = _CONTEXT.Process(target=_serve, args=(theirs, place, prepare, args), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._results()  # of `prepare`

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(False)
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
            process.join()

    def call(self) -> list[Any]:
        """Call the function once on every rank at the same time. Raises `RuntimeError` on a failure or a timeout."""
        for pipe in self._pipes:
            pipe.send(True)
        return self._results()

    def _results(self) -> list[Any]:
        deadline, results = time.monotonic() + self._timeout_s, []
        for rank, pipe in enumerate(self._pipes):
            timeout = (False, f"no result within {self._timeout_s} seconds")
            try:
                ok, result = pipe.recv() if pipe.poll(max(0.0, deadline - time.monotonic())) else timeout
            except EOFError:
                ok, result = False, "the process exited"
            if not ok:
                for process in self._processes:
                    process.kill()
                raise RuntimeError(f"rank {rank} of {len(self._pipes)}: {result}")
            results.append(result)
        return results


@dataclass(frozen=True)
class _Place:
    """Position of a rank in its world, and its threads and cores."""

    rank: int
    ranks: int
    port: int
    threads: int
    cores: list[int]


def _cores(rank: int, ranks: int, threads: int) -> list[int]:
    return CORES[rank * threads : (rank + 1) * threads] if len(CORES) >= ranks * threads else CORES


def _serve(pipe: Connection, place: _Place, prepare: Callable[..., Any], args: tuple) -> None:
    import torch

    os.sched_setaffinity(0, place.cores)
    torch.set_num_threads(place.threads)
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.ranks),
        LOCAL_RANK=str(place.rank),
        LOCAL_WORLD_SIZE=str(place.ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(place.port),
    )
    try:
        work = prepare(*args)
        pipe.send((True, None))
        while pipe.recv():
            pipe.send((True, work()))
    except EOFError:
        pass  # the parent process has exited
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    os._exit(0)  # a finished ZeRO-3 run on gloo can abort in its destructors


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
