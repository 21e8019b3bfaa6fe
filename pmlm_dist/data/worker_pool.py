"""Worker processes that build items in turn; the items come out in order, and nothing is waited for without end.

    trainer  --number i-->  worker i mod W  --item-->  trainer
                            `-- marks what it is at, for the report of its death

A worker that dies, or that gives nothing for `timeout_s` seconds while the trainer waits, is a `WorkerError` that says
what it was at. Workers end with the trainer, however it ends; they leave Ctrl-C, SIGTERM and SIGUSR1 to it, so that a
run which is told to stop can still finish its step.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import pickle
import queue
import signal
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

_NOTHING = -1
_SECONDS_TO_DIE = 5.0


class WorkerError(RuntimeError):
    """A loader worker is dead, stuck or broken."""


class BatchBuilder(Protocol):
    """What workers run; picklable."""

    @property
    def expected(self) -> tuple[type[Exception], ...]:
        """Errors that come through as they are; any other is a `WorkerError` with its traceback."""
        ...

    def build(self, number: int, *, mark: Callable[[int], None]) -> Any:
        """Item `number`; `mark(place)` says what is being read."""
        ...

    def describe(self, place: int) -> str:
        """What lies at a marked place, for a reader."""
        ...


class WorkerPool(Iterator[Any]):
    """Items `numbers` of `builder`, in order. Workers (none: this process) start at once, `close` ends them."""

    def __init__(
        self,
        builder: BatchBuilder,
        numbers: Iterable[int],
        *,
        workers: int,
        prefetch: int,
        timeout_s: float,
        preload: str,
    ):
        self._builder, self._numbers = builder, iter(numbers)
        self._timeout_s = timeout_s
        self._crew: list[_Worker] = []
        if workers:
            self._start(workers, prefetch=prefetch, preload=preload)

    def __next__(self) -> Any:
        if not self._crew:
            return self._builder.build(next(self._numbers), mark=_mark_nothing)
        if not self._pending:
            raise StopIteration
        worker = self._crew[self._pending.pop(0)]
        outcome, item = self._receive(worker)
        self._ask(worker)
        if outcome == "error":
            raise item
        if outcome == "traceback":
            place, trace = item
            raise WorkerError(f"{self._at(worker, place)} failed:\n{trace}")
        return item

    def close(self) -> None:
        """End the workers."""
        for worker in self._crew:
            worker.process.kill()  # it holds nothing that a kill could break
            worker.connection.close()
        for worker in self._crew:
            worker.process.join(_SECONDS_TO_DIE)
        self._numbers = iter(())
        self._crew, self._pending = [], []

    def _start(self, workers: int, *, prefetch: int, preload: str) -> None:
        context = _context(preload)
        marks = context.RawArray("q", [_NOTHING] * workers)
        self._crew = [_Worker(context, self._builder, marks, number, self._timeout_s) for number in range(workers)]
        self._pending: list[int] = []
        for number in itertools.islice(itertools.cycle(range(workers)), workers * prefetch):
            self._ask(self._crew[number])

    def _ask(self, worker: _Worker) -> None:
        """Ask for the next item; whoever was asked first is listened to first."""
        number = next(self._numbers, None)
        if number is not None:
            self._pending.append(worker.number)
            try:
                worker.connection.send(number)
            except OSError:  # dead: said when its item is waited for
                return

    def _receive(self, worker: _Worker) -> tuple[str, Any]:
        ready = multiprocessing.connection.wait([worker.connection, worker.process.sentinel], timeout=self._timeout_s)
        if not ready:
            raise self._stuck(worker)
        try:
            return pickle.loads(worker.connection.recv_bytes())
        except BlockingIOError as error:  # stopped in the middle of an item
            raise self._stuck(worker) from error
        except (EOFError, OSError) as error:
            raise self._dead(worker) from error

    def _stuck(self, worker: _Worker) -> WorkerError:
        return WorkerError(
            f"{self._at(worker)} has given nothing for {self._timeout_s:g} s (data.timeout_s): the storage or the "
            "network behind this shard does not answer, or the time is too short for it"
        )

    def _dead(self, worker: _Worker) -> WorkerError:
        worker.process.join(_SECONDS_TO_DIE)
        code = worker.process.exitcode
        how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        return WorkerError(
            f"{self._at(worker)} died {how}: SIGKILL usually means that memory ran out, so use fewer --data.workers "
            "or ask for more memory"
        )

    def _at(self, worker: _Worker, place: int | None = None) -> str:
        """Who a worker is and what it is at: `place`, or what it has marked last."""
        last: int = worker.marks[worker.number] if place is None else place
        at = "before its first sample" if last == _NOTHING else f"at {self._builder.describe(last)}"
        return f"loader worker {worker.number} (pid {worker.process.pid}), {at},"


class _Worker:
    """One worker process, seen from the trainer."""

    def __init__(
        self,
        context: multiprocessing.context.BaseContext,
        builder: BatchBuilder,
        marks: Any,
        number: int,
        timeout_s: float,
    ):
        self.number, self.marks = number, marks
        self.connection, other_end = context.Pipe()
        _limit_reads(self.connection, timeout_s)
        self.process: Any = context.Process(target=_work, args=(builder, other_end, marks, number), daemon=True)  # pyright: ignore[reportAttributeAccessIssue]
        self.process.start()
        other_end.close()


def _limit_reads(connection: Connection, timeout_s: float) -> None:
    """Make a read that gets nothing for so long end with BlockingIOError: a worker may be stopped amid a message."""
    seconds, fraction = divmod(timeout_s, 1)
    with socket.socket(fileno=os.dup(connection.fileno())) as of_connection:
        of_connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(fraction * 1e6))
        )


def _mark_nothing(_place: int) -> None:
    """There is nobody to tell."""


def _context(preload: str) -> multiprocessing.context.BaseContext:
    """How workers are started: forked from a server process that has imported `preload` and done nothing else.

    `fork` would copy a process with threads (torch, gloo, CUDA, MPI) whose locks may be held at that moment, and the
    memory that an InfiniBand card has registered. `spawn` would import torch anew in every worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context


# --------------------------------------------------------------------------------------------------------- in a worker


def _work(builder: BatchBuilder, connection: Connection, marks: Any, slot: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    torch.set_num_threads(1)
    outgoing: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # A thread of its own: a pipe holds less than an item, and the next one is to be built meanwhile.
    threading.Thread(target=_send, args=(connection, outgoing), name="send", daemon=True).start()

    def mark(place: int) -> None:
        marks[slot] = place

    while True:
        try:
            number = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        outcome = _outcome(builder, number, mark=mark)
        if outcome[0] == "traceback":
            outcome = ("traceback", (marks[slot], outcome[1]))  # it will be further on when this is read
        outgoing.put(pickle.dumps(outcome, protocol=pickle.HIGHEST_PROTOCOL))


def _outcome(builder: BatchBuilder, number: int, *, mark: Callable[[int], None]) -> tuple[str, Any]:
    try:
        return "item", builder.build(number, mark=mark)
    except builder.expected as error:
        return "error", error
    except Exception:  # whatever it is, the trainer is to hear of it
        return "traceback", traceback.format_exc()


def _send(connection: Connection, outgoing: queue.SimpleQueue[bytes]) -> None:
    while True:
        try:
            connection.send_bytes(outgoing.get())
        except OSError:
            os._exit(0)


def _end_with_parent() -> None:
    """End this worker when the trainer is gone, whatever it is doing."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker has a parent to watch"
    parent.join()
    os._exit(1)
