"""The pre-training run: `pretrain` is the table of contents, `train_step` one optimizer step.

    training_batches -> [micro-batches of a step] -> engine(...) -> losses -> engine.backward -> engine.step
                                                        every N steps: log, validate, checkpoint

DeepSpeed divides gradients by the accumulation count g and averages over D data-parallel ranks; the gradient wanted is
that of sum(nll) / N with N the predicted tokens of the whole step, so the loss handed over is sum(nll) * g * D / N.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from pmlm_dist.checkpoint.async_save import AsyncCheckpointer
from pmlm_dist.checkpoint.engine_state import EngineState
from pmlm_dist.checkpoint.files import read_state
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.initial_weights import load_initial_weights
from pmlm_dist.checkpoint.resume import RunState, find_checkpoint, load_checkpoint
from pmlm_dist.config import RunConfig
from pmlm_dist.data.batch import Batch
from pmlm_dist.data.loader import validation_batches
from pmlm_dist.engine.deepspeed_engine import has_fast_bf16, initialize_engine, module_of, optimizer_step
from pmlm_dist.engine.optimizer import learning_rate, set_learning_rate
from pmlm_dist.metrics.meter import Meter, StepResult, Stopwatch
from pmlm_dist.metrics.run_log import RunLog
from pmlm_dist.model.transformer import build_model
from pmlm_dist.objectives import NUM_COUNTS, loss_scales, target_weights
from pmlm_dist.parallel import groups, seeding
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.parallel.layers import count_parameters
from pmlm_dist.supervision.attempts import AttemptLog
from pmlm_dist.supervision.exit_codes import ExitCode, exit_code_of
from pmlm_dist.supervision.heartbeat import SAVE, VALIDATION, Heartbeat, phase_limits
from pmlm_dist.supervision.signals import STOP_FILE, StopAgreement, Stopped, StopSignals
from pmlm_dist.training.batches import TrainBatches, synchronized_batches
from pmlm_dist.training.guards import SkippedSteps, check_batches, check_replicas, diagnose_nonfinite
from pmlm_dist.training.resolve import ResolvedRun, RunLease, check, resolve, run_lease
from pmlm_dist.training.validation import forward_losses, validate

_COMPLETE = "COMPLETE"


def pretrain(config: RunConfig, signals: StopSignals | None = None, heartbeat: Heartbeat | None = None) -> None:
    """Run, or go on with, the pre-training that `config` describes, to its last step; every rank calls this.

    Raises `ConfigError` before anything is computed when the settings, the corpus or a checkpoint do not fit, and
    `Stopped` on every rank, with a checkpoint written, when one of them was sent a signal or there is a file `STOP`;
    `FolderInUse` when another start of this run is at work. Signs of life go to `heartbeat`.
    """
    check(config)
    signals, heartbeat = signals or StopSignals(), heartbeat or Heartbeat()
    signals.grace_s = config.train.grace_s
    heartbeat.set_limits(phase_limits(config.watchdog, warm=False))
    topology = groups.init_process_groups(tp=config.parallel.tp, timeout_s=config.train.collective_timeout_s)
    with run_lease(config.run_dir, topology) as lease:
        heartbeat.register(
            rank=topology.rank,
            world_size=topology.world_size,
            run_dir=str(config.run_dir.absolute()),
            attempt=lease.attempt,
        )
        _pretrain(config, topology, lease, signals=signals, heartbeat=heartbeat)


def _pretrain(
    config: RunConfig, topology: Topology, lease: RunLease, *, signals: StopSignals, heartbeat: Heartbeat
) -> None:
    train = config.train
    accounts = AttemptLog(
        config.run_dir,
        attempt=lease.attempt,
        world_size=topology.world_size,
        every=train.checkpoint_every,
        enabled=topology.is_rank_zero,
    )
    folder = CheckpointFolder(
        config.run_dir / "checkpoints", keep=train.keep_checkpoints, keep_every=train.keep_every, fence=lease.check
    )
    if topology.is_rank_zero:
        folder.remove_temporary()
    newest = find_checkpoint(folder, topology)
    saved = read_state(newest) if newest else None
    run = resolve(config, topology, saved=saved)
    log = RunLog(config.run_dir, enabled=topology.is_rank_zero, first_step=saved["step"] if saved else 0)
    stop = StopAgreement(signals, file=config.run_dir / STOP_FILE, topology=topology, heartbeat=heartbeat)
    try:
        if saved and saved["step"] >= config.train.steps:
            log.info(
                f"this run is complete: {newest} holds step {saved['step']} of {config.train.steps}; nothing to do"
            )
            _record_completion(run, saved["step"])  # the process may have ended between that checkpoint and the record
            return
        if saved and saved["step"] >= run.last_step:
            log.info(
                f"{newest} holds step {saved['step']}: nothing to do before --train.stop-at {config.train.stop_at}"
            )
            return
        stop.check()
        engine = build_engine(run)
        stop.check()
        engine_state = EngineState(engine, topology)
        state = load_checkpoint(engine_state, newest) if newest else RunState()
        if newest is None and config.init is not None:
            log.info(f"weights: from {load_initial_weights(engine_state, config.init)}")
        _announce(run, engine, state, log)
        metadata = {"identity": run.identity(), "configuration": run.configuration()}
        checkpointer = AsyncCheckpointer(
            engine_state,
            folder,
            log,
            metadata=metadata,
            timeout_s=train.save_timeout_s,
            deadline=signals.deadline,
            on_wait=heartbeat.beat,
            attempt=lease.attempt,
        )
        accounts.started(state.step)
        _train(run, engine, checkpointer, state, log, stop=stop, accounts=accounts)
    except Stopped as stopped:
        newest = next(reversed(folder.steps()), None)
        log.info(f"stopped by {stopped}; started again, it goes on from {newest or 'the beginning'}")
        raise
    finally:
        log.close()


def build_engine(run: ResolvedRun) -> DeepSpeedEngine:
    """Model, optimizer and DeepSpeed engine of `run`, weights drawn from its seed."""
    seeding.seed_initialisation(run.config.train.seed)
    model = build_model(run.config.model, padded_vocab_size=run.vocabulary.padded_size())
    return initialize_engine(
        model,
        optim=run.config.optim,
        config=run.engine,
        topology=run.topology,
        keep_memory=run.config.train.keep_freed_memory,
    )


def train_step(
    run: ResolvedRun,
    engine: DeepSpeedEngine,
    batches: Iterator[Batch],
    state: RunState,
    watch: Stopwatch,
    *,
    guarded: bool = False,
) -> StepResult:
    """One optimizer step: the update number `state.step + 1` on the samples after `state.samples_consumed`.

    `guarded`: ranks first compare the batches that they read.
    """
    topology, accumulation = run.topology, run.engine.accumulation(run.topology.dp)
    with watch.phase("data"):
        micro_batches = [next(batches).to(topology.device) for _ in range(accumulation)]
        scale_K = _loss_scale(run, micro_batches)
    if guarded:
        check_batches(micro_batches, topology)
    optimizer: Any = engine.optimizer
    set_learning_rate(optimizer, learning_rate(state.step + 1, steps=run.config.train.steps, optim=run.config.optim))
    counts = torch.zeros(NUM_COUNTS, dtype=torch.float64, device=topology.device)
    for number, batch in enumerate(micro_batches):
        _seed_dropout(run, state, number)
        with watch.phase("forward"):
            sums = forward_losses(engine, batch, run.config.objective)
            counts += sums.counts
        with watch.phase("backward"):
            engine.backward((sums.nll_K * scale_K).sum())
        with watch.phase("step"):
            norm = optimizer_step(engine, run.engine, topology, is_boundary=number == accumulation - 1)
    if math.isfinite(norm):
        return StepResult(counts, norm)
    causes = _causes(run, engine, micro_batches, scale_K, state, heartbeat=watch.heartbeat)
    return StepResult(torch.zeros_like(counts), None, skipped=True, causes=tuple(causes))


def _causes(
    run: ResolvedRun,
    engine: DeepSpeedEngine,
    micro_batches: list[Batch],
    scale_K: torch.Tensor,
    state: RunState,
    *,
    heartbeat: Heartbeat,
) -> list[str]:
    """Why the step after `state` was left out. With fp16 that is how the loss scale finds its place: no causes."""
    if run.engine.precision == "fp16":
        return []
    module = module_of(engine)

    def loss_of(number: int) -> torch.Tensor:
        heartbeat.beat()
        _seed_dropout(run, state, number)
        return (forward_losses(module, micro_batches[number], run.config.objective).nll_K * scale_K).sum()

    with_gradients = run.engine.zero_stage < 3 and not run.config.model.activation_checkpointing
    return diagnose_nonfinite(module, micro_batches, loss_of, run.topology, with_gradients=with_gradients)


def _seed_dropout(run: ResolvedRun, state: RunState, number: int) -> None:
    """Before micro-batch `number` of the step after `state`."""
    micro_step = state.step * run.engine.accumulation(run.topology.dp) + number
    seeding.seed_dropout(run.config.train.seed, micro_step=micro_step, dp_rank=run.topology.dp_rank)


def _loss_scale(run: ResolvedRun, micro_batches: list[Batch]) -> torch.Tensor:
    """Factor [K] of each objective's summed loss of a micro-batch: the step's gradient is then that of the means."""
    objective, dp = run.config.objective, run.topology.dp
    targets_K = torch.stack(
        [target_weights(objective, batch.weights_BM, batch.kept_BM).sum(dim=(1, 2)) for batch in micro_batches]
    ).sum(dim=0)
    return loss_scales(objective, run.topology.all_reduce_dp(targets_K)) * len(micro_batches) * dp


def _train(
    run: ResolvedRun,
    engine: DeepSpeedEngine,
    checkpointer: AsyncCheckpointer,
    state: RunState,
    log: RunLog,
    *,
    stop: StopAgreement,
    accounts: AttemptLog,
) -> None:
    train = run.config.train
    _withdraw_completion(run)
    meter, skips, first_state = Meter(run, log, stop.heartbeat), SkippedSteps(limit=train.max_skipped_steps), state
    saved, is_due, is_sound = state, False, True
    check_replicas(module_of(engine), run.topology)
    reading = TrainBatches(run, state, log)
    try:
        while state.step < run.last_step:
            meter.start_step(state.step + 1)
            guarded = state.step == first_state.step or (state.step + 1) % train.guard_every == 0
            with meter.stopwatch.phase("data"):
                batches = reading.next_micro_batches(stop)
            result = train_step(run, engine, iter(batches), state, meter.stopwatch, guarded=guarded)
            state, is_sound = advance(state, run), not result.skipped  # broken weights are the usual reason for a skip
            is_last = state.step == run.last_step
            for cause in result.causes:
                log.info(f"step {state.step} was left out, its gradient was not finite: {cause}")
            skips.count(skipped=result.skipped, last_good=checkpointer.newest if result.skipped else None)
            meter.end_step(
                state.step,
                result,
                loss_scale=_fp16_scale(run, engine),
                skipped_steps=skips.total,
                own_data_s=stop.data_wait_s,
            )
            if run.is_logged(state.step):
                reading.log_progress(state.step)
            if guarded:
                check_replicas(module_of(engine), run.topology)
            if is_last or state.step % train.validate_every == 0:
                stop.heartbeat.enter(VALIDATION)
                _validate(run, engine, state, log, stop=stop, heed=not is_last)
            stop.heartbeat.enter(SAVE)
            if state.step == first_state.step + 1:
                stop.heartbeat.set_limits(phase_limits(run.config.watchdog, warm=True))
            checkpointer.log_finished()
            is_due = is_last or is_due or state.step % train.checkpoint_every == 0
            if is_due and (is_last or is_sound):
                _save(state, checkpointer, meter, accounts)
                saved, is_due = state, False
        checkpointer.close()
    except Stopped:
        stop.heartbeat.enter(SAVE)
        if is_sound and state != saved:
            _save(state, checkpointer, meter, accounts)
        checkpointer.wait()  # where it cannot be written in time the checkpoint before stands
        raise
    finally:
        accounts.ended(state.step, useful_s=meter.total_s, code=_code_now())
        checkpointer.abandon()
        reading.close()
    _conclude(run, state, log)


def _conclude(run: ResolvedRun, state: RunState, log: RunLog) -> None:
    steps = run.config.train.steps
    if state.step < steps:
        log.info(f"stopped after step {state.step} of {steps}, as --train.stop-at says; started again, it goes on")
    else:
        _record_completion(run, state.step)
        log.info(f"complete: step {state.step} of {steps}; TensorBoard files in {run.config.run_dir / 'tensorboard'}")


def _save(state: RunState, checkpointer: AsyncCheckpointer, meter: Meter, accounts: AttemptLog) -> None:
    checkpointer.save(state)
    accounts.saved(state.step, useful_s=meter.total_s, stalled_s=checkpointer.stalled_s)


def _code_now() -> int:
    """The exit code that what is being raised leads to; to be called while it is."""
    error = sys.exc_info()[1]
    return int(ExitCode.DONE if error is None else exit_code_of(error))


def _fp16_scale(run: ResolvedRun, engine: DeepSpeedEngine) -> float | None:
    return float(getattr(engine.optimizer, "cur_scale")) if run.engine.precision == "fp16" else None  # noqa: B009


def advance(state: RunState, run: ResolvedRun) -> RunState:
    """`state` after one more step of `run`."""
    batch = run.engine.global_batch
    return RunState(
        step=state.step + 1,
        samples_consumed=state.samples_consumed + batch,
        tokens_seen=state.tokens_seen + batch * run.manifest.sequence_length,
    )


def _validate(
    run: ResolvedRun, engine: DeepSpeedEngine, state: RunState, log: RunLog, *, stop: StopAgreement, heed: bool
) -> None:
    """Validate; `stop` may end it midway, unless `heed` is false: nobody would make up for the last one."""
    batches = validation_batches(
        run.source,
        samples=run.config.train.validation_samples,
        share=run.share,
        loading=dataclasses.replace(run.config.data, workers=0),
    )
    validation = validate(
        engine,
        stop.checked_before_each(synchronized_batches(batches, run.topology), heed=heed),
        run.vocabulary,
        run.topology,
        objective=run.config.objective,
        fill_ins=run.config.train.fill_ins,
    )
    log.validation(validation, step=state.step, unigram_entropy=run.manifest.unigram_entropy)


def _announce(run: ResolvedRun, engine: DeepSpeedEngine, state: RunState, log: RunLog) -> None:
    config, topology, engine_config = run.config, run.topology, run.engine
    parameters = count_parameters(module_of(engine), topology)
    log.write_configuration(run.configuration())
    log.info(
        f"model: {parameters:,} parameters, {config.model.num_layers} layers, hidden {config.model.hidden_size}, "
        f"{engine_config.precision}, ZeRO {engine_config.zero_stage}\n"
        f"objective: {config.objective.kind} on {run.num_predictions} of {run.manifest.sequence_length} tokens\n"
        f"ranks: {topology.dp} data-parallel x {topology.tp} tensor-parallel on {topology.device.type}\n"
        f"corpus: {config.corpus}, {run.manifest.splits['train'].samples:,} samples in {run.lanes} lanes\n"
        f"batch: {engine_config.global_batch} = {topology.dp} ranks x {engine_config.accumulation(topology.dp)} "
        f"micro-batches of {engine_config.micro_batch}\n"
        f"TensorBoard: tensorboard --logdir {config.run_dir / 'tensorboard'}"
    )
    if engine_config.precision == "bf16" and not has_fast_bf16(topology.device):
        log.info(
            "warning: this CPU has no bf16 products and torch computes them number by number, hundreds of times slower "
            "than in fp32: use a --ds-config without bf16, ds_configs/tiny.json for example"
        )
    start = f"going on after step {state.step}" if state.step else "starting"
    log.info(f"{start}; {config.train.steps} steps in all")


def _record_completion(run: ResolvedRun, step: int) -> None:
    """Say in a file that the run is done: an exit code can be lost, and a finished rank can still abort at exit."""
    record = run.config.run_dir / _COMPLETE
    if run.topology.is_rank_zero and not record.exists():
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps({"step": step, "time": time.time()}) + "\n", encoding="utf-8")
        os.replace(temporary, record)


def _withdraw_completion(run: ResolvedRun) -> None:
    """A run that goes on, because it was made longer, is not done any more."""
    if run.topology.is_rank_zero:
        (run.config.run_dir / _COMPLETE).unlink(missing_ok=True)
