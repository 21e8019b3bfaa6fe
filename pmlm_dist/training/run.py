"""The pre-training run, and what every training job shares around the loop.

pretrain    open_attempt -> newest checkpoint -> resolve (all problems at once) -> PretrainJob -> train_job
train_job   engine -> weights of the checkpoint, or initial ones -> loop.py::train -> the job's conclusion
"""

from pathlib import Path
from typing import Any

from pmlm_dist.checkpoint.changes import changed_settings
from pmlm_dist.checkpoint.engine_state import EngineState
from pmlm_dist.checkpoint.files import read_state
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.resume import RunState, load_checkpoint
from pmlm_dist.config import RunConfig, raise_if_any
from pmlm_dist.console import print_safely
from pmlm_dist.metrics.run_log import RunLog
from pmlm_dist.relations import problems
from pmlm_dist.supervision.heartbeat import START_UP, Heartbeat, phase_limits
from pmlm_dist.supervision.signals import Stopped, StopSignals, stop_signals_blocked
from pmlm_dist.training.attempt import Attempt, open_attempt
from pmlm_dist.training.forecast import forecast
from pmlm_dist.training.job import TrainingJob, TrainingSession
from pmlm_dist.training.loop import train
from pmlm_dist.training.pretraining import PretrainJob, complete
from pmlm_dist.training.resolve import resolve


def pretrain(config: RunConfig, signals: StopSignals | None = None, heartbeat: Heartbeat | None = None) -> None:
    """Start or resume the pre-training run of `config` and train to its last step; every rank calls.

    Raises `ConfigError` on every rank, before anything is computed, if settings, corpus or checkpoint do not fit;
    `FolderInUse` if another attempt is active; `Stopped`, with a checkpoint saved, after a signal or a file `STOP`.
    """
    raise_if_any(problems(config))
    settings = config.train
    with open_attempt(
        config.run_dir,
        tp=config.parallel.tp,
        collective_timeout_s=settings.collective_timeout_s,
        grace_s=settings.grace_s,
        watchdog=config.watchdog,
        checkpoint_every=settings.checkpoint_every,
        signals=signals,
        heartbeat=heartbeat,
    ) as attempt:
        every = settings.keep_every
        folder, newest = attempt.open_checkpoints(
            config.run_dir, keep=settings.keep_checkpoints, is_kept=lambda step: bool(every and step % every == 0)
        )
        saved = read_state(newest) if newest else None
        run = resolve(config, attempt.topology, saved=saved)
        if attempt.topology.is_rank_zero:
            run.vocabulary.save(config.run_dir)  # with it the run folder can be used without its corpus
        if newest and saved and saved["step"] >= run.last_step:
            complete(run, step=saved["step"], checkpoint=newest)
            return
        if (line := forecast(run, first_step=saved["step"] if saved else 0)) and attempt.topology.is_rank_zero:
            print_safely(line)
        train_job(PretrainJob(run), attempt, folder=folder, newest=newest)


def train_job(job: TrainingJob[Any], attempt: Attempt, *, folder: CheckpointFolder, newest: Path | None) -> Any:
    """Train `job` to its last step, from the checkpoint `newest` or from its initial weights; every rank calls.

    Returns what the job's `finish` returns.
    """
    attempt.heartbeat.set_limits(phase_limits(job.settings.watchdog, warm=False))
    attempt.heartbeat.enter(START_UP, step=0)
    first_step = read_state(newest)["step"] if newest else 0
    attempt.record.create()
    log = RunLog(job.output, enabled=attempt.topology.is_rank_zero, first_step=first_step)
    try:
        attempt.stop.check()
        with stop_signals_blocked():  # a terminal sends Ctrl-C to compilers as well
            engine = job.build_engine()
        attempt.stop.check()
        engine_state = EngineState(engine, attempt.topology)
        session = TrainingSession(attempt, engine, engine_state, log, folder)
        state = load_checkpoint(engine_state, newest) if newest else RunState()
        if newest is None:
            job.load_initial_weights(session)
        elif changes := changed_settings(read_state(newest)["configuration"], job.configuration()):
            log.info("\n".join([f"settings that differ from those of {newest}, and their effect:", *changes]))
        log.write_configuration(job.configuration())
        job.start(session, state)
        state = train(job, session, state)
        return job.finish(session, state)
    except Stopped as stopped:
        log.info(f"stopped by {stopped}; a restart resumes from {folder.newest() or 'the first step'}")
        raise
    finally:
        log.close()
