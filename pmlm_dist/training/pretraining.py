"""The pre-training job: batches of a corpus, the losses of the objectives, validation on held-out samples.

`ResolvedRun` (resolve.py) holds what is fixed; this module computes and logs with it.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from pmlm_dist.checkpoint.initial_weights import load_initial_weights
from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import DS_CONFIGS
from pmlm_dist.console import print_safely
from pmlm_dist.data.batch import Batch
from pmlm_dist.data.loader import validation_batches
from pmlm_dist.engine.deepspeed_engine import has_fast_bf16, initialize_engine, module_of
from pmlm_dist.engine.optimizer import learning_rate
from pmlm_dist.files import write_atomically
from pmlm_dist.likelihood.probe import Probe
from pmlm_dist.metrics.flops import peak_tflops
from pmlm_dist.metrics.meter import Interval, StepResult
from pmlm_dist.metrics.run_log import Progress
from pmlm_dist.metrics.stragglers import RankTimes, Stragglers
from pmlm_dist.model.transformer import build_model
from pmlm_dist.objectives import OBJECTIVES, LossMeans, loss_scales
from pmlm_dist.parallel import seeding
from pmlm_dist.parallel.layers import count_parameters
from pmlm_dist.training.batches import TrainBatches, synchronized_batches
from pmlm_dist.training.guards import check_batches
from pmlm_dist.training.job import LoopSettings, TrainingJob, TrainingSession
from pmlm_dist.training.resolve import ResolvedRun
from pmlm_dist.training.validation import forward_losses, validate, weights_of

COMPLETE = "COMPLETE"
"""File in the folder of a run that has reached its last step."""


def build_engine(run: ResolvedRun) -> DeepSpeedEngine:
    """Build model, optimizer and DeepSpeed engine of `run`, with weights drawn from its seed; every rank calls."""
    seeding.seed_initialization(run.config.train.seed)
    model = build_model(run.config.model, padded_vocab_size=run.vocabulary.padded_size())
    if run.config.model.initial_head_bias == "unigram":
        model.head.set_bias(run.unigram_log_probabilities())
    return initialize_engine(
        model,
        optim=run.config.optim,
        config=run.engine,
        topology=run.topology,
        keep_memory=run.config.train.keep_freed_memory,
    )


class PretrainJob(TrainingJob[Batch]):
    """Pre-training of one resolved run."""

    def __init__(self, run: ResolvedRun):
        self.run, self.topology, self.engine_config = run, run.topology, run.engine
        self.model_config, self.output = run.config.model, run.config.run_dir
        train = run.config.train
        self.settings = LoopSettings(
            steps=train.steps,
            last_step=run.last_step,
            optim=run.config.optim,
            seed=train.seed,
            log_every=train.log_every,
            max_skipped_steps=train.max_skipped_steps,
            watchdog=run.config.watchdog,
            save_timeout_s=train.save_timeout_s,
            guard_every=train.guard_every,
        )
        self._stragglers = Stragglers(ratio=run.config.watchdog.slow_ratio)
        self._batches: TrainBatches | None = None
        self._first_step = 0

    # ------------------------------------------------------------------------------------------------------- set-up

    def build_engine(self) -> DeepSpeedEngine:
        return build_engine(self.run)

    def load_initial_weights(self, session: TrainingSession) -> None:
        if self.run.config.init is not None:
            origin = load_initial_weights(session.engine_state, self.run.config.init)
            session.log.info(f"weights: from {origin}")

    def start(self, session: TrainingSession, state: RunState) -> None:
        self._log_start(session, state)
        if self.topology.is_rank_zero:
            (self.output / COMPLETE).unlink(missing_ok=True)  # a complete run that was made longer
        self._first_step = state.step
        self._batches = TrainBatches(self.run, state, session.log)

    def identity(self) -> dict[str, Any]:
        return self.run.identity()

    def configuration(self) -> dict[str, Any]:
        return self.run.configuration()

    def _log_start(self, session: TrainingSession, state: RunState) -> None:
        run, config, engine, topology = self.run, self.run.config, self.engine_config, self.topology
        parameters = count_parameters(module_of(session.engine), topology)
        session.log.info(
            f"model: {parameters:,} parameters, {config.model.num_layers} layers, hidden {config.model.hidden_size}, "
            f"{engine.precision}, ZeRO {engine.zero_stage}\n"
            f"objective: {config.objective.kind} on {run.num_predictions} of {run.manifest.sequence_length} tokens\n"
            f"ranks: {topology.dp} data-parallel x {topology.tp} tensor-parallel on {topology.device.type}\n"
            f"corpus: {config.corpus}, {run.manifest.splits['train'].samples:,} samples in {run.lanes} lanes\n"
            f"batch: {engine.global_batch} = {topology.dp} ranks x {engine.accumulation(topology.dp)} "
            f"micro-batches of {engine.micro_batch}\n"
            f"TensorBoard: tensorboard --logdir {config.run_dir / 'tensorboard'}"
        )
        if engine.precision == "bf16" and not has_fast_bf16(topology.device):
            session.log.info(
                "warning: this CPU has no bf16 matrix products; torch computes them element by element, hundreds of "
                f"times slower than fp32: use a --ds-config without bf16, {DS_CONFIGS / 'tiny.json'} for example"
            )
        start = f"resuming after step {state.step}" if state.step else "starting"
        session.log.info(f"{start}; {config.train.steps} steps in all")

    # ------------------------------------------------------------------------------------------------------- a step

    def loss_scale(self, micro_batches: Sequence[Batch]) -> torch.Tensor:
        """Factor [K] of each objective's summed loss; see `TrainingJob`."""
        objective = self.run.config.objective
        targets_K = torch.stack([weights_of(batch, objective).sum(dim=(1, 2)) for batch in micro_batches]).sum(dim=0)
        targets_K = self.topology.all_reduce_dp(targets_K)
        return loss_scales(objective, targets_K) * len(micro_batches) * self.topology.dp

    def loss(
        self, model: torch.nn.Module, batch: Batch, scale: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TrainingJob`; the counts are those of `LossSums`."""
        sums = forward_losses(model, batch, self.run.config.objective)
        return (sums.nll_K * scale).sum(), sums.counts

    def advance(self, state: RunState) -> RunState:
        batch = self.engine_config.global_batch
        return RunState(
            step=state.step + 1,
            samples_consumed=state.samples_consumed + batch,
            tokens_seen=state.tokens_seen + batch * self.run.manifest.sequence_length,
        )

    def sample_ids(self, batch: Batch) -> list[int]:
        return batch.sample_ids_B.tolist()

    # ----------------------------------------------------------------------------------------------------- the loop

    def next_micro_batches(self, session: TrainingSession, state: RunState) -> list[Batch]:
        assert self._batches is not None
        is_last = state.step + 1 == self.settings.last_step
        return self._batches.next_micro_batches(session.attempt.stop, is_last=is_last)

    def begin_next_step(self, session: TrainingSession) -> None:
        assert self._batches is not None
        self._batches.begin_next(session.attempt.stop)

    def check_micro_batches(self, micro_batches: Sequence[Batch]) -> None:
        check_batches(micro_batches, self.topology)

    def log_step(
        self, session: TrainingSession, state: RunState, result: StepResult, interval: Interval, *, skipped_steps: int
    ) -> None:
        """Log losses, rates, times of all ranks, and how far the corpora have been read."""
        assert self._batches is not None
        session.log.progress(self._progress(session, state.step, result, interval, skipped_steps), self.topology.device)
        seconds = interval.phases
        own = RankTimes(
            data_s=session.attempt.stop.data_wait_s,
            compute_s=seconds["forward"] + seconds["backward"],
            forward_s=seconds["forward"],
            step_s=interval.last_step_s,
        )
        per_rank = self.topology.all_gather_object(own)
        session.log.ranks(per_rank, step=state.step)
        for warning in self._stragglers.check(per_rank):
            session.log.info(f"warning: step {state.step}: {warning}")
        self._batches.log_progress(state.step)

    def _progress(
        self, session: TrainingSession, step: int, result: StepResult, interval: Interval, skipped_steps: int
    ) -> Progress:
        run, train, optimizer = self.run, self.run.config.train, cast(Any, session.engine.optimizer)
        samples_per_s = run.engine.global_batch / interval.seconds_per_step
        flops_per_s = samples_per_s * run.sample_flops / run.topology.world_size
        peak = peak_tflops(train.peak_tflops, run.topology.device)
        return Progress(
            step=step,
            steps=train.steps,
            losses=LossMeans.from_counts(run.topology.all_reduce_dp(interval.counts), run.config.objective),
            learning_rate=learning_rate(step, steps=train.steps, optim=run.config.optim),
            gradient_norm=result.gradient_norm,
            loss_scale=float(optimizer.cur_scale) if run.engine.precision == "fp16" else None,
            skipped_steps=skipped_steps,
            tokens_per_s=samples_per_s * run.manifest.sequence_length,
            slots_per_s=samples_per_s * run.num_slots,
            mfu=flops_per_s / (peak * 1e12) if peak else None,
            seconds=interval.phases,
            eta_s=(train.steps - step) * interval.seconds_per_step,
        )

    def is_evaluation_due(self, state: RunState) -> bool:
        """See `TrainingJob`: every `train.validate_every` steps and at the last; not again after a resume."""
        return self._is_due(state, every=self.run.config.train.validate_every)

    def evaluate(self, session: TrainingSession, state: RunState) -> None:
        """Validate; a stop may end it midway, except at the last step, after which nothing would make up for it."""
        run, train = self.run, self.run.config.train
        batches = validation_batches(
            run.source,
            samples=train.validation_samples,
            share=run.share,
            loading=dataclasses.replace(run.config.data, workers=0),
        )
        is_last = state.step == self.settings.last_step
        validation = validate(
            session.engine,
            session.attempt.stop.checked_before_each(synchronized_batches(batches, self.topology), enabled=not is_last),
            run.vocabulary,
            self.topology,
            objective=run.config.objective,
            fill_ins=train.fill_ins,
        )
        session.log.validation(validation, step=state.step, unigram_entropy=run.manifest.unigram_entropy)
        if run.probe is not None:
            self._log_probe(session, run.probe, step=state.step, can_stop=not is_last)

    def _log_probe(self, session: TrainingSession, probe: Probe, *, step: int, can_stop: bool) -> None:
        """Log the accuracy on minimal pairs by what the objectives train: PAR from left to right, AE mask by mask."""
        check = partial(session.attempt.stop.checked_before_each, enabled=can_stop)
        session.engine.eval()
        for objective in OBJECTIVES[self.run.config.objective.kind]:
            method = "par" if objective == "par" else "pll"
            result = probe.accuracies(session.engine, method, self.run.vocabulary, self.topology, check=check)
            session.log.probe(result, method=method, step=step)
        session.engine.train()

    def is_save_due(self, state: RunState) -> bool:
        """See `TrainingJob`: every `train.checkpoint_every` steps and at the last."""
        return self._is_due(state, every=self.run.config.train.checkpoint_every)

    def _is_due(self, state: RunState, *, every: int) -> bool:
        return state.step > self._first_step and (state.step == self.settings.last_step or state.step % every == 0)

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()

    def finish(self, session: TrainingSession, state: RunState) -> None:
        """Record a complete run; after `--train.stop-at` only log."""
        if state.step < self.settings.steps:
            session.log.info(
                f"stopped after step {state.step} of {self.settings.steps} (--train.stop-at); a restart resumes there"
            )
        else:
            _record_completion(self.run, state.step)
            session.log.info(
                f"complete: step {state.step} of {self.settings.steps}; "
                f"TensorBoard files in {self.output / 'tensorboard'}"
            )


def complete(run: ResolvedRun, *, step: int, checkpoint: Path) -> None:
    """Conclude an attempt that has nothing to do: `checkpoint` holds the last step to take."""
    steps = run.config.train.steps
    if step >= steps:
        message = f"this run is complete: {checkpoint} holds step {step} of {steps}; nothing to do"
        _record_completion(run, step)  # the process may have ended between that checkpoint and the record
    else:
        message = f"{checkpoint} holds step {step}: nothing to do before --train.stop-at {run.config.train.stop_at}"
    if run.topology.is_rank_zero:
        print_safely(message)


def _record_completion(run: ResolvedRun, step: int) -> None:
    """Write the file COMPLETE: an exit code can be lost, and a finished rank can still abort at exit."""
    record = run.config.run_dir / COMPLETE
    if run.topology.is_rank_zero and not record.exists():
        write_atomically(record, json.dumps({"step": step, "time": time.time()}) + "\n", durable=False)
