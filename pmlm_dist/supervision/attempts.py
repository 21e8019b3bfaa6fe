"""How much of a run's time went into training, over all its starts (lives), and how often it should save.

    RUN_DIR/attempts.jsonl    a line at each start, each save and each end: rank 0 of every life appends to it

A step counts once: steps that were done again after a failure are time lost, as are saving, starting and waiting. The
advice is that of planning/reliability.py, with what this run has measured instead of what was assumed. Without torch.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pmlm_dist.supervision.exit_codes import ExitCode

ATTEMPTS = "attempts.jsonl"
_EXPECTED = (ExitCode.DONE, ExitCode.PREEMPTED)
LLAMA_3_HOURS = 54 * 24 * 16_384 / 419
"""Hours between failures for each GPU: 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3, 2024)."""


def best_interval(save_s: float, between_failures_s: float) -> float:
    """Seconds between two checkpoints that lose least: sqrt(2 d M) (Young, 1974; Daly, 2006, first order)."""
    return math.sqrt(2 * save_s * between_failures_s)


class AttemptLog:
    """Appends what happens in one life; does nothing on ranks other than 0. Times do not follow jumps of the clock."""

    def __init__(self, run_dir: Path, *, attempt: str, world_size: int, every: int, enabled: bool):
        self._path, self._enabled = run_dir / ATTEMPTS, enabled
        self._about = {"attempt": attempt, "world_size": world_size, "every": every}
        self._began, self._since = time.time(), time.monotonic()

    def started(self, step: int) -> None:
        """The life goes on after `step`; it began when this object was made."""
        self._append("start", began=self._began, step=step, **self._about)

    def saved(self, step: int, *, useful_s: float, stalled_s: float) -> None:
        """A checkpoint of `step` was ordered; the life has trained for `useful_s` and stood still for `stalled_s`."""
        self._append("save", step=step, useful_s=useful_s, stalled_s=stalled_s)

    def ended(self, step: int, *, useful_s: float, code: int) -> None:
        """The life ends after `step` with an exit code."""
        self._append("end", step=step, useful_s=useful_s, code=code)

    def _append(self, event: str, **facts: Any) -> None:
        if not self._enabled:
            return
        at = self._began + time.monotonic() - self._since
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"event": event, "time": at, **facts}) + "\n")


@dataclass
class AttemptRecord:
    """One start of a run, as its lines tell it."""

    name: str
    began: float
    first_step: int
    world_size: int
    every: int
    """Steps between checkpoints."""
    saves: dict[int, float] = field(default_factory=dict)
    """Seconds of training until each saved step."""
    stalled_s: float = 0.0
    last: float = 0.0
    """Time of the last line."""
    last_step: int = 0
    useful_s: float = 0.0
    """Seconds of training until the last line."""
    code: int | None = None
    """None: it was killed, or is not over."""


def read_attempts(run_dir: Path) -> list[AttemptRecord]:
    """The lives of a run, oldest first; lines that a kill has torn are passed over."""
    attempts: list[AttemptRecord] = []
    path = run_dir / ATTEMPTS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            facts = json.loads(line)
        except ValueError:
            continue
        if facts["event"] == "start":
            names = (facts["attempt"], facts["began"], facts["step"], facts["world_size"], facts["every"])
            attempts.append(AttemptRecord(*names, last=facts["time"], last_step=facts["step"]))
        elif attempts:
            _add(attempts[-1], facts)
    return attempts


def _add(attempt: AttemptRecord, facts: dict[str, Any]) -> None:
    attempt.last, attempt.last_step, attempt.useful_s = facts["time"], facts["step"], facts["useful_s"]
    if facts["event"] == "save":
        attempt.saves[facts["step"]], attempt.stalled_s = facts["useful_s"], facts["stalled_s"]
    else:
        attempt.code = facts["code"]


@dataclass(frozen=True)
class EffectiveTime:
    """Where a run's time went; seconds."""

    useful_s: float
    """Steps that count."""
    whole_s: float
    """From the first start to the last line, without the time between an end by hand and the next start."""
    starts: int
    failures: int
    """Lives that ended unexpectedly."""
    steps: int
    save_s: float
    """What a checkpoint holds the training up for."""
    world_size: int
    every: int

    @property
    def share(self) -> float:
        """Effective training time."""
        return self.useful_s / self.whole_s if self.whole_s > 0 else 0.0

    def __str__(self) -> str:
        between = self.whole_s / self.failures if self.failures else 3600 * LLAMA_3_HOURS / self.world_size
        basis = "as in this run" if self.failures else f"as is usual with {self.world_size} GPUs"
        advice = ""
        if self.steps and self.useful_s and self.save_s:
            interval = best_interval(self.save_s, between)
            steps = max(1, round(interval / (self.useful_s / self.steps)))
            advice = (
                f"; a checkpoint costs {self.save_s:.3g} s, so with an unexpected end every {_span(between)}, "
                f"{basis}, one every {_span(interval)} ({steps} steps) loses least (now every {self.every} steps)"
            )
        return (
            f"effective training time {self.share:.1%} of {_span(self.whole_s)} since the first of "
            f"{self.starts} starts ({self.failures} unexpected ends){advice}"
        )


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 10_000 else f"{seconds / 3600:.3g} h"


def close_attempt(run_dir: Path, *, attempt: str, code: int) -> None:
    """Write the end of `life` where its rank 0 could not, or took it for another one than it was."""
    attempts = read_attempts(run_dir)
    if attempts and attempts[-1].name == attempt and attempts[-1].code != code:
        facts = {"event": "end", "time": time.time(), "step": attempts[-1].last_step, "useful_s": attempts[-1].useful_s}
        with (run_dir / ATTEMPTS).open("a", encoding="utf-8") as lines:
            lines.write("\n" + json.dumps({**facts, "code": code}) + "\n")


def effective_time_line(attempts: list[AttemptRecord]) -> EffectiveTime:
    """Account for `lives` (at least one), the last of which may go on.

    Back from the last life: of each earlier one counts what it had trained when it saved the step that was gone on
    from.
    """
    last = attempts[-1]
    useful_s, first = last.useful_s, last.first_step
    for attempt in reversed(attempts[:-1]):
        if first in attempt.saves:
            useful_s, first = useful_s + attempt.saves[first], attempt.first_step
    idle_s = sum(after.began - attempt.last for attempt, after in pairwise(attempts) if attempt.code == ExitCode.DONE)
    unexpected = [attempt for attempt in attempts[:-1] if attempt.code not in _EXPECTED]
    saves = sum(len(attempt.saves) for attempt in attempts)
    return EffectiveTime(
        useful_s=useful_s,
        whole_s=last.last - attempts[0].began - idle_s,
        starts=len(attempts),
        failures=len(unexpected) + (last.code is not None and last.code not in _EXPECTED),
        steps=last.last_step - first,
        save_s=sum(attempt.stalled_s for attempt in attempts) / saves if saves else 0.0,
        world_size=last.world_size,
        every=last.every,
    )
