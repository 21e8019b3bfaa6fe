"""The supervisor: a small process outside each rank that detects hangs and failures, reports them and ends the rank.

    launcher (srun, deepspeed, torchrun, mpirun)
       |-- supervisor of rank 0 --fork--> rank 0 (torch) -- loader processes
       `-- supervisor of rank 1 --fork--> rank 1 (torch) -- loader processes
                 ^ heartbeat (shared memory): phase, step       | no beat within the limit of its phase,
                 |                                              | an error, a signal, no memory
                 `-- RUN_DIR/logs/ATTEMPT/ <--------------------'
                       the first failure, the state of every rank (failure_reports.py)

`train.py` forks by itself, so every launcher starts supervised ranks; `PMLM_SUPERVISOR=off` skips it for a debugger.
Supervisors do not communicate: each records the failure of its own rank, and looks for the failure of others. Then it
writes its report, ends its rank (TERM, then KILL, with all descendants) and exits with the code of the first failure
(`exit_codes.py`), the same on every rank. It dies with its launcher, and its rank with it. Imports neither torch nor
DeepSpeed: a watchdog thread inside the rank would stall with the interpreter's lock.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, NoReturn

from pmlm_dist.console import print_safely
from pmlm_dist.launch_environment import rank_in
from pmlm_dist.supervision import attempts, processes
from pmlm_dist.supervision.exit_codes import COLLECTIVE_ENDS, SIGNALLED, ExitCode, describe, run
from pmlm_dist.supervision.failure_reports import (
    LOGS,
    Failure,
    FailureWatch,
    RankReport,
    count_reports,
    read_reports,
    summary,
    write_failure,
    write_report,
)
from pmlm_dist.supervision.heartbeat import DATA, START_UP, STEP, Beat, Heartbeat
from pmlm_dist.supervision.signals import STOP_SIGNALS

SUPERVISOR_VARIABLE = "PMLM_SUPERVISOR"

_HANDLED = (*STOP_SIGNALS, signal.SIGCHLD)


@dataclass(frozen=True)
class SupervisorTimes:
    """Intervals and time limits of a supervisor, in seconds."""

    poll_s: float = 0.25
    failure_poll_s: float = 1.0
    """Interval of reads of `failure.json` by a node: it is on a shared file system."""
    root_cause_s: float = 3.0
    """Longest wait for another rank's failure when this rank's error is a failed communication."""
    reports_s: float = 3.0
    """Longest wait for the reports of other ranks."""
    stack_s: float = 1.0
    """Longest wait for the stacks of the rank's threads."""
    term_s: float = 5.0
    """Longest wait after SIGTERM, and again after SIGKILL."""
    progress_s: float = 30.0
    """Interval of the lines about a step, or another phase, that takes longer."""
    orphans_s: float = 2.0
    """Time for the rank's descendants to end by themselves."""


def run_supervised(
    main: Callable[[Heartbeat], int | None], *, program: str = "train.py", times: SupervisorTimes = SupervisorTimes()
) -> int:
    """Run `main` as the rank in a forked process and return its exit code; call it once, before any thread starts.

    Returns in both processes. Each must end with `exit_now`: a rank's destructors can abort a finished run.
    """
    heartbeat = Heartbeat()
    if os.environ.get(SUPERVISOR_VARIABLE) == "off":
        return run(partial(main, heartbeat), program=program, on_failure=heartbeat.fail)
    stacks = tempfile.TemporaryFile()  # noqa: SIM115  # open until the rank has ended
    oom_kills_before = processes.oom_kills()
    _flush()
    processes.adopt_orphans()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    parent, child = os.getpid(), os.fork()
    if child:
        return Supervisor(child, heartbeat, stacks, oom_kills_before=oom_kills_before, times=times).watch()
    processes.die_with_parent()
    if os.getppid() != parent:  # the supervisor died between the fork and `die_with_parent`
        os._exit(SIGNALLED + signal.SIGKILL)
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR2, stacks)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return run(partial(main, heartbeat), program=program, on_failure=heartbeat.fail)


def exit_now(code: int) -> NoReturn:
    """End this process with the code of `run_supervised`, without destructors and even if the output is closed."""
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # on a full disk the interpreter would retry at exit, and raise
            stream.flush()


class Supervisor:
    """Watches one rank, the process `child`, until it has ended."""

    def __init__(
        self, child: int, heartbeat: Heartbeat, stacks: IO[bytes], *, oom_kills_before: int, times: SupervisorTimes
    ):
        self._child, self._heartbeat, self._stacks = child, heartbeat, stacks
        self._oom_kills_before, self._times = oom_kills_before, times
        self._wait_status: int | None = None
        self._last_beat = Beat(0, 0, "start-up", float("inf"), time.monotonic())
        self._silence_s = 0.0
        self._last_read = time.monotonic()
        self._failure_watch: FailureWatch | None = None
        self._place, self._place_time, self._progress_lines = (0, START_UP), time.monotonic(), 0

    def watch(self) -> int:
        failure = None
        while not self._has_ended(within_s=self._times.poll_s) and failure is None:
            self._read_heartbeat()
            failure = self._hang() or self._failure_of_other_rank()
        if failure is None:
            failure = self._own_failure()
        if failure is not None:
            failure = self._record(failure)
            status = self._heartbeat.status()
            if failure.code == ExitCode.HUNG and failure.rank == status.rank and self._folder is not None:
                # The others report before this one, which hung: a request for its stack can wake it up.
                self._collect_reports(status.world_size - 1)
            self._write_report()
            self._end_rank()
        code = self._code if failure is None else failure.code
        processes.end_children(grace_s=self._times.orphans_s, kill_s=self._times.term_s)
        self._print_summary(failure, code)
        if self._failure_watch is not None:
            self._failure_watch.close()
        return code

    # ----------------------------------------------------------------------------------------------------- the rank

    def _has_ended(self, *, within_s: float) -> bool:
        """Wait for a signal and forward it; return True once the rank's process has ended."""
        if self._wait_status is None:
            received = signal.sigtimedwait(_HANDLED, within_s)
            if received is not None and received.si_signo in STOP_SIGNALS:
                processes.send_signal(self._child, signal.Signals(received.si_signo))
            self._reap()
        return self._wait_status is not None

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._child:
                    self._wait_status = ended[1]

    @property
    def _code(self) -> int:
        assert self._wait_status is not None
        code = os.waitstatus_to_exitcode(self._wait_status)
        return code if code >= 0 else SIGNALLED - code

    def _read_heartbeat(self) -> None:
        """Add the time since the last read to the silence, unless there is a new beat."""
        beat = self._heartbeat.read()
        if beat is not None and beat.count != self._last_beat.count:
            self._last_beat, self._silence_s = beat, 0.0
        else:
            # At most two intervals: after a suspend of the machine, or of this process, the rank has not hung.
            self._silence_s += min(time.monotonic() - self._last_read, 2 * self._times.poll_s)
        self._last_read = time.monotonic()
        self._print_progress()

    def _print_progress(self) -> None:
        """Print a line on rank 0 every `progress_s` of a step, or of another phase, that takes longer than that."""
        beat, now = self._last_beat, time.monotonic()
        place = (beat.step, STEP if beat.phase == DATA else beat.phase)
        if place != self._place:
            self._place, self._place_time, self._progress_lines = place, now, 0
        elapsed_s = now - self._place_time
        if elapsed_s < (self._progress_lines + 1) * self._times.progress_s or rank_in(os.environ):
            return
        self._progress_lines = int(elapsed_s / self._times.progress_s)
        part = f", micro-batch {beat.part} of {beat.parts}" if beat.parts else ""
        at = f"step {beat.step} ({beat.phase}{part})" if beat.step else beat.phase
        print_safely(f"{at}: {elapsed_s:.0f} s so far")

    def _hang(self) -> Failure | None:
        if self._silence_s <= self._last_beat.limit_s:
            return None
        return self._failure(ExitCode.HUNG, f"made no progress for {self._last_beat.limit_s:g} s")

    def _own_failure(self) -> Failure | None:
        """Return the failure of the rank, which has ended; None for a code that all ranks end with."""
        status, code = self._heartbeat.status(), self._code
        if code in COLLECTIVE_ENDS:
            return None
        self._last_beat = self._heartbeat.read() or self._last_beat
        if status.failure is not None:
            # "Connection closed by peer" follows from the failure of that peer, whose supervisor may be slower.
            if status.is_peer_failure and (root_cause := self._wait_for_failure(self._times.root_cause_s)):
                return root_cause
            return self._failure(code, f"failed: {status.failure}")
        if code == SIGNALLED + signal.SIGKILL and processes.oom_kills() > self._oom_kills_before:
            return self._failure(ExitCode.OUT_OF_MEMORY, "was killed by the kernel: out of memory")
        if code > SIGNALLED:
            return self._failure(code, f"was ended by {processes.signal_name(code - SIGNALLED)}")
        return self._failure(code, f"ended with code {code}")

    def _failure(self, code: int, reason: str) -> Failure:
        rank = self._heartbeat.status().rank
        rank = rank_in(os.environ) if rank is None else rank
        return Failure(rank, int(code), reason, self._last_beat.step, self._last_beat.phase)

    # --------------------------------------------------------------------------------------------------- all ranks

    @property
    def _folder(self) -> Path | None:
        """Log folder of this attempt; None until the process group is up."""
        status = self._heartbeat.status()
        return Path(status.run_dir) / LOGS / status.attempt if status.run_dir and status.attempt else None

    def _failure_of_other_rank(self) -> Failure | None:
        if self._failure_watch is None and self._folder is not None:
            self._failure_watch = FailureWatch(self._folder, interval_s=self._times.failure_poll_s)
        return self._failure_watch.read() if self._failure_watch else None

    def _wait_for_failure(self, within_s: float) -> Failure | None:
        deadline = time.monotonic() + within_s
        while self._folder is not None and time.monotonic() < deadline:
            if failure := self._failure_of_other_rank():
                return failure
            time.sleep(self._times.poll_s / 5)
        return None

    def _record(self, failure: Failure) -> Failure:
        """Write the failure, or return the one that is recorded already."""
        try:
            return write_failure(self._folder, failure) if self._folder is not None else failure
        except OSError as error:
            _print(f"failure.json was not written: {error}")
            return failure

    def _write_report(self) -> None:
        process = processes.process_state(self._child) if self._wait_status is None else f"ended with {self._code}"
        status, stacks = self._heartbeat.status(), self._dump_stacks()
        if self._folder is None or status.rank is None:
            _print(f"threads of the rank:\n{stacks}" if stacks else "no stack of the rank")
            return
        last_beat = time.time() - (time.monotonic() - self._last_beat.time)
        report = RankReport(status.rank, self._last_beat.step, self._last_beat.phase, last_beat, process)
        with contextlib.suppress(OSError):
            write_report(self._folder, report, details=f"{status.traceback}\n{stacks}")

    def _dump_stacks(self) -> str:
        """Return the stacks of the rank's threads, written by `faulthandler` at a crash or on SIGUSR2."""
        if self._wait_status is None and self._heartbeat.status().traceback == "":
            processes.send_to_main_thread(self._child, signal.SIGUSR2)
            processes.send_signal(self._child, signal.SIGCONT)  # a stopped process handles no signal
            size, deadline = -1, time.monotonic() + self._times.stack_s
            # The dump is complete when the file has stopped growing.
            while time.monotonic() < deadline and (size <= 0 or size != os.fstat(self._stacks.fileno()).st_size):
                size = os.fstat(self._stacks.fileno()).st_size
                time.sleep(self._times.stack_s / 10)
        return os.pread(self._stacks.fileno(), 1 << 20, 0).decode(errors="replace")

    def _end_rank(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._wait_status is None:
                processes.send_signal(self._child, number)
            deadline = time.monotonic() + self._times.term_s
            while self._wait_status is None and time.monotonic() < deadline:
                self._has_ended(within_s=self._times.poll_s)

    def _print_summary(self, failure: Failure | None, code: int) -> None:
        """Print the failure on the rank it happened on, and the run's effective training time on rank 0."""
        status = self._heartbeat.status()
        if failure is not None and (status.rank is None or failure.rank == status.rank):
            _print(f"{failure}: {describe(code)} (exit code {code})")
            if self._folder is not None:
                for line in summary(self._collect_reports(status.world_size), world_size=status.world_size):
                    _print(line)
                _print(f"stacks of every rank: {self._folder}")
        if status.rank == 0 and status.run_dir and status.attempt:
            with contextlib.suppress(OSError, ValueError):
                attempts.close_attempt(Path(status.run_dir), attempt=status.attempt, code=code)
                if records := attempts.read_attempts(Path(status.run_dir)):
                    print_safely(str(attempts.effective_time(records)))

    def _collect_reports(self, count: int) -> list[RankReport]:
        """Return the reports of `count` ranks, or those that are there when the time is over."""
        assert self._folder is not None
        deadline = time.monotonic() + self._times.reports_s
        while count_reports(self._folder) < count and time.monotonic() < deadline:
            time.sleep(self._times.poll_s / 5)
        return read_reports(self._folder)


def _print(text: str) -> None:
    print_safely(f"supervisor: {text}", to_stderr=True)
