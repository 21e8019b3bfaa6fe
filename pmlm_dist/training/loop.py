"""The training loop, of pre-training and fine-tuning alike.

    evaluate? -> save? -> data -> train_step -> log   until the job's last step, or until ranks agree to stop

Evaluation comes before the next step, so that a run stopped while it evaluates evaluates again when it resumes.
"""

import sys
from functools import partial
from typing import Any

from pmlm_dist.checkpoint.async_save import AsyncCheckpointer
from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.engine.deepspeed_engine import module_of
from pmlm_dist.metrics.meter import Meter, Stopwatch
from pmlm_dist.supervision.exit_codes import ExitCode, exit_code_of
from pmlm_dist.supervision.heartbeat import SAVE, VALIDATION, phase_limits
from pmlm_dist.supervision.signals import Stopped
from pmlm_dist.training.guards import SkippedSteps, check_replicas
from pmlm_dist.training.job import TrainingJob, TrainingSession
from pmlm_dist.training.step import train_step


def train(job: TrainingJob[Any], session: TrainingSession, state: RunState) -> RunState:
    """Train from `state` to the job's last step and return the state reached; every rank calls.

    The last state is saved. Raises `Stopped` on all ranks alike, with the state saved unless its weights are not
    finite; FloatingPointError after too many skipped steps; `LastCheckpointFailed` if it cannot be written.
    """
    loop = _Loop(job, session, state)
    attempt, checkpointer = session.attempt, loop.checkpointer
    attempt.record.started(state.step)
    check_replicas(module_of(session.engine), job.topology)
    try:
        while not loop.between_steps():
            loop.step()
        checkpointer.close()
    except Stopped:
        attempt.heartbeat.enter(SAVE)
        loop.save_before_exit()
        checkpointer.wait()  # if it cannot be written in time, the checkpoint before remains the newest
        raise
    finally:
        attempt.record.ended(loop.state.step, useful_s=loop.meter.total_s, code=_current_exit_code())
        checkpointer.abandon()
        job.close()
    return loop.state


class _Loop:
    """A job between its first and its last step."""

    def __init__(self, job: TrainingJob[Any], session: TrainingSession, state: RunState):
        self.job, self.session, self.state = job, session, state
        self.checkpointer = _checkpointer(job, session)
        self.stopwatch = Stopwatch(job.topology.device, session.attempt.heartbeat)
        self.meter = Meter(self.stopwatch, is_logged=job.settings.is_logged)
        self.skipped = SkippedSteps(limit=job.settings.max_skipped_steps)
        self.first = self.saved = state
        self.is_save_due = False
        self.is_sound = True
        """False after a skipped step: it may come from weights that are not finite, which must not be saved."""

    def between_steps(self) -> bool:
        """Evaluate and save where due; returns True after the last step."""
        job, heartbeat = self.job, self.session.attempt.heartbeat
        if job.is_evaluation_due(self.state):
            heartbeat.enter(VALIDATION)
            job.evaluate(self.session, self.state)
        heartbeat.enter(SAVE)
        self.checkpointer.log_finished()
        is_last = self.state.step >= job.settings.last_step
        self.is_save_due = self.is_save_due or job.is_save_due(self.state)
        if self.is_save_due and (self.is_sound or is_last):
            self._save()
        return is_last

    def step(self) -> None:
        job, session, settings = self.job, self.session, self.job.settings
        number = self.state.step + 1
        is_first = number == self.first.step + 1
        guarded = settings.guard_every is not None and (is_first or number % settings.guard_every == 0)
        self.meter.start_step(number)
        with self.stopwatch.phase("data"):
            micro_batches = job.next_micro_batches(session, self.state)
        if guarded:
            job.check_micro_batches(micro_batches)
        begin_next = (lambda: None) if number == settings.last_step else partial(job.begin_next_step, session)
        result = train_step(
            job, session.engine, micro_batches, self.state, self.stopwatch, before_last_backward=begin_next
        )
        self.state, self.is_sound = job.advance(self.state), not result.skipped
        for cause in result.causes:
            session.log.info(f"step {number} was skipped, its gradient was not finite: {cause}")
        self.skipped.count(skipped=result.skipped, last_good=session.folder.newest() if result.skipped else None)
        if interval := self.meter.end_step(number, result):
            job.log_step(session, self.state, result, interval, skipped_steps=self.skipped.total)
        if guarded:
            check_replicas(module_of(session.engine), job.topology)
        if is_first:  # compilation and first touches are over: phases get their own limits
            session.attempt.heartbeat.set_limits(phase_limits(settings.watchdog, warm=True))

    def save_before_exit(self) -> None:
        """Save a state that has not been saved yet, unless its weights may not be finite."""
        if self.is_sound and self.state != self.saved:
            self._save()

    def _save(self) -> None:
        self.session.attempt.heartbeat.enter(SAVE)
        self.checkpointer.save(self.state, **self.job.prepare_save(self.checkpointer))
        self.session.attempt.record.saved(
            self.state.step, useful_s=self.meter.total_s, stalled_s=self.checkpointer.stalled_s
        )
        self.saved, self.is_save_due = self.state, False


def _checkpointer(job: TrainingJob[Any], session: TrainingSession) -> AsyncCheckpointer:
    attempt = session.attempt
    return AsyncCheckpointer(
        session.engine_state,
        session.folder,
        session.log,
        metadata={"identity": job.identity(), "configuration": job.configuration()},
        timeout_s=job.settings.save_timeout_s,
        deadline=attempt.stop.deadline,
        on_wait=attempt.heartbeat.beat,
        attempt=attempt.name,
    )


def _current_exit_code() -> int:
    """Return the exit code of the exception being handled; called in a `finally` block."""
    error = sys.exc_info()[1]
    return int(ExitCode.DONE if error is None else exit_code_of(error))
