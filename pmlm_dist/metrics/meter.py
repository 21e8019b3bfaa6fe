"""Adding up a run between two log lines: losses, rates, time by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from pmlm_dist.engine.optimizer import learning_rate
from pmlm_dist.metrics.flops import peak_tflops, training_flops
from pmlm_dist.metrics.run_log import Progress, RunLog
from pmlm_dist.metrics.stragglers import RankTimes, Stragglers
from pmlm_dist.objectives import NUM_COUNTS, OBJECTIVES, LossMeans
from pmlm_dist.supervision.heartbeat import DATA, STEP, Heartbeat
from pmlm_dist.training.resolve import ResolvedRun

PHASES = ("data", "forward", "backward", "step")


@dataclass
class Stopwatch:
    """Seconds spent in each phase of the steps since the last reading.

    On an accelerator work is queued and a phase's time is that of queueing it, unless `exact` waits for the device.
    Each phase begins with a sign of life on `heartbeat`.
    """

    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    exact: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside as `name`."""
        self.heartbeat.enter(DATA if name == "data" else STEP)
        start = time.perf_counter()
        yield
        if self.exact and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - start

    def reset(self) -> None:
        """Start anew."""
        self.seconds = dict.fromkeys(PHASES, 0.0)


@dataclass(frozen=True)
class StepResult:
    """This rank's sums of one step (see `LossSums.counts`) and the norm of the whole gradient.

    A step whose gradient was not finite was left out: it changed nothing, its sums are zero. `causes` tells why, where
    that is worth a line.
    """

    counts: torch.Tensor
    gradient_norm: float | None
    skipped: bool = False
    causes: tuple[str, ...] = ()


class Meter:
    """Turns steps into log lines, every `train.log_every` of them. Validation and checkpoints do not count as time."""

    def __init__(self, run: ResolvedRun, log: RunLog, heartbeat: Heartbeat):
        self.stopwatch = Stopwatch(run.topology.device, heartbeat)
        self.total_s = 0.0
        """Seconds of all steps so far."""
        self._stragglers = Stragglers(ratio=run.config.watchdog.slow_ratio)
        self._run, self._log = run, log
        self._peak = peak_tflops(run.config.train.peak_tflops, run.topology.device)
        self._flops = training_flops(
            run.config.model,
            context=run.manifest.sequence_length,
            predictions=run.num_predictions,
            vocab_rows=run.vocabulary.padded_size(),
            objectives=OBJECTIVES[run.config.objective.kind],
        )
        self._reset()

    def start_step(self, step: int) -> None:
        """Begin to time `step`; phases are timed exactly in the step that is logged, the others run unhindered."""
        self.stopwatch.heartbeat.enter(DATA, step=step)
        if self._run.is_logged(step):
            self.stopwatch.reset()
            self.stopwatch.exact = True
        self._step_start = time.perf_counter()

    def end_step(
        self, step: int, result: StepResult, *, loss_scale: float | None, skipped_steps: int, own_data_s: float = 0.0
    ) -> None:
        """Count `step`, for which this rank waited `own_data_s` for its own data; write a line when it is due."""
        step_s = time.perf_counter() - self._step_start
        self._seconds += step_s
        self.total_s += step_s
        self._counts += result.counts
        self._steps += 1
        if not self._run.is_logged(step):
            return
        progress = self._progress(step, result, loss_scale=loss_scale, skipped_steps=skipped_steps)
        self._log.progress(progress, self._run.topology.device)
        self._compare_ranks(step, own_data_s=own_data_s, step_s=step_s)
        self._reset()

    def _compare_ranks(self, step: int, *, own_data_s: float, step_s: float) -> None:
        """What each rank measured in the step that is logged; every rank must call."""
        seconds = self.stopwatch.seconds
        compute_s = seconds["forward"] + seconds["backward"]
        own = RankTimes(data_s=own_data_s, compute_s=compute_s, forward_s=seconds["forward"], step_s=step_s)
        of_rank = self._run.topology.all_gather_object(own)
        self._log.ranks(of_rank, step=step)
        for sentence in self._stragglers.check(of_rank):
            self._log.info(f"warning: step {step}: {sentence}")

    def _progress(self, step: int, result: StepResult, *, loss_scale: float | None, skipped_steps: int) -> Progress:
        run, train = self._run, self._run.config.train
        samples_per_s = self._steps * run.engine.global_batch / self._seconds
        flops_per_s = samples_per_s * self._flops / run.topology.world_size
        return Progress(
            step=step,
            steps=train.steps,
            losses=LossMeans.from_counts(run.topology.all_reduce_dp(self._counts), run.config.objective),
            learning_rate=learning_rate(step, steps=train.steps, optim=run.config.optim),
            gradient_norm=None if result.gradient_norm is None else float(result.gradient_norm),
            loss_scale=loss_scale,
            skipped_steps=skipped_steps,
            tokens_per_s=samples_per_s * run.manifest.sequence_length,
            slots_per_s=samples_per_s * run.num_slots,
            mfu=flops_per_s / (self._peak * 1e12) if self._peak else None,
            seconds=dict(self.stopwatch.seconds),
            eta_s=(train.steps - step) * self._seconds / self._steps,
        )

    def _reset(self) -> None:
        self.stopwatch.reset()
        self.stopwatch.exact = False
        self._counts = torch.zeros(NUM_COUNTS, dtype=torch.float64, device=self._run.topology.device)
        self._seconds, self._steps = 0.0, 0
