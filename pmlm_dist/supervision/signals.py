"""Requests to stop: SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) to any rank, or a file `STOP` in the run folder.

    signal --wake-up pipe--> watcher thread      first signal: a request; at the second one, or at the end of the
                                  |              grace period, the watcher ends the process at once
    STOP (rank 0 polls) ----> agreement of all ranks: at step boundaries, between validation batches, in start-up
                                  |
                              Stopped -> one checkpoint -> exit code 75 (for Ctrl-C 130, for a file 0)

Commands without checkpoints (`interruptible`): the first signal raises KeyboardInterrupt, the watcher is the same.

The watcher receives a signal even while the main thread is inside a collective that never ends, where Python runs no
handler. At every end of the process the last committed checkpoint is valid. The imports are fast: signals are handled
before torch is loaded.
"""

import contextlib
import enum
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from types import FrameType

from pmlm_dist.launch_environment import is_rank_zero
from pmlm_dist.supervision.exit_codes import SIGNALLED, ExitCode

STOP_FILE = "STOP"
EXIT_PREEMPTED = int(ExitCode.PREEMPTED)
"""Preempted, to be restarted."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_STDERR = 2
_MAX_MARGIN_S = 10.0
"""Longest time before the end of the grace period that a save must leave."""


@dataclass(frozen=True)
class SignalTimes:
    """Intervals of the signal watcher, in seconds."""

    duplicate_s: float = 1.0
    """Signals this soon after the first repeat the same request."""
    poll_s: float = 0.1


class StopReason(enum.IntEnum):
    """Reason to stop; of different reasons on the ranks the largest counts."""

    NONE = 0
    FILE = 1
    SIGNAL = 2
    INTERRUPT = 3
    """Ctrl-C: by hand, so that no restart follows."""

    @property
    def exit_code(self) -> int:
        """75 for a run to be restarted, 0 or 130 for one stopped by hand."""
        return {StopReason.SIGNAL: EXIT_PREEMPTED, StopReason.INTERRUPT: int(ExitCode.INTERRUPTED)}.get(self, 0)

    def __str__(self) -> str:
        return ("nothing", f"the file {STOP_FILE} in the run folder", "a signal to stop", "Ctrl-C")[self]


class Stopped(Exception):
    """Raised on all ranks at the same place, after their agreement to stop."""

    def __init__(self, reason: StopReason):
        self.reason, self.exit_code = reason, reason.exit_code
        super().__init__(str(reason))


class StopSignals:
    """The stop signals of this process; `grace_s`: seconds from the first request to the end of the process."""

    def __init__(self, *, grace_s: float = 120.0, times: SignalTimes = SignalTimes()):
        self.grace_s, self._times = grace_s, times
        self.reason = StopReason.NONE
        """The reason to stop, after a signal to this rank or another."""
        self.on_first: Callable[[], None] = lambda: None
        """Called by the watcher thread at the first signal."""
        self._requested_at: float | None = None
        self._signalled_at: float | None = None

    @property
    def requested(self) -> bool:
        """Return True after a stop signal, to this rank or another."""
        return self.reason is not StopReason.NONE

    def deadline(self) -> float:
        """Return the time (`time.monotonic`) by which a save must be complete; infinite without a request."""
        if self._requested_at is None:
            return float("inf")
        return self._requested_at + self.grace_s - min(_MAX_MARGIN_S, self.grace_s / 10)

    def request(self, reason: StopReason = StopReason.SIGNAL) -> None:
        """Start the grace period, unless it has started: another rank has received a signal."""
        self.reason = max(self.reason, reason)
        if self._requested_at is None:
            self._requested_at = time.monotonic()

    def install(self, handler: Callable[[int, FrameType | None], None] | None = None) -> None:
        """Handle the stop signals from now on; call it once, in the main thread, which runs `handler` as well."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._is_loud = handler is None
        for number in STOP_SIGNALS:
            signal.signal(number, handler or _leave_to_watcher)  # replaces the default action, termination
            if handler is None:
                signal.siginterrupt(number, False)  # native libraries do not expect EINTR
        threading.Thread(target=self._watch, args=(reader,), name="stop signals", daemon=True).start()

    def _watch(self, reader: int) -> None:
        while True:
            if select.select([reader], [], [], self._times.poll_s)[0]:
                for number in os.read(reader, 64):
                    self._handle(number)
            if self._requested_at is not None and time.monotonic() > self._requested_at + self.grace_s:
                _exit_at_once(
                    self.reason.exit_code, f"it has not ended {self.grace_s:g} s after a signal to stop (grace_s)"
                )

    def _handle(self, number: int) -> None:
        if number not in STOP_SIGNALS:  # Python writes every signal that has a handler into the pipe
            return
        self.request(StopReason.INTERRUPT if number == signal.SIGINT else StopReason.SIGNAL)
        if self._signalled_at is None:
            self._signalled_at = time.monotonic()
            self.on_first()
            if self._is_loud and is_rank_zero(os.environ):
                _write(f"{signal.Signals(number).name}: stopping at the next step; a second signal ends it at once\n")
        elif time.monotonic() > self._signalled_at + self._times.duplicate_s:
            # Sooner, it is the same request: a launcher forwards a signal that its process group has received as well.
            _exit_at_once(SIGNALLED + number, f"{signal.Signals(number).name} is the second signal to stop")


def _leave_to_watcher(_number: int, _frame: object) -> None:
    pass


def _exit_at_once(code: int, reason: str) -> None:
    _write(f"process {os.getpid()}: {reason}; exiting at once, the last checkpoint is valid\n")
    os._exit(code)


def _write(message: str) -> None:
    """Write to standard error, if that does not block."""
    with contextlib.suppress(OSError):  # standard error may be closed, its reader gone, its disk full
        if select.select([], [_STDERR], [], 0)[1]:  # a full pipe that is not read would block the exit
            os.write(_STDERR, message.encode())  # not print: the thread that holds its lock may hang


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt(number) in the main thread at the first stop signal; not for supervised ranks.

    A second signal, or the end of ten seconds (the main thread may be inside a collective), ends the process at once.
    """
    StopSignals(grace_s=10.0).install(_interrupt)
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)  # no traceback at the interpreter's exit


def _interrupt(number: int, _frame: object) -> None:
    for other in STOP_SIGNALS:
        signal.signal(other, _leave_to_watcher)  # a duplicate must not break off the clean-up
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block the stop signals in processes started inside: SLURM sends them to all processes of a step.

    Their own children inherit the block, those of multiprocessing's fork server for example.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # its start unblocks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
