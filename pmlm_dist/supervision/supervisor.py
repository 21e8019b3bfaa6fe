"""A small process outside each rank that notices when the rank, or another one, is in trouble, and ends it.

    launcher (srun, deepspeed, torchrun, mpirun)
       |-- supervisor of rank 0 --fork--> rank 0 (torch) -- loader processes
       `-- supervisor of rank 1 --fork--> rank 1 (torch) -- loader processes
                 ^ heartbeat (shared memory): phase, step       | silent for longer than its phase may take,
                 |                                              | an error, a signal, no memory
                 `-- RUN_DIR/logs/ATTEMPT/ <-----------------------'
                       what ended this start of the run, where each rank was (causes.py)

`train.py` parts into both by itself, so every launcher starts supervised ranks and a debugger can do without
(`PMLM_SUPERVISOR=off`). A supervisor works alone: on trouble with its own rank it writes the cause; it looks for other
ranks' cause once a second. Then it adds its own report, ends its rank (TERM, then KILL, with all that the rank has
started) and ends with the code of the cause (`exit_codes.py`), the same on every rank. It dies with its launcher, and
its rank with it. Imports neither torch nor DeepSpeed: a rank that holds the interpreter's lock cannot watch itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, NoReturn

from pmlm_dist.launch_environment import rank_in
from pmlm_dist.supervision import attempts, processes
from pmlm_dist.supervision.exit_codes import COLLECTIVE_ENDS, SIGNALLED, ExitCode, describe, run
from pmlm_dist.supervision.failure_reports import (
    LOGS,
    Failure,
    RankReport,
    read_failure,
    read_reports,
    summary,
    write_failure,
    write_report,
)
from pmlm_dist.supervision.heartbeat import Beat, Heartbeat

SUPERVISOR_VARIABLE = "PMLM_SUPERVISOR"

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
_HANDLED = (*_FORWARDED, signal.SIGCHLD)
_POLL_S = 0.25
_FAILURE_POLL_S = 1.0
"""Between two looks for the cause that another rank's supervisor has written."""
_ROOT_CAUSE_S = 3.0
"""How long an error that tells of other ranks waits for theirs."""
_REPORTS_S = 3.0
_TERM_S = 5.0


def run_supervised(main: Callable[[Heartbeat], int | None], *, program: str = "train.py") -> int:
    """Exit code of `main`, which runs as the rank in a process of its own; to be called once, before any thread is.

    Returns in both processes; each is to end with it, by `leave`: a rank's destructors can abort a finished run.
    """
    heartbeat = Heartbeat()
    if os.environ.get(SUPERVISOR_VARIABLE) == "off":
        return run(partial(main, heartbeat), program=program, on_failure=heartbeat.fail)
    stacks = tempfile.TemporaryFile()  # noqa: SIM115  # the rank writes into it as long as it lives
    kills_before = processes.out_of_memory_kills()
    _flush()
    processes.adopt_orphans()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    parent, child = os.getpid(), os.fork()
    if child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the rank as well
        return Supervisor(child, heartbeat, stacks, kills_before=kills_before).watch()
    processes.die_with_parent()
    if os.getppid() != parent:
        os._exit(SIGNALLED + signal.SIGKILL)
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR2, stacks)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return run(partial(main, heartbeat), program=program, on_failure=heartbeat.fail)


def exit_now(code: int) -> NoReturn:
    """End this process with what `supervised` has returned, also where nobody takes its last lines any more."""
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # what a full disk did not take would be tried again, and raise
            stream.flush()


class Supervisor:
    """Watches one rank, the process `child`, until it has ended."""

    def __init__(self, child: int, heartbeat: Heartbeat, stacks: IO[bytes], *, kills_before: int):
        self._child, self._heartbeat, self._stacks = child, heartbeat, stacks
        self._kills_before = kills_before
        self._status: int | None = None
        self._last_beat = Beat(0, 0, "start-up", float("inf"), time.monotonic())
        self._silence_s = 0.0
        self._began, self._listened = time.time(), time.monotonic()
        self._looked = 0.0

    def watch(self) -> int:
        """Returns the exit code of this process."""
        cause = None
        while not self._has_ended(within_s=_POLL_S) and cause is None:
            self._read_heartbeat()
            cause = self._hang() or self._failure_of_other_rank()
        if cause is None:
            cause = self._own_failure()
        if cause is not None:
            cause = self._publish(cause)
            self._wait_for_reports(cause)
            self._write_report()
            self._end_rank()
        code = self._code if cause is None else cause.code
        processes.end_descendants()
        processes.clear_shared_memory(self._began)
        self._print_summary(cause, code)
        return code

    # ----------------------------------------------------------------------------------------------------- the rank

    def _has_ended(self, *, within_s: float) -> bool:
        """Wait for something to happen, pass signals on; whether the rank's process is gone."""
        if self._status is None:
            heard = signal.sigtimedwait(_HANDLED, within_s)
            if heard is not None and heard.si_signo in _FORWARDED:
                processes.send(self._child, signal.Signals(heard.si_signo))
            self._reap()
        return self._status is not None

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._child:
                    self._status = ended[1]

    @property
    def _code(self) -> int:
        assert self._status is not None
        code = os.waitstatus_to_exitcode(self._status)
        return code if code >= 0 else SIGNALLED - code

    def _read_heartbeat(self) -> None:
        """Silence grows by no more than twice the time between two looks: a machine that slept is no rank that hung."""
        beat = self._heartbeat.read()
        if beat is not None and beat.count != self._last_beat.count:
            self._last_beat, self._silence_s = beat, 0.0
        else:
            self._silence_s += min(time.monotonic() - self._listened, 2 * _POLL_S)
        self._listened = time.monotonic()

    def _hang(self) -> Failure | None:
        if self._silence_s <= self._last_beat.limit_s:
            return None
        return self._failure(ExitCode.HUNG, f"made no progress for {self._last_beat.limit_s:g} s")

    def _own_failure(self) -> Failure | None:
        """Why the rank has ended; None where all ranks end alike."""
        words, code = self._heartbeat.status(), self._code
        if code in COLLECTIVE_ENDS:
            return None
        beat = self._heartbeat.read()
        self._last_beat = beat or self._last_beat
        if words.failure is not None:
            if words.blames_peers and (cause := self._wait_for_failure(_ROOT_CAUSE_S)):
                return cause
            return self._failure(code, f"failed: {words.failure}")
        if code == SIGNALLED + signal.SIGKILL and processes.out_of_memory_kills() > self._kills_before:
            return self._failure(ExitCode.OUT_OF_MEMORY, "was killed by the kernel for want of memory")
        if code > SIGNALLED:
            return self._failure(code, f"was ended by {processes.name_of(code - SIGNALLED)}")
        return self._failure(code, f"ended with code {code}")

    def _failure(self, code: int, what: str) -> Failure:
        rank = self._heartbeat.status().rank
        rank = rank_in(os.environ) if rank is None else rank
        return Failure(rank, int(code), what, self._last_beat.step, self._last_beat.phase)

    # --------------------------------------------------------------------------------------------------- all ranks

    @property
    def _folder(self) -> Path | None:
        """Where this life's causes and reports lie; known once the ranks have met."""
        words = self._heartbeat.status()
        return Path(words.run_dir) / LOGS / words.attempt if words.run_dir and words.attempt else None

    def _failure_of_other_rank(self) -> Failure | None:
        """The cause that another rank's supervisor has written."""
        if time.monotonic() < self._looked + _FAILURE_POLL_S:
            return None
        self._looked = time.monotonic()
        return read_failure(self._folder) if self._folder else None

    def _wait_for_failure(self, within_s: float) -> Failure | None:
        deadline = time.monotonic() + within_s
        while self._folder is not None and time.monotonic() < deadline:
            if cause := read_failure(self._folder):
                return cause
            time.sleep(_POLL_S / 5)
        return None

    def _publish(self, cause: Failure) -> Failure:
        """Write the cause, or take the one that is there already."""
        if self._folder is None:
            return cause
        try:
            return write_failure(self._folder, cause)
        except OSError as error:
            _print(f"the cause could not be written: {error}")
            return cause

    def _wait_for_reports(self, cause: Failure) -> None:
        """Who waits for a rank that hung shows where, while it still hangs: asking it for its stack can wake it."""
        words = self._heartbeat.status()
        if cause.code == ExitCode.HUNG and cause.rank == words.rank and self._folder is not None:
            self._collect_reports(words.world_size - 1)

    def _write_report(self) -> None:
        """Write where this rank is, with the stacks of its threads."""
        process = processes.state_of(self._child) if self._status is None else f"ended with {self._code}"
        words, stacks = self._heartbeat.status(), self._dump_stacks()
        if self._folder is None or words.rank is None:
            _print(f"the rank's threads:\n{stacks}" if stacks else "the rank left no stack")
            return
        last_beat = time.time() - (time.monotonic() - self._last_beat.at)
        report = RankReport(words.rank, self._last_beat.step, self._last_beat.phase, last_beat, process)
        with contextlib.suppress(OSError):
            write_report(self._folder, report, details=f"{words.traceback}\n{stacks}")

    def _dump_stacks(self) -> str:
        """What the rank's threads were at: its last words where it crashed, else as it says when it is asked."""
        if self._status is None and self._heartbeat.status().traceback == "":
            processes.send_to_main_thread(self._child, signal.SIGUSR2)
            processes.send(self._child, signal.SIGCONT)  # a process that somebody has stopped tells nothing
            size, deadline = -1, time.monotonic() + 1.0
            while time.monotonic() < deadline and (size <= 0 or size != os.fstat(self._stacks.fileno()).st_size):
                size = os.fstat(self._stacks.fileno()).st_size
                time.sleep(0.1)
        return os.pread(self._stacks.fileno(), 1 << 20, 0).decode(errors="replace")

    def _end_rank(self) -> None:
        for number, seconds in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, _TERM_S)):
            if self._status is None:
                processes.send(self._child, number)
            deadline = time.monotonic() + seconds
            while self._status is None and time.monotonic() < deadline:
                self._has_ended(within_s=_POLL_S)

    def _print_summary(self, cause: Failure | None, code: int) -> None:
        """Say what ended the run, on the rank it came from, and what the run's time went into, on rank 0."""
        words = self._heartbeat.status()
        if cause is not None and (words.rank is None or cause.rank == words.rank):
            _print(f"{cause}: {describe(code)} (exit code {code})")
            if self._folder is not None:
                for line in summary(self._collect_reports(words.world_size), world_size=words.world_size):
                    _print(line)
                _print(f"stacks of every rank: {self._folder}")
        if words.rank == 0 and words.run_dir and words.attempt:
            with contextlib.suppress(OSError, ValueError):
                attempts.close_attempt(Path(words.run_dir), attempt=words.attempt, code=code)
                if known := attempts.read_attempts(Path(words.run_dir)):
                    print(attempts.effective_time_line(known), flush=True)

    def _collect_reports(self, count: int) -> list[RankReport]:
        """The reports of `count` ranks, as far as they come in time."""
        assert self._folder is not None
        deadline, found = time.monotonic() + _REPORTS_S, []
        while len(found) < count and time.monotonic() < deadline:
            found = read_reports(self._folder)
            time.sleep(_POLL_S / 5)
        return found


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        print(f"supervisor: {text}", file=sys.stderr, flush=True)
