"""Worker pool: processes that build items in turn, returned in order, with a time limit on every wait.

    trainer  --number i-->  worker i mod W  --item-->  trainer
                            `-- sets a progress marker, used in error messages

A worker that dies, or that sends nothing for `timeout_s` seconds while the trainer waits, raises `WorkerError` with its
progress marker. Workers exit when the trainer exits or is killed. They ignore SIGINT, SIGTERM and SIGUSR1, so that a
run that is stopped by a signal can finish its step.
"""

from __future__ import annotations

import contextlib
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

_NOT_STARTED = -1
_JOIN_TIMEOUT_S = 5.0


class WorkerError(RuntimeError):
    """A loader worker died, timed out or raised an unexpected exception."""


class BatchBuilder(Protocol):
    """The function that workers run, and the description of its progress; picklable."""

    @property
    def expected_errors(self) -> tuple[type[Exception], ...]:
        """Exceptions that are raised unchanged in the trainer; others become a `WorkerError` with a traceback."""
        ...

    def build(self, number: int, *, set_progress: Callable[[int], None]) -> Any:
        """Return item `number`; `set_progress(position)` before each read sets the progress marker."""
        ...

    def describe(self, position: int) -> str:
        """Return the meaning of a progress marker, for an error message."""
        ...


class WorkerPool(Iterator[Any]):
    """Items `numbers` of `builder`, in order.

    `workers`: processes, started immediately and stopped by `close`; 0 builds the items in this process. `prefetch`:
    items requested ahead from each worker. `preload`: module that every worker has imported.
    """

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
        self._workers: list[_Worker] = []
        self._pending: list[int] = []  # worker of each requested item, oldest first
        if workers:
            self._start(workers, prefetch=prefetch, preload=preload)

    def __next__(self) -> Any:
        if not self._workers:
            return self._builder.build(next(self._numbers), set_progress=lambda position: None)
        if not self._pending:
            raise StopIteration
        worker = self._workers[self._pending.pop(0)]
        kind, item = self._receive(worker)
        self._request(worker)
        if kind == "error":
            raise item
        if kind == "traceback":
            position, trace = item
            raise WorkerError(f"{self._describe(worker, position)} failed:\n{trace}")
        return item

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()  # safe: the shard cache, all that a worker writes, is built to survive a kill
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(_JOIN_TIMEOUT_S)
        self._numbers = iter(())
        self._workers, self._pending = [], []

    def _start(self, workers: int, *, prefetch: int, preload: str) -> None:
        context = _context(preload)
        progress = context.RawArray("q", [_NOT_STARTED] * workers)
        self._workers = [_Worker(context, self._builder, progress, slot, self._timeout_s) for slot in range(workers)]
        for worker in self._workers * prefetch:
            self._request(worker)

    def _request(self, worker: _Worker) -> None:
        """Request the next item, if there is one, from `worker`."""
        number = next(self._numbers, None)
        if number is not None:
            self._pending.append(worker.number)
            with contextlib.suppress(OSError):  # the worker is dead: reported when its item is received, in order
                worker.connection.send(number)

    def _receive(self, worker: _Worker) -> tuple[str, Any]:
        # The sentinel too: a killed worker must be reported at once, even if its end of the pipe is open elsewhere.
        ready = multiprocessing.connection.wait([worker.connection, worker.process.sentinel], timeout=self._timeout_s)
        if not ready:
            raise self._timeout_error(worker)
        try:
            return pickle.loads(worker.connection.recv_bytes())
        except BlockingIOError as error:  # the worker was stopped in the middle of a message
            raise self._timeout_error(worker) from error
        except (EOFError, OSError) as error:
            raise self._exit_error(worker) from error

    def _timeout_error(self, worker: _Worker) -> WorkerError:
        return WorkerError(
            f"{self._describe(worker)} sent nothing for {self._timeout_s:g} s (data.timeout_s): the storage or network "
            "of this shard does not respond, or the timeout is too short"
        )

    def _exit_error(self, worker: _Worker) -> WorkerError:
        worker.process.join(_JOIN_TIMEOUT_S)
        code = worker.process.exitcode
        how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        return WorkerError(
            f"{self._describe(worker)} died {how}: SIGKILL usually means out of memory, so use fewer --data.workers "
            "or request more memory"
        )

    def _describe(self, worker: _Worker, position: int | None = None) -> str:
        """Return number, process id and position of a worker; the position is by default its progress marker."""
        last: int = worker.progress[worker.number] if position is None else position
        at = "before its first sample" if last == _NOT_STARTED else f"at {self._builder.describe(last)}"
        return f"loader worker {worker.number} (pid {worker.process.pid}), {at},"


class _Worker:
    """The trainer's end of one worker process."""

    def __init__(
        self,
        context: multiprocessing.context.BaseContext,
        builder: BatchBuilder,
        progress: Any,
        number: int,
        timeout_s: float,
    ):
        self.number, self.progress = number, progress
        self.connection, worker_end = context.Pipe()
        _set_receive_timeout(self.connection, timeout_s)
        self.process: Any = context.Process(target=_run, args=(builder, worker_end, progress, number), daemon=True)  # pyright: ignore[reportAttributeAccessIssue]
        self.process.start()
        worker_end.close()  # else the pipe would stay open when the worker dies


def _set_receive_timeout(connection: Connection, timeout_s: float) -> None:
    """Make a blocked read raise BlockingIOError after `timeout_s`.

    Polling covers the wait for a message only: a worker that is stopped in the middle of one would block the trainer.
    """
    seconds, fraction = divmod(timeout_s, 1)
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(fraction * 1e6))
        )


def _context(preload: str) -> multiprocessing.context.BaseContext:
    """Return the start method: fork from a server process that has only imported `preload`.

    `fork` would copy a process with threads (torch, gloo, CUDA, MPI), whose locks may be held at that moment, and the
    memory that an InfiniBand card has registered. `spawn` would import torch in every worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context


# --------------------------------------------------------------------------------------------------------- in a worker


def _run(builder: BatchBuilder, connection: Connection, progress: Any, slot: int) -> None:
    """Build the requested items until the connection closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()
    torch.set_num_threads(1)
    outgoing: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # A pipe buffers less than one item, so sending blocks: a thread sends while the next item is built.
    threading.Thread(target=_send, args=(connection, outgoing), name="send", daemon=True).start()
    while True:
        try:
            number = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        outgoing.put(pickle.dumps(_build(builder, number, progress, slot), protocol=pickle.HIGHEST_PROTOCOL))


def _build(builder: BatchBuilder, number: int, progress: Any, slot: int) -> tuple[str, Any]:
    def set_progress(position: int) -> None:
        progress[slot] = position

    try:
        return "item", builder.build(number, set_progress=set_progress)
    except builder.expected_errors as error:
        return "error", error
    except Exception:  # any other is reported too: the exception itself may not be picklable
        # The marker is copied now: it has advanced to a later item by the time the message is read.
        return "traceback", (progress[slot], traceback.format_exc())


def _send(connection: Connection, outgoing: queue.SimpleQueue[bytes]) -> None:
    while True:
        try:
            connection.send_bytes(outgoing.get())
        except OSError:
            os._exit(0)


def _exit_with_parent() -> None:
    """Exit when the trainer exits; a thread, because the main thread may be blocked in a read."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process has a parent process"
    parent.join()
    os._exit(1)
