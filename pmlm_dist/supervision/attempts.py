"""The record of a run's attempts: effective training time, and the best interval between checkpoints.

    RUN_DIR/attempts.jsonl    a line at each start, save, signal to stop and end, appended by rank 0 of every attempt

A step counts once: steps repeated after a failure are lost time, as are saving, starting and waiting. The advice uses
the formula of planning/reliability.py with the times measured in this run. Without torch.
"""

import contextlib
import json
import math
import signal
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pmlm_dist.supervision.exit_codes import SIGNALLED, STOPS, ExitCode

ATTEMPTS = "attempts.jsonl"
_EXPECTED = (*STOPS, SIGNALLED + signal.SIGTERM, SIGNALLED + signal.SIGUSR1)
"""Exit codes of attempts that did not fail: complete, or stopped by one signal or two."""
_BY_HAND = (ExitCode.DONE, ExitCode.INTERRUPTED)
_MIN_FAILURES, _MIN_TOTAL_S = 3, 3600.0
"""From these on the time between failures is worth an advice."""
LLAMA_3_HOURS = 54 * 24 * 16_384 / 419
"""Hours between failures for each GPU: 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3, 2024)."""


def best_interval(save_s: float, between_failures_s: float) -> float:
    """Return the seconds between checkpoints that lose least: sqrt(2 d M) (Young, 1974; Daly, 2006, first order)."""
    return math.sqrt(2 * save_s * between_failures_s)


class AttemptLog:
    """Appends the events of one attempt to attempts.jsonl; without effect unless `enabled` (rank 0)."""

    def __init__(self, run_dir: Path, *, attempt: str, world_size: int, every: int, enabled: bool):
        self._path, self._enabled = run_dir / ATTEMPTS, enabled
        self._attempt = {"attempt": attempt, "world_size": world_size, "checkpoint_every": every}
        self._start_time, self._start_clock = time.time(), time.monotonic()

    def create(self) -> None:
        """Create the file, by which the folder is recognized as that of a run, before any other."""
        if self._enabled:
            self._path.touch()

    def started(self, step: int) -> None:
        """Record the start of the attempt, which resumes after `step`; its time is that of the construction."""
        self._append("start", start_time=self._start_time, step=step, **self._attempt)

    def stopping(self) -> None:
        """Record a signal to stop: an attempt that its launcher kills a moment later has not failed."""
        with contextlib.suppress(OSError):
            self._append("stop")

    def saved(self, step: int, *, useful_s: float, stalled_s: float) -> None:
        """Record a save of `step`, with the seconds of training and of waiting for saves in this attempt so far."""
        self._append("save", step=step, useful_s=useful_s, stalled_s=stalled_s)

    def ended(self, step: int, *, useful_s: float, code: int) -> None:
        """Record the end of the attempt after `step`, with its exit code."""
        self._append("end", step=step, useful_s=useful_s, code=code)

    def _append(self, event: str, **facts: Any) -> None:
        if not self._enabled:
            return
        now = self._start_time + time.monotonic() - self._start_clock  # not affected by a change of the system's clock
        # A full disk does not end training; the next checkpoint reports it.
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"event": event, "time": now, **facts}) + "\n")


@dataclass
class AttemptRecord:
    """One attempt, from its lines in attempts.jsonl."""

    name: str
    start_time: float
    first_step: int
    world_size: int
    checkpoint_every: int
    """Steps between checkpoints."""
    saves: dict[int, float] = field(default_factory=dict)
    """Seconds of training until each saved step."""
    stalled_s: float = 0.0
    last_time: float = 0.0
    """Time of the last line."""
    last_step: int = 0
    useful_s: float = 0.0
    """Seconds of training until the last line."""
    code: int | None = None
    """None for an attempt that is running or was killed."""


def read_attempts(run_dir: Path) -> list[AttemptRecord]:
    """Return the attempts of a run, oldest first. Lines cut by a kill are skipped."""
    attempts: list[AttemptRecord] = []
    path = run_dir / ATTEMPTS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            facts = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if facts["event"] == "start":
            names = ("attempt", "start_time", "step", "world_size", "checkpoint_every")
            record = AttemptRecord(*(facts[name] for name in names), last_time=facts["time"], last_step=facts["step"])
            attempts.append(record)
        elif attempts and facts["event"] == "stop":
            attempts[-1].code = int(ExitCode.PREEMPTED)
        elif attempts:
            _add(attempts[-1], facts)
    return attempts


def _add(attempt: AttemptRecord, facts: dict[str, Any]) -> None:
    attempt.last_time, attempt.last_step, attempt.useful_s = facts["time"], facts["step"], facts["useful_s"]
    if facts["event"] == "save":
        attempt.saves[facts["step"]], attempt.stalled_s = facts["useful_s"], facts["stalled_s"]
    else:
        attempt.code = facts["code"]


@dataclass(frozen=True)
class EffectiveTime:
    """Effective training time of a run and what it depends on."""

    useful_s: float
    """Seconds of training that the newest state is the result of."""
    total_s: float
    """Seconds from the first start to the last line, without the time between a stop by hand and the next start."""
    attempts: int
    failures: int
    """Attempts that ended unexpectedly."""
    steps: int
    save_s: float
    """Seconds that a checkpoint stalls the training."""
    checkpoint_every: int

    @property
    def fraction(self) -> float:
        """Effective training time as a fraction of the total."""
        return self.useful_s / self.total_s if self.total_s > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"effective training time: {self.fraction:.1%} of {_span(self.total_s)} in "
            f"{_count(self.attempts, 'attempt')} ({_count(self.failures, 'failure')}){self._advice()}"
        )

    def _advice(self) -> str:
        is_measured = self.failures >= _MIN_FAILURES and self.total_s >= _MIN_TOTAL_S
        if not (is_measured and self.steps and self.useful_s and self.save_s):
            return ""
        between = self.total_s / self.failures
        interval = best_interval(self.save_s, between)
        steps = max(1, round(interval / (self.useful_s / self.steps)))
        return (
            f"; a checkpoint costs {self.save_s:.3g} s, the time between failures is {_span(between)}: "
            f"one every {_span(interval)} ({steps} steps) loses least (now every {self.checkpoint_every} steps)"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 10_000 else f"{seconds / 3600:.3g} h"


def close_attempt(run_dir: Path, *, attempt: str, code: int) -> None:
    """Record the exit code of `attempt` if its rank 0 recorded none, or another one."""
    attempts = read_attempts(run_dir)
    if attempts and attempts[-1].name == attempt and attempts[-1].code != code:
        last = attempts[-1]
        facts = {"event": "end", "time": time.time(), "step": last.last_step, "useful_s": last.useful_s, "code": code}
        with (run_dir / ATTEMPTS).open("a", encoding="utf-8") as lines:
            lines.write("\n" + json.dumps(facts) + "\n")  # a new line first: the last one may be cut


def effective_time(attempts: list[AttemptRecord]) -> EffectiveTime:
    """Return the effective training time of at least one attempt; the last may be running.

    Backwards from the last attempt: of an earlier one counts the training until the save of the step that the later
    one resumed from.
    """
    last = attempts[-1]
    useful_s, first_step = last.useful_s, last.first_step
    for attempt in reversed(attempts[:-1]):
        if first_step in attempt.saves:
            useful_s, first_step = useful_s + attempt.saves[first_step], attempt.first_step
    idle_s = sum(after.start_time - before.last_time for before, after in pairwise(attempts) if before.code in _BY_HAND)
    failed = [attempt for attempt in attempts[:-1] if attempt.code not in _EXPECTED]
    saves = sum(len(attempt.saves) for attempt in attempts)
    return EffectiveTime(
        useful_s=useful_s,
        total_s=last.last_time - attempts[0].start_time - idle_s,
        attempts=len(attempts),
        failures=len(failed) + (last.code is not None and last.code not in _EXPECTED),
        steps=last.last_step - first_step,
        save_s=sum(attempt.stalled_s for attempt in attempts) / saves if saves else 0.0,
        checkpoint_every=last.checkpoint_every,
    )
