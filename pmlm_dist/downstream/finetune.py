"""Fine-tuning: the driver of every task (`task.py` is the contract with them).

    checkpoint, DeepSpeed's JSON, rows   --prepare: every problem is listed, on all ranks-->   Session
    Session + recipe + seed              --learn-->   OUTPUT/checkpoints/step-N  (the best so far, and no other)
                                                      OUTPUT/tokenizer.json vocab.txt config.json metrics.jsonl
                                                      OUTPUT/scores.json predictions-SPLIT.jsonl   (of the best)
    several recipes or seeds             --finetune->  a folder each, and OUTPUT/summary.json: mean and deviation
    stopped, or ended, midway                          the newest checkpoint beside the best, UNFINISHED: it goes on

Model, engine, parallel layers, checkpoint format and launchers are those of pre-training. The order of the features is
a function of (seed, epoch): every one is read once an epoch, whatever the number of ranks. The last step of an epoch
reads what is left; the gradient of a step is that of sum(loss) / N over what it has read.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from pmlm_dist.checkpoint.async_save import AsyncCheckpointer
from pmlm_dist.checkpoint.engine_state import EngineState
from pmlm_dist.checkpoint.files import MANIFEST, CheckpointReader, checkpoint_problems, read_state, sha256_of
from pmlm_dist.checkpoint.folder import CheckpointFolder, newest_valid_at
from pmlm_dist.checkpoint.resume import RunState, differences, find_checkpoint, load_checkpoint
from pmlm_dist.config import ConfigError, ModelConfig, OptimConfig, as_dict, divisors, problems_of_model, raise_if_any
from pmlm_dist.conversion.pretrained import PretrainedModel, find_pretrained
from pmlm_dist.data.order import BatchShare, micro_batch_samples, permutation
from pmlm_dist.downstream.prediction import Evaluation, Split, evaluate, write_predictions
from pmlm_dist.downstream.rows import read_rows
from pmlm_dist.downstream.settings import (
    UNFINISHED,
    EvaluateConfig,
    FinetuneConfig,
    Recipe,
    check,
    optim_config,
    recipes,
)
from pmlm_dist.downstream.summary import FinetuneRun, summarise
from pmlm_dist.downstream.tasks.registry import TASKS
from pmlm_dist.downstream.tasks.task import Task, TaskBatch
from pmlm_dist.engine.deepspeed_config import EngineConfig, load_engine_config
from pmlm_dist.engine.deepspeed_engine import initialize_engine, module_of, optimizer_step
from pmlm_dist.engine.optimizer import learning_rate, set_learning_rate
from pmlm_dist.metrics.run_log import RunLog
from pmlm_dist.model.task_model import TASK_HEAD
from pmlm_dist.parallel import groups, seeding
from pmlm_dist.parallel.groups import Topology, run_on_all_ranks
from pmlm_dist.supervision.heartbeat import DATA, SAVE, START_UP, STEP, VALIDATION, Heartbeat, phase_limits
from pmlm_dist.supervision.signals import STOP_FILE, StopAgreement, Stopped, StopSignals
from pmlm_dist.training.guards import SkippedSteps, check_replicas
from pmlm_dist.training.resolve import RunLease, run_lease

SCORES, SUMMARY = "scores.json", "summary.json"
_SAVE_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class FinetuneData:
    """What several fine-tunings of one command share."""

    config: FinetuneConfig
    topology: Topology
    start: PretrainedModel
    task: Task
    train: Split
    scored: tuple[Split, ...]
    """The validation splits; the first chooses the best checkpoint."""
    reported: tuple[Split, ...]
    digest: str
    """Of the training rows."""
    heartbeat: Heartbeat = dataclasses.field(default_factory=Heartbeat)
    """Signs of life for this rank's supervisor."""


@dataclass(frozen=True)
class FinetuneJob:
    """One fine-tuning: a session with its recipe, seed and folder."""

    session: FinetuneData
    recipe: Recipe
    seed: int
    output: Path
    engine: EngineConfig
    model: ModelConfig

    @property
    def share(self) -> BatchShare:
        """This rank's part of every global batch."""
        topology = self.session.topology
        return BatchShare(self.engine.global_batch, self.engine.micro_batch, topology.dp_rank, topology.dp)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every feature is read once."""
        return -(-len(self.session.train.features) // self.recipe.batch)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.steps_per_epoch * self.recipe.epochs

    def is_evaluated(self, step: int) -> bool:
        """Whether the validation splits are evaluated after `step`."""
        every = self.session.config.evaluate_every or self.steps_per_epoch
        return step > 0 and (step % every == 0 or step == self.steps)

    def is_logged(self, step: int) -> bool:
        """Whether `step` gets a log line."""
        return step % self.session.config.log_every == 0 or step == self.steps

    @property
    def optim(self) -> OptimConfig:
        """The optimizer's settings."""
        return optim_config(self.recipe, steps=self.steps)


@dataclass(frozen=True)
class Life:
    """This start of the command; others may have come before and may come after."""

    lease: RunLease
    stop: StopAgreement


# ------------------------------------------------------------------------------------------------------------ commands


def finetune(
    config: FinetuneConfig, heartbeat: Heartbeat | None = None, signals: StopSignals | None = None
) -> list[FinetuneRun]:
    """Fine-tune as `config` says, once for each recipe and seed; every rank calls this and gets the same.

    What an earlier start of the same command has left unfinished in `config.output` goes on where it was. Raises
    `ConfigError` on every rank, before anything is computed or written, with all that does not fit; `FolderInUse` when
    another start is at work in the same folder; `Stopped` on every rank, with a checkpoint written, when one of them
    was sent a signal or there is a file `STOP`. Signs of life go to `heartbeat`.
    """
    check(config)
    heartbeat, signals = heartbeat or Heartbeat(), signals or StopSignals()
    signals.grace_s = config.grace_s
    heartbeat.set_limits(phase_limits(config.watchdog, warm=False))
    topology = groups.init_process_groups(tp=config.parallel.tp, timeout_s=config.collective_timeout_s)
    with run_lease(config.output, topology) as lease:
        run_dir = str(config.output.absolute())
        heartbeat.register(rank=topology.rank, world_size=topology.world_size, run_dir=run_dir, attempt=lease.attempt)
        stop = StopAgreement(signals, file=config.output / STOP_FILE, topology=topology, heartbeat=heartbeat)
        return _finetune(config, topology, Life(lease, stop))


def _finetune(config: FinetuneConfig, topology: Topology, attempt: Life) -> list[FinetuneRun]:
    session = dataclasses.replace(
        run_on_all_ranks(topology, lambda: prepare(config, topology)), heartbeat=attempt.stop.heartbeat
    )
    learners = run_on_all_ranks(topology, lambda: _learners(session))
    if topology.is_rank_zero:
        (config.output / UNFINISHED).touch()
    trials = [_finished(learner) or learn(learner, attempt) for learner in learners]
    if len(learners) > 1:
        summary = summarise(trials, split=session.scored[0].name, metric=session.task.metric)
        if topology.is_rank_zero:
            _write_json(config.output / SUMMARY, summary.as_json())
            print(summary.table(), flush=True)
    if topology.is_rank_zero:
        (config.output / UNFINISHED).unlink()
    return trials


def _finished(learner: FinetuneJob) -> FinetuneRun | None:
    """The fine-tuning that an earlier start has brought to its end; every rank must call."""
    output, topology = learner.output, learner.session.topology

    def read() -> FinetuneRun | None:
        if not topology.is_rank_zero or not (output / SCORES).is_file():
            return None
        raise_if_any(_other_run(learner, newest_valid_at(output)))
        scores = json.loads((output / SCORES).read_text(encoding="utf-8"))["scores"]
        return FinetuneRun(dataclasses.asdict(learner.recipe), learner.seed, scores, str(output))

    return topology.broadcast_object(run_on_all_ranks(topology, read))


def evaluate_saved(config: EvaluateConfig) -> dict[str, Evaluation]:
    """Predict and score splits with a fine-tuned model; every rank calls this and gets the same."""
    topology = groups.init_process_groups(tp=config.parallel.tp, timeout_s=config.collective_timeout_s)
    start, task, splits, engine_config = run_on_all_ranks(topology, lambda: _prepare_evaluation(config, topology))
    if topology.is_rank_zero:
        is_ended = not (start.folder.parent.parent / UNFINISHED).exists()
        print(f"model: {start.folder}{'' if is_ended else ' (its fine-tuning has not come to its end)'}", flush=True)
    engine = _start(task, _model_config(start.model, None), engine_config, OptimConfig(), topology, seed=0)
    with CheckpointReader(start.folder) as reader:
        EngineState(engine, topology).load_weights(reader)
    found = {}
    for split in splits:
        found[split.name] = evaluate(engine, task, split, topology, micro_batch=engine_config.micro_batch)
        if topology.is_rank_zero:
            print(_score_line(split.name, found[split.name].scores), flush=True)
            if config.predictions is not None:
                write_predictions(_predictions_file(config.predictions, split.name), found[split.name].predictions)
    return found


# --------------------------------------------------------------------------------------------------------- preparation


def prepare(config: FinetuneConfig, topology: Topology) -> FinetuneData:
    """Read the model's settings and all examples. Raises `ConfigError`."""
    kind = TASKS.get(config.task)
    if kind is None:
        raise ConfigError([f"--task ({config.task}) must be one of {', '.join(TASKS)}"])
    start = find_pretrained(config.model, vocabulary=config.vocabulary)
    source = config.data or kind.hub
    if source is None:
        raise ConfigError([f"--task {config.task} has no data of its own: name yours by --data"])
    rows = read_rows(source, kind.train)
    task = kind.make(config, rows, start.vocabulary, start.model)
    train = _split(task, kind.train, rows, training=True)
    raise_if_any([] if train.features else [f"{source}: the split {kind.train} gives nothing to learn from"])
    scored = tuple(_split(task, name, read_rows(source, name)) for name in kind.validation)
    raise_if_any(task.problems_of_choosing(scored[0].examples))
    reported = tuple(_whole_split(task, name, source) for name in config.report)
    return FinetuneData(config, topology, start, task, train, scored, reported, _digest(rows))


def _digest(rows: Sequence[Any]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()


def _split(task: Task, name: str, rows: Sequence[Any], *, training: bool = False, labelled: bool = True) -> Split:
    examples = task.read(rows, origin=f"split {name}", labelled=labelled)
    return Split(name, examples, task.features(examples, training=training), labelled)


def _whole_split(task: Task, name: str, source: str) -> Split:
    """A split to predict, scored if it says what is right."""
    rows = read_rows(source, name)
    return _split(task, name, rows, labelled=task.has_labels(rows))


def _learners(session: FinetuneData) -> list[FinetuneJob]:
    config, topology = session.config, session.topology
    chosen = recipes(config)
    several = len(chosen) > 1 or config.seeds > 1
    made = []
    for recipe in chosen:
        engine = _engine_config(config.ds_config, topology, batch=recipe.batch)
        model = _model_config(session.start.model, recipe.dropout)
        raise_if_any(problems_of_model(model, tp=config.parallel.tp))
        for seed in range(config.seed, config.seed + config.seeds):
            folder = config.output / _name_of(recipe, seed, varied=_varied(chosen)) if several else config.output
            made.append(FinetuneJob(session, recipe, seed, folder, engine, model))
    return made


def _varied(chosen: Sequence[Recipe]) -> list[str]:
    names = [field.name for field in dataclasses.fields(Recipe)]
    return [name for name in names if len({getattr(recipe, name) for recipe in chosen}) > 1]


def _name_of(recipe: Recipe, seed: int, *, varied: Sequence[str]) -> str:
    return "-".join([*(f"{name}={getattr(recipe, name):g}" for name in varied), f"seed={seed}"])


def _engine_config(path: Path, topology: Topology, *, batch: int) -> EngineConfig:
    """DeepSpeed's JSON with another global batch, in micro-batches that fit it and are no larger than the file's."""
    has_accelerator = topology.device.type != "cpu"
    stated = load_engine_config(path, has_accelerator=has_accelerator)
    if batch % topology.dp:
        raise ConfigError(
            [f"recipe.batch ({batch}) must be a multiple of the data-parallel ranks ({topology.dp}): "
             f"use {topology.dp * -(-batch // topology.dp)}, or fewer ranks"]
        )  # fmt: skip
    micro = max(size for size in divisors(batch // topology.dp) if size <= stated.micro_batch)
    sizes = {"train_batch_size": batch, "train_micro_batch_size_per_gpu": micro}
    sizes |= {"gradient_accumulation_steps": batch // (micro * topology.dp)}
    return load_engine_config(path, has_accelerator=has_accelerator, overrides=sizes)


def _model_config(model: ModelConfig, dropout: float | None) -> ModelConfig:
    """The settings of the pre-trained model, computed by the attention that every device has."""
    model = dataclasses.replace(model, attention="fused", activation_checkpointing=False)
    if dropout is None:
        return model
    return dataclasses.replace(model, hidden_dropout=dropout, attention_dropout=dropout)


def _prepare_evaluation(
    config: EvaluateConfig, topology: Topology
) -> tuple[PretrainedModel, Task, list[Split], EngineConfig]:
    start = find_pretrained(config.model, vocabulary=config.vocabulary)
    saved = start.state["configuration"].get("task")
    if not isinstance(saved, dict) or saved.get("kind") not in TASKS:
        raise ConfigError(
            [f"{start.folder} has no head of a task, it is a pre-trained model: run `pmlm finetune` first"]
        )
    kind = TASKS[saved["kind"]]
    task = kind.restore(saved["settings"], start.vocabulary)
    source = config.data or saved["data"]
    splits = [_whole_split(task, name, source) for name in config.split or kind.validation]
    engine = load_engine_config(config.ds_config, has_accelerator=topology.device.type != "cpu")
    engine = _engine_config(config.ds_config, topology, batch=engine.micro_batch * topology.dp)
    raise_if_any(problems_of_model(start.model, tp=config.parallel.tp))
    if config.predictions is not None and topology.is_rank_zero:
        _prepare_predictions(config.predictions, splits)
    return start, task, splits, engine


def _prepare_predictions(folder: Path, splits: Sequence[Split]) -> None:
    there = [file for split in splits if (file := _predictions_file(folder, split.name)).exists()]
    raise_if_any([f"--predictions: {file} is there already, and nothing is overwritten" for file in there])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"--predictions ({folder}) cannot be made: {error}; name another folder"]) from error


# ------------------------------------------------------------------------------------------------------------ learning


def learn(learner: FinetuneJob, attempt: Life) -> FinetuneRun:
    """One fine-tuning, from the model, or from where it was, to the scores of its best checkpoint; every rank calls."""
    session, topology, output = learner.session, learner.session.topology, learner.output
    session.heartbeat.set_limits(phase_limits(session.config.watchdog, warm=False))
    session.heartbeat.enter(START_UP, step=0)
    progress = _Progress()
    folder = CheckpointFolder(
        output / "checkpoints", keep=1, fence=attempt.lease.check, keeps=lambda step: step == progress.kept
    )
    if topology.is_rank_zero:
        folder.remove_temporary()
    newest = find_checkpoint(folder, topology)
    raise_if_any(_other_run(learner, newest) if newest else [])
    engine = _start(session.task, learner.model, learner.engine, learner.optim, topology, seed=learner.seed)
    state = EngineState(engine, topology)
    if newest:
        progress.go_on_from(newest, load_checkpoint(state, newest))
    elif not session.config.untrained:
        with CheckpointReader(session.start.folder) as reader:
            state.load_weights(reader, fresh=TASK_HEAD)
    log = RunLog(output, enabled=topology.is_rank_zero, first_step=progress.step)
    with closing(log):
        log.write_configuration(_configuration(learner))
        _announce(learner, log, step=progress.step)
        if topology.is_rank_zero:
            session.start.vocabulary.save(output)
        try:
            tuning = FinetuneLoop(learner, engine, state, log, folder, attempt, progress)
            tuning.train()
            trial = tuning.report()
        except Stopped as stopped:
            log.info(f"stopped by {stopped}; the same command goes on from {newest_of(folder) or 'the beginning'}")
            raise
    del engine, state, tuning
    gc.collect()  # an engine is full of circles; the next one needs its memory
    return trial


def newest_of(folder: CheckpointFolder) -> Path | None:
    """The newest checkpoint in `folder`."""
    return next(reversed(folder.steps()), None)


def _other_run(learner: FinetuneJob, checkpoint: Path) -> list[str]:
    """Why the fine-tuning that `checkpoint` is of is not this one."""
    found = differences(read_state(checkpoint)["identity"], json.loads(json.dumps(_identity(learner))))
    if not found:
        return []
    return [
        *found,
        f"{learner.output} holds another fine-tuning (above): go on as it was begun, or name another --output",
    ]


def _start(
    task: Task, model: ModelConfig, engine: EngineConfig, optim: OptimConfig, topology: Topology, *, seed: int
) -> DeepSpeedEngine:
    seeding.seed_initialisation(seed)
    padded = -(-_vocab_size(model) // 128) * 128
    return initialize_engine(
        task.build_model(model, padded_vocab_size=padded), optim=optim, config=engine, topology=topology
    )


def _vocab_size(model: ModelConfig) -> int:
    assert model.vocab_size is not None
    return model.vocab_size


@dataclass
class _Progress:
    """How far a fine-tuning is."""

    step: int = 0
    """Updates made."""
    evaluated: int = 0
    """The step of the last evaluation."""
    best_step: int = 0
    best_value: float = -math.inf
    evaluations: dict[str, Evaluation] = dataclasses.field(default_factory=dict)
    """Those of the best step, if it is of this start."""
    kept: int = 0
    """The best step whose checkpoint is there; it stays until that of a better one is."""

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        value = self.best_value if self.best_step else None
        return {"evaluated": self.evaluated, "best_step": self.best_step, "best_value": value}

    def go_on_from(self, checkpoint: Path, state: RunState) -> None:
        """Be as far as `checkpoint`, which has been loaded. Raises `ConfigError` when the best one is not there."""
        saved = read_state(checkpoint)["progress"]
        self.step, self.evaluated, self.best_step = state.step, saved["evaluated"], saved["best_step"]
        self.kept = self.best_step
        if self.best_step:
            self.best_value = saved["best_value"]
            best = CheckpointFolder(checkpoint.parent, keep=1).folder(self.best_step)
            faults = checkpoint_problems(best, thorough=False)
            raise_if_any([f"{best}, the best checkpoint so far, is not whole: {fault}" for fault in faults])


def train_step(learner: FinetuneJob, engine: DeepSpeedEngine, step: int) -> tuple[float, float | None]:
    """The update number `step` (from 1): mean loss over what all ranks have read, and the gradient's norm.

    No norm: it was not finite, and the update was left out.
    """
    topology, task, accumulation = learner.session.topology, learner.session.task, learner.share.accumulation
    heartbeat = learner.session.heartbeat
    heartbeat.enter(DATA, step=step)
    micro_batches = list(micro_batches_of(learner, step))
    heartbeat.enter(STEP)
    count = torch.tensor(float(sum(batch.count for batch in micro_batches)), device=topology.device)
    count = float(topology.all_reduce_dp(count))
    optimizer: Any = engine.optimizer
    set_learning_rate(optimizer, learning_rate(step, steps=learner.steps, optim=learner.optim))
    total, norm = torch.zeros((), device=topology.device), math.nan
    for number, batch in enumerate(micro_batches):
        micro_step = (step - 1) * accumulation + number
        seeding.seed_dropout(learner.seed, micro_step=micro_step, dp_rank=topology.dp_rank)
        loss = task.loss(engine, batch.to(topology.device))
        loss = loss if batch.count else 0.0 * loss
        total += loss.detach().float()
        engine.backward(loss * (accumulation * topology.dp / count))
        norm = optimizer_step(engine, learner.engine, topology, is_boundary=number == accumulation - 1)
        heartbeat.beat()
    return float(topology.all_reduce_dp(total)) / count, norm if math.isfinite(norm) else None


def micro_batches_of(learner: FinetuneJob, step: int) -> Iterator[TaskBatch]:
    """This rank's micro-batches of `step` (from 1); where nothing is left to read, a feature that does not count."""
    session, share = learner.session, learner.share
    features = session.train.features
    epoch, within = divmod(step - 1, learner.steps_per_epoch)
    order = _order(len(features), seed=learner.seed, epoch=epoch)
    for number in range(share.accumulation):
        places = micro_batch_samples(within * share.global_batch, number, share=share)
        ids = [int(order[place]) for place in places if place < len(features)]
        read = ids or [0]
        batch = session.task.collate([features[i] for i in read], ids=read, epoch=epoch, seed=learner.seed)
        yield batch if ids else TaskBatch(batch.tensors, 0)


@functools.lru_cache(maxsize=1)
def _order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    return permutation(count, seed=seed, epoch=epoch)


@dataclass
class FinetuneLoop:
    """A fine-tuning at work, on every rank."""

    learner: FinetuneJob
    engine: DeepSpeedEngine
    state: EngineState
    log: RunLog
    folder: CheckpointFolder
    attempt: Life
    progress: _Progress

    def train(self) -> None:
        """All steps that are left; the best checkpoint by validation is in `folder` afterwards."""
        learner, progress, log = self.learner, self.progress, self.log
        session, heartbeat, stop = learner.session, learner.session.heartbeat, self.attempt.stop
        checkpointer = AsyncCheckpointer(
            self.state,
            self.folder,
            log,
            metadata={"identity": _identity(learner), "configuration": _configuration(learner)},
            timeout_s=_SAVE_TIMEOUT_S,
            deadline=stop.deadline,
            on_wait=heartbeat.beat,
            attempt=self.attempt.lease.attempt,
        )
        check_replicas(module_of(self.engine), session.topology)
        saved, is_sound = progress.step, True
        skips, losses, start = SkippedSteps(limit=session.config.max_skipped_steps), [], time.perf_counter()
        try:
            while True:
                if learner.is_evaluated(progress.step) and progress.evaluated < progress.step:
                    self._score()
                    self._save(checkpointer)
                    saved = progress.step
                if progress.step == learner.steps:
                    break
                stop.check()
                loss, norm = train_step(learner, self.engine, progress.step + 1)
                progress.step, is_sound = progress.step + 1, norm is not None
                skips.count(skipped=not is_sound, last_good=None if is_sound else checkpointer.newest)
                losses.append(loss)
                if learner.is_logged(progress.step):
                    seconds = (time.perf_counter() - start) / len(losses)
                    _log_step(learner, log, progress.step, losses=losses, norm=norm, seconds=seconds)
                    losses, start = [], time.perf_counter()
                checkpointer.log_finished()
                heartbeat.set_limits(phase_limits(session.config.watchdog, warm=True))
            heartbeat.enter(SAVE)
            checkpointer.close()
        except Stopped:
            if is_sound and progress.step != saved:
                self._save(checkpointer)
            checkpointer.wait()  # where it cannot be written in time the checkpoint before stands
            raise
        finally:
            checkpointer.abandon()

    def _save(self, checkpointer: AsyncCheckpointer) -> None:
        """Save, once the last checkpoint is written: the one that is the best must not go before the next is there."""
        learner, progress = self.learner, self.progress
        learner.session.heartbeat.enter(SAVE)
        checkpointer.close()
        progress.kept = progress.best_step
        samples = min(progress.step * learner.recipe.batch, len(learner.session.train.features) * learner.recipe.epochs)
        checkpointer.save(RunState(step=progress.step, samples_consumed=samples), progress=progress.as_json())

    def _score(self) -> None:
        """Evaluate the validation splits, and take them for the best if they are. What is not a number never is."""
        session, progress = self.learner.session, self.progress
        session.heartbeat.enter(VALIDATION)
        found = {split.name: self._evaluate(split) for split in session.scored}
        for name, evaluation in found.items():
            values = evaluation.scores.items()
            self.log.scores({f"{name}/{metric}": value for metric, value in values}, step=progress.step)
            self.log.info(f"step {progress.step}: {_score_line(name, evaluation.scores)}")
        value = found[session.scored[0].name].scores[session.task.metric]
        progress.evaluated = progress.step
        if value > progress.best_value:
            progress.best_step, progress.best_value, progress.evaluations = progress.step, value, found

    def _evaluate(self, split: Split) -> Evaluation:
        session, micro = self.learner.session, self.learner.engine.micro_batch
        between = self.attempt.stop.check
        return evaluate(self.engine, session.task, split, session.topology, micro_batch=micro, between=between)

    def report(self) -> FinetuneRun:
        """Go back to the best checkpoint, score with it what it has not been scored on; write scores, predictions."""
        learner, progress, session = self.learner, self.progress, self.learner.session
        if not progress.best_step:
            raise FloatingPointError(
                f"no evaluation gave a number for {session.task.metric}: the training has diverged, lower --recipe.lr"
            )
        best = self.folder.folder(progress.best_step)
        left = [split for split in (*session.scored, *session.reported) if split.name not in progress.evaluations]
        if left:
            with CheckpointReader(best) as reader:
                self.state.load_weights(reader)
        session.heartbeat.enter(VALIDATION)
        progress.evaluations |= {split.name: self._evaluate(split) for split in left}
        scores = {name: evaluation.scores for name, evaluation in progress.evaluations.items()}
        if session.topology.is_rank_zero:
            for name, evaluation in progress.evaluations.items():
                _predictions_file(learner.output, name).unlink(missing_ok=True)  # of a start that ended right here
                write_predictions(_predictions_file(learner.output, name), evaluation.predictions)
            self.folder.keep_only(progress.best_step)
            _write_json(learner.output / SCORES, {"step": progress.best_step, "scores": scores})  # now it is done
        for name, values in scores.items():
            self.log.info(f"best, step {progress.best_step}: {_score_line(name, values)}")
        self.log.info(f"written: {best}")
        return FinetuneRun(dataclasses.asdict(learner.recipe), learner.seed, scores, str(learner.output))


# -------------------------------------------------------------------------------------------------------- what is told


def _identity(learner: FinetuneJob) -> dict[str, Any]:
    session = learner.session
    start = session.start.folder
    return {
        "task": session.config.task,
        "settings": session.task.saved(),
        "training data": session.digest,
        "model": dataclasses.asdict(learner.model),
        "weights": None if session.config.untrained else sha256_of(start / MANIFEST),
        "evaluate_every": session.config.evaluate_every,
        "vocabulary": session.start.vocabulary.fingerprint,
        "seed": learner.seed,
        "recipe": dataclasses.asdict(learner.recipe),
        "precision": learner.engine.precision,
    }


def _configuration(learner: FinetuneJob) -> dict[str, Any]:
    session, config = learner.session, learner.session.config
    plain = json.loads(json.dumps(as_dict(config)))
    return {
        **plain,
        "recipe": dataclasses.asdict(learner.recipe),
        "seed": learner.seed,
        "model": dataclasses.asdict(learner.model),
        "started_from": None if config.untrained else str(session.start.folder),
        "task": {
            "kind": config.task,
            "settings": session.task.saved(),
            "data": config.data or TASKS[config.task].hub,
        },
        "engine": learner.engine.raw,
    }


def _announce(learner: FinetuneJob, log: RunLog, *, step: int) -> None:
    session, topology = learner.session, learner.session.topology
    origin = "drawn anew" if session.config.untrained else f"from {session.start.folder}"
    sizes = [f"{len(split.examples):,} {split.name}" for split in (session.train, *session.scored, *session.reported)]
    log.info(
        f"task: {session.config.task}; examples: {', '.join(sizes)}; features to learn from: "
        f"{len(session.train.features):,}\n"
        f"weights: {origin}\n"
        f"ranks: {topology.dp} data-parallel x {topology.tp} tensor-parallel on {topology.device.type}\n"
        f"recipe: {json.dumps(dataclasses.asdict(learner.recipe))}, seed {learner.seed}, {learner.steps} steps"
    )
    for note in session.task.notes():
        log.info(f"note: {note}")
    if step:
        log.info(f"going on after step {step}")


def _log_step(
    learner: FinetuneJob, log: RunLog, step: int, *, losses: list[float], norm: float | None, seconds: float
) -> None:
    loss = sum(losses) / len(losses)
    rate = learning_rate(step, steps=learner.steps, optim=learner.optim)
    log.scores(
        {"train/loss": loss, "train/learning_rate": rate, "train/gradient_norm": norm, "seconds/step": seconds},
        step=step,
    )
    left = (learner.steps - step) * seconds
    log.info(f"step {step}/{learner.steps}  loss {loss:.4f}  lr {rate:.2e}  {seconds:.3f} s a step  ETA {left:.0f} s")


def _score_line(name: str, scores: dict[str, float]) -> str:
    return f"{name}: " + (", ".join(f"{m} {v:.4f}" for m, v in scores.items()) or "no labels, predictions only")


def _predictions_file(folder: Path, split: str) -> Path:
    return folder / f"predictions-{split}.jsonl"


def _write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or not there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
