"""Ranks on this machine for benchmarks: processes that are told, in turn with others, to do their work once more.

    with World(prepare, ranks=2, threads=1) as world:      prepare(*args) runs on every rank and returns its work
        answers = world.call()                             the work, once, on every rank; the answers in order of rank

Ranks are forked from a server that has imported torch and DeepSpeed; each has threads of its own, and is tied to cores
of its own where there are as many. A world that fails or does not answer in time is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ["pmlm_dist.training.run"]
CORES = sorted(os.sched_getaffinity(0))
"""Cores that this process was given."""


class World:
    """`ranks` processes, the work of each prepared."""

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
        self._answers()  # prepared

    def __enter__(self) -> World:
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
        """The work, once, on every rank at the same time. Raises `RuntimeError` when one of them fails or is silent."""
        for pipe in self._pipes:
            pipe.send(True)
        return self._answers()

    def _answers(self) -> list[Any]:
        deadline, answers = time.monotonic() + self._timeout_s, []
        for rank, pipe in enumerate(self._pipes):
            text = "no answer in time"
            try:
                ok, answer = pipe.recv() if pipe.poll(max(0.0, deadline - time.monotonic())) else (False, text)
            except EOFError:
                ok, answer = False, "the process ended"
            if not ok:
                for process in self._processes:
                    process.kill()
                raise RuntimeError(f"rank {rank} of {len(self._pipes)}: {answer}")
            answers.append(answer)
        return answers


@dataclass(frozen=True)
class _Place:
    """Where a rank is, and what it may use."""

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
        pass  # whoever asked is gone
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    os._exit(0)  # a finished ZeRO-3 run on gloo can abort in its destructors


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
