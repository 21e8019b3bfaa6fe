"""Agreement of all ranks on stopping, and data that are waited for without blocking a stop.

    signal (any rank), file STOP (rank 0) -> one all-reduce on the host, between steps and while data are missing
                                          -> Stopped on every rank at the same place -> one checkpoint

Signals of one process: supervision/signals.py.
"""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

from pmlm_dist.parallel.groups import Topology
from pmlm_dist.supervision.heartbeat import STEP, Heartbeat
from pmlm_dist.supervision.signals import Stopped, StopReason, StopSignals

T = TypeVar("T")

_POLL_S = 0.1


class Prefetcher(Generic[T]):
    """The next `count` items of an iterator, fetched by a thread, so that the caller can wait in short polls."""

    def __init__(self, items: Iterator[T], *, count: int):
        self._items, self._count = items, count
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetcher")
        self._future: Future[list[T]] | None = None

    def is_ready(self, *, within_s: float) -> bool:
        """Return True if the items, or the error raised instead, are available within `within_s` seconds."""
        if self._future is None:
            self._future = self._pool.submit(lambda: list(islice(self._items, self._count)))
        wait_for_futures([self._future], timeout=within_s)
        return self._future.done()

    def take(self) -> list[T]:
        """Return the items, or raise their error; blocks until one of them is available."""
        self.is_ready(within_s=0)
        assert self._future is not None
        future, self._future = self._future, None
        return future.result()

    def close(self) -> None:
        """Close the iterator, unless the thread is still inside it: then it ends with this process."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._future is None or self._future.done():
            self._items.close()  # pyright: ignore[reportAttributeAccessIssue]


class StopAgreement:
    """Decides on all ranks together whether to stop; every rank calls the same methods in the same order.

    `signals` are those of this process; the file `file` stops the run as well. Every check beats `heartbeat`.
    """

    def __init__(self, signals: StopSignals, *, file: Path, topology: Topology, heartbeat: Heartbeat | None = None):
        self._signals, self._file, self._topology = signals, file, topology
        self.heartbeat = heartbeat or Heartbeat()
        self.data_wait_s = 0.0
        """Seconds that this rank waited for its own items in the last `wait_for`."""

    def deadline(self) -> float:
        """Time (`time.monotonic`) by which a save must be complete; infinite without a stop signal."""
        return self._signals.deadline()

    def check(self) -> None:
        """Raise `Stopped` on all ranks if any rank has a reason to stop."""
        self.heartbeat.beat()
        (reason,) = self._topology.all_reduce_max(self._reason())
        self._raise_if_stopped(StopReason(reason))

    def checked_before_each(self, items: Iterable[T], *, enabled: bool = True) -> Iterator[T]:
        """Yield `items`, equally many on every rank, with a check before each; not `enabled`: with a heartbeat only."""
        for item in items:
            if enabled:
                self.check()
            self.heartbeat.beat()
            yield item

    def wait_for(self, prefetcher: Prefetcher[T]) -> list[T]:
        """Return the prefetched items once every rank has its own. Raises `Stopped` as `check` does.

        Ranks keep agreeing while data are missing, so a rank whose data never come does not block a stop.
        """
        missing, is_missing, start = 1, True, time.monotonic()
        while missing:
            if is_missing:
                is_missing = not prefetcher.is_ready(within_s=_POLL_S)
                self.data_wait_s = time.monotonic() - start
            if not is_missing:  # from here on this rank waits for others, whose heartbeats still say "data"
                self.heartbeat.enter(STEP)
            reason, missing = self._topology.all_reduce_max(self._reason(), int(is_missing))
            self._raise_if_stopped(StopReason(reason))
        return prefetcher.take()

    def _reason(self) -> StopReason:
        if self._signals.requested:
            return self._signals.reason
        return StopReason.FILE if self._topology.is_rank_zero and self._file.exists() else StopReason.NONE

    def _raise_if_stopped(self, reason: StopReason) -> None:
        if reason > StopReason.FILE:
            self._signals.request(reason)  # starts the grace period on ranks that received no signal themselves
        if reason is not StopReason.NONE:
            raise Stopped(reason)
