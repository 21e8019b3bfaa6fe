"""Agreement of all ranks on stopping and on their data, one all-reduce on the host a step.

    step n:      data -> forward of the last micro-batch -> begin -> backward, update -> log, evaluate, save
    step n + 1:  data: result of that all-reduce: a stop -> `Stopped` on every rank at the same place -> one checkpoint
                                                  all have their data -> no further communication
                                                  otherwise -> agreements that are waited for, until all have them

The all-reduce of step n + 1 runs beside the backward pass of step n, so that no rank waits for it. A prefetcher has
read the data by then. A signal that a rank receives after `begin` counts one step later.
Signals of one process: supervision/signals.py.
"""

import enum
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

from pmlm_dist.parallel.groups import PendingMaxima, Topology
from pmlm_dist.supervision.heartbeat import STEP, Heartbeat
from pmlm_dist.supervision.signals import Stopped, StopReason, StopSignals

T = TypeVar("T")

_POLL_S = 0.1


class Readiness(enum.IntEnum):
    """State of a rank's data; of different states on the ranks the largest counts."""

    READY = 0
    FAILED = 1
    """An error instead of the data."""
    MISSING = 2


class Prefetcher(Generic[T]):
    """The next `count` items of an iterator, fetched by a thread, so that the caller can wait in short polls."""

    def __init__(self, items: Iterator[T], *, count: int):
        self._items, self._count = items, count
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetcher")
        self._future: Future[list[T]] | None = None

    def start(self) -> None:
        """Start to fetch the next items, unless that has started; returns at once."""
        if self._future is None:
            self._future = self._pool.submit(lambda: list(islice(self._items, self._count)))

    def readiness(self, *, within_s: float = 0.0) -> Readiness:
        """Return whether the items, or an error instead, are available; waits for `within_s` seconds at most."""
        self.start()
        assert self._future is not None
        wait_for_futures([self._future], timeout=within_s)
        if not self._future.done():
            return Readiness.MISSING
        return Readiness.READY if self._future.exception() is None else Readiness.FAILED

    def take(self) -> list[T]:
        """Return the items, or raise their error; blocks until one of them is available."""
        self.start()
        assert self._future is not None
        future, self._future = self._future, None
        return future.result()

    def close(self) -> None:
        """Close the iterator once the thread is not inside it; a thread that stays inside ends with the process."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._future is None:
            self._close_items()
        else:
            self._future.add_done_callback(lambda _: self._close_items())

    def _close_items(self) -> None:
        self._items.close()  # pyright: ignore[reportAttributeAccessIssue]


class StopAgreement:
    """Decides on all ranks together whether to stop; every rank calls the same methods in the same order.

    `signals` are those of this process; the file `file` stops the run as well. Every check beats `heartbeat`.
    """

    def __init__(self, signals: StopSignals, *, file: Path, topology: Topology, heartbeat: Heartbeat | None = None):
        self._signals, self._file, self._topology = signals, file, topology
        self._pending: PendingMaxima | None = None
        self.heartbeat = heartbeat or Heartbeat()
        self.data_wait_s = 0.0
        """Seconds that this rank waited for its own items in the last `wait_for`."""

    def deadline(self) -> float:
        """Time (`time.monotonic`) by which a save must be complete; infinite without a stop signal."""
        return self._signals.deadline()

    def begin(self, own: Readiness = Readiness.READY) -> None:
        """Start the agreement of the next step: its data are in state `own` on this rank. Waits for no other rank."""
        assert self._pending is None, "an agreement has been started and its result not been read"
        self._pending = self._topology.start_all_reduce_max(self._reason(), own)

    def check(self) -> None:
        """Raise `Stopped` on all ranks if any rank has a reason to stop."""
        self.heartbeat.beat()
        self._agree(Readiness.READY)

    def check_begun(self) -> None:
        """Raise `Stopped` as `check` does, by the result of the agreement that was begun; without one, `check`."""
        self.heartbeat.beat()
        self._result_of_begun(otherwise=Readiness.READY)

    def checked_before_each(self, items: Iterable[T], *, enabled: bool = True) -> Iterator[T]:
        """Yield `items`, equally many on every rank, with a check before each; not `enabled`: with a heartbeat only."""
        for item in items:
            if enabled:
                self.check()
            self.heartbeat.beat()
            yield item

    def wait_for(self, prefetcher: Prefetcher[T]) -> bool:
        """Wait until no rank misses its items; return False if any has an error instead. Raises `Stopped` as `check`.

        Ranks keep agreeing while data are missing, so a rank whose data never come does not block a stop.
        """
        self.data_wait_s, start = 0.0, time.monotonic()
        own = prefetcher.readiness()
        while True:
            if own is not Readiness.MISSING:  # from here on this rank waits for others, which still beat "data"
                self.heartbeat.enter(STEP)
            of_all = self._result_of_begun(otherwise=own)
            if of_all is not Readiness.MISSING:
                return of_all is Readiness.READY
            if own is Readiness.MISSING:
                own = prefetcher.readiness(within_s=_POLL_S)
                self.data_wait_s = time.monotonic() - start

    def _result_of_begun(self, *, otherwise: Readiness) -> Readiness:
        """Result of the agreement that was begun in the step before; without one, an agreement on `otherwise`."""
        pending, self._pending = self._pending, None
        return self._agree(otherwise) if pending is None else self._conclude(pending)

    def _agree(self, own: Readiness) -> Readiness:
        return self._conclude(self._topology.start_all_reduce_max(self._reason(), own))

    def _conclude(self, pending: PendingMaxima) -> Readiness:
        reason, readiness = pending.wait()
        self._raise_if_stopped(StopReason(reason))
        return Readiness(readiness)

    def _reason(self) -> StopReason:
        if self._signals.requested:
            return self._signals.reason
        return StopReason.FILE if self._topology.is_rank_zero and self._file.exists() else StopReason.NONE

    def _raise_if_stopped(self, reason: StopReason) -> None:
        if reason > StopReason.FILE:
            self._signals.request(reason)  # starts the grace period on ranks that received no signal themselves
        if reason is not StopReason.NONE:
            raise Stopped(reason)
