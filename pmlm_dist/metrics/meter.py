"""Sums and times between two log lines.

    Stopwatch   seconds in each phase of a step; each phase starts with a heartbeat
    Meter       steps -> an `Interval` whenever a step is logged

Evaluations and checkpoints lie outside of steps and do not count as training time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from pmlm_dist.supervision.heartbeat import DATA, STEP, Heartbeat

PHASES = ("data", "forward", "backward", "step")


@dataclass
class Stopwatch:
    """Seconds spent in each phase of the steps since the last reset.

    An accelerator only queues work: a phase's time is that of queueing unless `exact` waits for the device.
    """

    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    exact: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block as phase `name`."""
        self.heartbeat.enter(DATA if name == "data" else STEP)
        start = time.perf_counter()
        yield
        if self.exact and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - start

    def reset(self, *, exact: bool) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.exact = exact


@dataclass(frozen=True)
class StepResult:
    """What one step gave on this rank."""

    counts: torch.Tensor
    """The job's sums over the step's micro-batches (`LossSums.counts` in pre-training); zero if it was skipped."""
    gradient_norm: float | None
    """2-norm of the whole gradient; None if the step was skipped."""
    skipped: bool = False
    """The gradient was not finite, and no weight was changed."""
    causes: tuple[str, ...] = ()
    """Why it was not finite, where that is worth a line."""


@dataclass(frozen=True)
class Interval:
    """The steps since the last log line, on this rank."""

    steps: int
    seconds: float
    counts: torch.Tensor
    phases: dict[str, float]
    """Seconds in each phase of the last step."""
    last_step_s: float

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps


class Meter:
    """Adds up steps between two log lines; `is_logged(step)` says where they are."""

    def __init__(self, stopwatch: Stopwatch, *, is_logged: Callable[[int], bool]):
        self._stopwatch, self._is_logged = stopwatch, is_logged
        self.total_s = 0.0
        """Seconds of all steps so far."""
        self._steps, self._seconds, self._counts = 0, 0.0, torch.zeros(())

    def start_step(self, step: int) -> None:
        """Start to time `step`. Phases are timed exactly in a logged step only: the others run without device syncs."""
        self._stopwatch.heartbeat.enter(DATA, step=step)
        if self._is_logged(step):
            self._stopwatch.reset(exact=True)
        self._start = time.perf_counter()

    def end_step(self, step: int, result: StepResult) -> Interval | None:
        """Count `step`; returns the interval that it ends, None if it is not logged."""
        step_s = time.perf_counter() - self._start
        self._seconds += step_s
        self.total_s += step_s
        self._counts = self._counts + result.counts
        self._steps += 1
        if not self._is_logged(step):
            return None
        interval = Interval(self._steps, self._seconds, self._counts, dict(self._stopwatch.seconds), step_s)
        self._steps, self._seconds, self._counts = 0, 0.0, torch.zeros(())
        self._stopwatch.reset(exact=False)
        return interval
