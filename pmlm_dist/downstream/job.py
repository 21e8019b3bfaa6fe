"""The fine-tuning job: features of a task in an order given by (seed, epoch), and the best checkpoint by validation.

Every feature is read once an epoch, whatever the number of ranks; the last step of an epoch reads what is left. The
gradient of a step is that of sum(loss) / N, N = the targets it has read.

    OUTPUT/checkpoints/step-N   the best so far and, until the job is complete, the newest
    OUTPUT/scores.json, predictions-SPLIT.jsonl   of the best; scores.json marks the job as complete
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from pmlm_dist.checkpoint.async_save import AsyncCheckpointer
from pmlm_dist.checkpoint.files import CheckpointReader, checkpoint_problems, read_state, sha256_of
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.manifest import MANIFEST
from pmlm_dist.checkpoint.resume import RunState, differences
from pmlm_dist.config import ModelConfig, as_dict, raise_if_any
from pmlm_dist.data.order import BatchShare, micro_batch_samples, permutation
from pmlm_dist.downstream.prediction import Evaluation, Split, batch_for, evaluate, predictions_file, score_line
from pmlm_dist.downstream.preparation import FinetuneData
from pmlm_dist.downstream.rows import absolute_source
from pmlm_dist.downstream.settings import Recipe, optim_config
from pmlm_dist.downstream.summary import FinetuneRun
from pmlm_dist.downstream.tasks.registry import TASKS
from pmlm_dist.downstream.tasks.task import TaskBatch
from pmlm_dist.engine.deepspeed_config import EngineConfig
from pmlm_dist.engine.deepspeed_engine import initialize_engine
from pmlm_dist.engine.optimizer import learning_rate
from pmlm_dist.files import json_line, write_atomically
from pmlm_dist.metrics.meter import Interval, StepResult
from pmlm_dist.model.task_model import TASK_HEAD
from pmlm_dist.parallel import seeding
from pmlm_dist.training.job import LoopSettings, TrainingJob, TrainingSession

SCORES = "scores.json"


@dataclass(frozen=True, eq=False)
class FinetuneBatch:
    """A micro-batch of a task, with the numbers of its features in the training split."""

    batch: TaskBatch
    ids: list[int]

    def to(self, device: torch.device) -> FinetuneBatch:
        return FinetuneBatch(self.batch.to(device), self.ids)


@dataclass
class FinetuneProgress:
    """How far a fine-tuning is, beside its step: what a checkpoint's `state.json` holds under `progress`."""

    evaluated: int = 0
    """The step of the last evaluation."""
    best_step: int = 0
    best_value: float = -math.inf
    """Minus infinity if the metric is undefined: the correlation of constant predictions."""
    best_loss: float = math.inf
    evaluations: dict[str, Evaluation] = dataclasses.field(default_factory=dict)
    """Those of the best step, if this attempt made them."""
    kept: int = 0
    """The best step whose checkpoint exists; it is kept until that of a better one exists."""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        value, loss = (x if math.isfinite(x) else None for x in (self.best_value, self.best_loss))
        return {"evaluated": self.evaluated, "best_step": self.best_step, "best_value": value, "best_loss": loss}

    def restore(self, checkpoint: Path) -> None:
        """Set it to that of `checkpoint`. Raises `ConfigError` if the best checkpoint so far is not valid."""
        saved = read_state(checkpoint)["progress"]
        self.evaluated, self.best_step = saved["evaluated"], saved["best_step"]
        self.kept = self.best_step
        if self.best_step:
            value, loss = saved["best_value"], saved.get("best_loss")
            self.best_value = -math.inf if value is None else value
            self.best_loss = math.inf if loss is None else loss
            best = CheckpointFolder(checkpoint.parent, keep=1).folder(self.best_step)
            problems = checkpoint_problems(best, check="sizes")
            raise_if_any([f"{best}, the best checkpoint so far, is not valid: {problem}" for problem in problems])


class FinetuneJob(TrainingJob[FinetuneBatch]):
    """One fine-tuning: shared data with a recipe, a seed and a folder."""

    def __init__(
        self,
        data: FinetuneData,
        recipe: Recipe,
        *,
        seed: int,
        output: Path,
        engine_config: EngineConfig,
        model_config: ModelConfig,
    ):
        self.data, self.recipe, self.seed, self.output = data, recipe, seed, output
        self.topology, self.engine_config, self.model_config = data.topology, engine_config, model_config
        self.progress = FinetuneProgress()
        self.steps_per_epoch = -(-len(data.train.features) // recipe.batch)
        """Steps in which every feature is read once."""
        steps, config = self.steps_per_epoch * recipe.epochs, data.config
        self.settings = LoopSettings(
            steps=steps,
            last_step=steps,
            optim=optim_config(recipe, steps=steps),
            seed=seed,
            log_every=config.log_every,
            max_skipped_steps=config.max_skipped_steps,
            watchdog=config.watchdog,
        )
        self._is_save_due = False

    @property
    def share(self) -> BatchShare:
        """This rank's part of every global batch."""
        engine = self.engine_config
        return BatchShare(engine.global_batch, engine.micro_batch, self.topology.dp_rank, self.topology.dp)

    # ------------------------------------------------------------------------------------------------------- set-up

    def build_engine(self) -> DeepSpeedEngine:
        vocab_size = self.model_config.vocab_size
        assert vocab_size is not None
        seeding.seed_initialization(self.seed)
        return initialize_engine(
            self.data.task.build_model(self.model_config, padded_vocab_size=-(-vocab_size // 128) * 128),
            optim=self.settings.optim,
            config=self.engine_config,
            topology=self.topology,
        )

    def load_initial_weights(self, session: TrainingSession) -> None:
        """Load the pre-trained model's weights, unless the network is to stay untrained."""
        if not self.data.config.untrained:
            with CheckpointReader(self.data.start.folder) as reader:
                session.engine_state.load_weights(reader, fresh=TASK_HEAD)

    def start(self, session: TrainingSession, state: RunState) -> None:
        data, topology, log = self.data, self.topology, session.log
        origin = "drawn from the seed" if data.config.untrained else f"from {data.start.folder}"
        sizes = [f"{len(split.examples):,} {split.name}" for split in (data.train, *data.scored, *data.reported)]
        log.info(
            f"task: {data.config.task}; examples: {', '.join(sizes)}; training features: {len(data.train.features):,}\n"
            f"weights: {origin}\n"
            f"ranks: {topology.dp} data-parallel x {topology.tp} tensor-parallel on {topology.device.type}\n"
            f"recipe: {json.dumps(dataclasses.asdict(self.recipe))}, seed {self.seed}, {self.settings.steps} steps"
        )
        for note in data.task.notes():
            log.info(f"note: {note}")
        if state.step:
            log.info(f"resuming after step {state.step}")
        if topology.is_rank_zero:
            data.start.vocabulary.save(self.output)

    def check_identity(self, checkpoint: Path) -> None:
        """Raise `ConfigError` if `checkpoint` belongs to another fine-tuning."""
        problems = differences(read_state(checkpoint)["identity"], json.loads(json.dumps(self.identity())))
        if problems:
            problems.append(
                f"{self.output} holds another fine-tuning (above): use the settings it was started with, or another "
                "--output"
            )
        raise_if_any(problems)

    def identity(self) -> dict[str, Any]:
        data = self.data
        return {
            "task": data.config.task,
            "settings": data.task.as_json(),
            "training data": data.digest,
            "model": dataclasses.asdict(self.model_config),
            "weights": None if data.config.untrained else sha256_of(data.start.folder / MANIFEST),
            "evaluate_every": data.config.evaluate_every,
            "vocabulary": data.start.vocabulary.fingerprint,
            "seed": self.seed,
            "recipe": dataclasses.asdict(self.recipe),
            "precision": self.engine_config.precision,
        }

    def configuration(self) -> dict[str, Any]:
        data, config = self.data, self.data.config
        return {
            **json.loads(json.dumps(as_dict(config))),
            "recipe": dataclasses.asdict(self.recipe),
            "seed": self.seed,
            "model": dataclasses.asdict(self.model_config),
            "started_from": None if config.untrained else str(data.start.folder),
            "corpus_fingerprint": data.start.state["configuration"].get("corpus_fingerprint"),
            "task": {
                "kind": config.task,
                "settings": data.task.as_json(),
                "data": absolute_source(config.data or TASKS[config.task].hub),
            },
            "engine": self.engine_config.raw,
        }

    # ------------------------------------------------------------------------------------------------------- a step

    def loss_scale(self, micro_batches: Sequence[FinetuneBatch]) -> float:
        count = torch.tensor(float(sum(batch.batch.count for batch in micro_batches)), device=self.topology.device)
        count = float(self.topology.all_reduce_dp(count))
        return len(micro_batches) * self.topology.dp / count

    def loss(
        self, model: torch.nn.Module, batch: FinetuneBatch, scale: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TrainingJob`; the count is this micro-batch's share of the step's mean loss."""
        loss = self.data.task.loss(model, batch.batch)
        loss = loss if batch.batch.count else 0.0 * loss  # a placeholder: every rank runs equally many forward passes
        scaled = loss * scale
        factor = self.engine_config.accumulation(self.topology.dp) * self.topology.dp
        return scaled, (scaled.detach().double() / factor)[None]

    def sample_ids(self, batch: FinetuneBatch) -> list[int]:
        return batch.ids

    def advance(self, state: RunState) -> RunState:
        features = len(self.data.train.features) * self.recipe.epochs
        return RunState(step=state.step + 1, samples_consumed=min((state.step + 1) * self.recipe.batch, features))

    # ----------------------------------------------------------------------------------------------------- the loop

    def next_micro_batches(self, session: TrainingSession, state: RunState) -> list[FinetuneBatch]:
        session.attempt.stop.check_begun()
        return self.micro_batches(state.step)

    def begin_next_step(self, session: TrainingSession) -> None:
        session.attempt.stop.begin()

    def micro_batches(self, step: int) -> list[FinetuneBatch]:
        """Return this rank's micro-batches after `step` steps; where no feature is left, a placeholder of count 0."""
        share, features = self.share, self.data.train.features
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(len(features), seed=self.seed, epoch=epoch)
        micro_batches = []
        for number in range(share.accumulation):
            places = micro_batch_samples(within * share.global_batch, number, share=share)
            ids = [int(order[place]) for place in places if place < len(features)]
            read = ids or [0]
            batch = self.data.task.collate([features[i] for i in read], ids=read, epoch=epoch, seed=self.seed)
            micro_batches.append(FinetuneBatch(batch if ids else TaskBatch(batch.tensors, 0), ids))
        return micro_batches

    def log_step(
        self, session: TrainingSession, state: RunState, result: StepResult, interval: Interval, *, skipped_steps: int
    ) -> None:
        """Log the mean loss of the interval's steps, learning rate, gradient norm and time."""
        step, steps, seconds = state.step, self.settings.steps, interval.seconds_per_step
        loss = float(self.topology.all_reduce_dp(interval.counts)) / interval.steps
        rate = learning_rate(step, steps=steps, optim=self.settings.optim)
        scalars = {"train/loss": loss, "train/learning_rate": rate, "train/gradient_norm": result.gradient_norm}
        session.log.scalars({**scalars, "seconds/step": seconds}, step=step)
        eta_s = (steps - step) * seconds
        session.log.info(
            f"step {step}/{steps}  loss {loss:.4f}  lr {rate:.2e}  {seconds:.3f} s a step  ETA {eta_s:.0f} s"
            + (f"  skipped {skipped_steps}" if skipped_steps else "")
        )

    def is_evaluation_due(self, state: RunState) -> bool:
        """See `TrainingJob`: after every epoch or `evaluate_every` steps, and after the last step."""
        every = self.data.config.evaluate_every or self.steps_per_epoch
        due = state.step > 0 and (state.step % every == 0 or state.step == self.settings.last_step)
        return due and self.progress.evaluated < state.step

    def evaluate(self, session: TrainingSession, state: RunState) -> None:
        """Evaluate the validation splits and keep the evaluation if it is the best."""
        data, progress, log = self.data, self.progress, session.log
        evaluations = {split.name: self._evaluate(session, split) for split in data.scored}
        for name, evaluation in evaluations.items():
            values = evaluation.scores.items()
            scalars = {f"{name}/{metric}": value for metric, value in values}
            log.scalars({**scalars, f"{name}/loss": evaluation.loss}, step=state.step)
            log.info(f"step {state.step}: {score_line(name, evaluation, signed=False)}")
        progress.evaluated, self._is_save_due = state.step, True
        value, loss = evaluations[data.scored[0].name].scores[data.task.metric], evaluations[data.scored[0].name].loss
        value = -math.inf if math.isnan(value) else value
        is_better, note = self._compare(state.step, value, loss)
        if note:
            log.info(note)
        if is_better:
            progress.best_step, progress.best_value, progress.best_loss = state.step, value, loss
            progress.evaluations = evaluations

    def _compare(self, step: int, value: float, loss: float) -> tuple[bool, str]:
        """Return whether `step` is the best so far, and why if its metric alone does not tell.

        Equal values of the metric, and undefined ones, are ordered by the loss. A step whose loss is NaN never counts.
        """
        progress, metric = self.progress, self.data.task.metric
        if math.isnan(loss) or value < progress.best_value:
            return False, ""
        if not progress.best_step or value > progress.best_value:
            return True, ""
        best, other = (progress.best_step, step) if progress.best_loss <= loss else (step, progress.best_step)
        losses = sorted([progress.best_loss, loss])
        shown = f"{value:.4f}" if math.isfinite(value) else "undefined"
        return best == step, (
            f"step {step}: {metric} ties with step {progress.best_step} ({shown}), the lower loss decides: "
            f"step {best} ({losses[0]:.4f}) is kept, not step {other} ({losses[1]:.4f})"
        )

    def _evaluate(self, session: TrainingSession, split: Split) -> Evaluation:
        return evaluate(
            session.engine,
            self.data.task,
            split,
            self.topology,
            batch=batch_for(split, self.topology, largest=self.engine_config.micro_batch),
            before_batch=session.attempt.stop.check,
        )

    def is_save_due(self, state: RunState) -> bool:
        """See `TrainingJob`: after every evaluation."""
        return self._is_save_due

    def prepare_save(self, checkpointer: AsyncCheckpointer) -> dict[str, Any]:
        """See `TrainingJob`; waits for the last save, since the best checkpoint must not go before the next exists."""
        checkpointer.close()
        self.progress.kept, self._is_save_due = self.progress.best_step, False
        return {"progress": self.progress.as_json()}

    def finish(self, session: TrainingSession, state: RunState) -> FinetuneRun:
        """Score the best checkpoint on the splits it has not been scored on; write scores and predictions."""
        data, progress, log = self.data, self.progress, session.log
        if not progress.best_step:
            raise FloatingPointError("every evaluation's loss was NaN: the training has diverged, lower --recipe.lr")
        best = session.folder.folder(progress.best_step)
        missing = [split for split in (*data.scored, *data.reported) if split.name not in progress.evaluations]
        if missing:
            with CheckpointReader(best) as reader:
                session.engine_state.load_weights(reader)
        progress.evaluations |= {split.name: self._evaluate(session, split) for split in missing}
        scores = {name: evaluation.scores for name, evaluation in progress.evaluations.items()}
        losses = {name: evaluation.loss for name, evaluation in progress.evaluations.items() if evaluation.scores}
        if self.topology.is_rank_zero:
            for name, evaluation in progress.evaluations.items():
                write_atomically(predictions_file(self.output, name), b"".join(map(json_line, evaluation.predictions)))
            session.folder.keep_only(progress.best_step)
            signatures = {name: e.signatures for name, e in progress.evaluations.items() if e.signatures}
            summary = {"step": progress.best_step, "scores": scores, "losses": losses}
            summary |= {"signatures": signatures} if signatures else {}
            write_atomically(self.output / SCORES, json.dumps(summary, indent=2) + "\n")  # now it is complete
        for name, evaluation in progress.evaluations.items():
            log.info(f"best, step {progress.best_step}: {score_line(name, evaluation)}")
        log.info(f"written: {best}")
        return FinetuneRun(dataclasses.asdict(self.recipe), self.seed, scores, losses, str(self.output))


@functools.lru_cache(maxsize=1)
def _order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    return permutation(count, seed=seed, epoch=epoch)
