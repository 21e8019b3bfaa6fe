"""Being told to stop: by SIGTERM or SIGUSR1 on any rank, or by a file `STOP` in the run's folder.

    signal --wake-up pipe--> watcher thread      the first is a request; at the second, or when the time that the
                                  |              request leaves is over, the watcher ends the process at once
    STOP (rank 0 looks) ----> agreement of all ranks: at step boundaries, between validation batches, in start-up
                                  |
                              Stopped -> one checkpoint -> exit code 75 (for a file: 0)

The watcher hears a signal although the training's thread is inside a collective that never ends, where Python runs no
handler. Whenever the process ends, the last checkpoint that is whole stands. Imports nothing slow: signals are listened
for before torch is loaded.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, TypeVar

from pmlm_dist.supervision.exit_codes import ExitCode

if TYPE_CHECKING:
    pass

T = TypeVar("T")

STOP_FILE = "STOP"
EXIT_PREEMPTED = int(ExitCode.PREEMPTED)
"""Nothing is wrong, start it again."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_ECHO_S = 1.0
_POLL_S = 0.1
_LONGEST_MARGIN_S = 10.0


class StopReason(enum.IntEnum):
    """Why to stop; where ranks know of different reasons the largest counts."""

    NONE = 0
    FILE = 1
    SIGNAL = 2


class Stopped(Exception):
    """All ranks have agreed to stop here."""

    def __init__(self, reason: StopReason):
        self.reason = reason
        super().__init__(
            "a signal to stop" if reason is StopReason.SIGNAL else f"the file {STOP_FILE} in the run's folder"
        )

    @property
    def exit_code(self) -> int:
        """75 when the run is to be started again, 0 when it was ended by hand."""
        return EXIT_PREEMPTED if self.reason is StopReason.SIGNAL else 0


class StopSignals:
    """The signals to stop that this process has been sent.

    `grace_s`: seconds from the first one until the process must be gone.
    """

    def __init__(self, *, grace_s: float = 120.0):
        self.grace_s = grace_s
        self._since: float | None = None
        self._heard_at: float | None = None

    @property
    def requested(self) -> bool:
        """Whether there was one."""
        return self._since is not None

    def deadline(self) -> float:
        """When (`time.monotonic`) a save must be done, some time before all is over; infinite without a request."""
        if self._since is None:
            return float("inf")
        return self._since + self.grace_s - min(_LONGEST_MARGIN_S, self.grace_s / 10)

    def request(self) -> None:
        """The time counts from now on, unless it does already: another rank was sent a signal."""
        if self._since is None:
            self._since = time.monotonic()

    def install(self) -> None:
        """Listen for SIGTERM and SIGUSR1 from now on; to be called once, by the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, _do_nothing)  # replaces the default, which is to die
            signal.siginterrupt(number, False)  # the system calls of native libraries go on
        threading.Thread(target=self._watch, args=(reader,), name="stop signals", daemon=True).start()

    def _watch(self, reader: int) -> None:
        while True:
            if select.select([reader], [], [], _POLL_S)[0]:
                for number in os.read(reader, 64):
                    self._handle(number)
            if self._since is not None and time.monotonic() > self._since + self.grace_s:
                _exit_at_once(
                    EXIT_PREEMPTED, f"{self.grace_s:g} s after a signal to stop (--train.grace-s) it is not done"
                )

    def _handle(self, number: int) -> None:
        if number not in STOP_SIGNALS:  # Python writes every signal that has a handler into the pipe
            return
        if self._heard_at is None:
            self._heard_at = time.monotonic()
            self.request()
        elif time.monotonic() > self._heard_at + _ECHO_S:
            # Before, it is one request that came by two ways: a launcher passes on what its process group was sent too.
            _exit_at_once(128 + number, f"{signal.Signals(number).name} is the second signal to stop")


def _do_nothing(_number: int, _frame: object) -> None:
    """The wake-up pipe says it all."""


def _exit_at_once(code: int, why: str) -> None:
    message = f"process {os.getpid()}: {why}; ending at once, the last checkpoint stands\n"
    os.write(sys.stderr.fileno(), message.encode())  # not print: the thread that holds its lock may hang
    os._exit(code)


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Processes started inside never see the signals to stop, which Slurm sends to all processes of a step.

    So do those that such processes start, multiprocessing's fork server for example.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # where it does not run yet, starting it unblocks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
