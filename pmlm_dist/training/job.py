"""What the training loop trains: the contract between the loop and its two jobs, pre-training and fine-tuning.

    run.py::train_job   build_engine -> load_initial_weights -> start -> loop.py::train -> finish
    loop.py::train      evaluate? -> save? -> next_micro_batches -> step.py::train_step -> log_step
    step.py::train_step loss_scale -> loss (for each micro-batch)

A job gives batches, a loss and an evaluation. It owns no loop, no heartbeat, no checkpoint and no exit.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from pmlm_dist.checkpoint.async_save import AsyncCheckpointer
from pmlm_dist.checkpoint.engine_state import EngineState
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import ModelConfig, OptimConfig, WatchdogConfig
from pmlm_dist.engine.deepspeed_config import EngineConfig
from pmlm_dist.metrics.meter import Interval, StepResult
from pmlm_dist.metrics.run_log import RunLog
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.training.attempt import Attempt


class MicroBatch(Protocol):
    """A micro-batch of this rank."""

    def to(self, device: torch.device) -> Self: ...


BatchT = TypeVar("BatchT", bound=MicroBatch)


@dataclass(frozen=True)
class LoopSettings:
    """What the loop and the step need of a job's settings."""

    steps: int
    """Steps of the learning rate schedule."""
    last_step: int
    """Step after which this attempt ends."""
    optim: OptimConfig
    seed: int
    log_every: int
    max_skipped_steps: int
    watchdog: WatchdogConfig
    save_timeout_s: float = 1800.0
    guard_every: int | None = None
    """Steps between comparisons of batches and replicas over ranks; None: replicas once, at the start."""

    def is_logged(self, step: int) -> bool:
        return step == self.last_step or step % self.log_every == 0


@dataclass(frozen=True)
class TrainingSession:
    """A job at work: its attempt, engine, log and checkpoints."""

    attempt: Attempt
    engine: DeepSpeedEngine
    engine_state: EngineState
    log: RunLog
    folder: CheckpointFolder


class TrainingJob(ABC, Generic[BatchT]):
    """One model to train, on every rank."""

    topology: Topology
    engine_config: EngineConfig
    model_config: ModelConfig
    settings: LoopSettings
    output: Path
    """Folder of log, TensorBoard files and checkpoints."""

    # ------------------------------------------------------------------------------------------------------- set-up

    @abstractmethod
    def build_engine(self) -> DeepSpeedEngine:
        """Build model, optimizer and engine, with weights drawn from the seed."""

    @abstractmethod
    def load_initial_weights(self, session: TrainingSession) -> None:
        """Load the weights to start from, if any; called if there is no checkpoint to resume from."""

    @abstractmethod
    def start(self, session: TrainingSession, state: RunState) -> None:
        """Log what will be trained and open the data after `state`."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be resumed from, as JSON values."""

    @abstractmethod
    def configuration(self) -> dict[str, Any]:
        """All settings as resolved, as JSON values."""

    # ------------------------------------------------------------------------------------------------------- a step

    @abstractmethod
    def loss_scale(self, micro_batches: Sequence[BatchT]) -> torch.Tensor | float:
        """Factor of the summed losses of a micro-batch, such that the step's gradient is that of their mean.

        DeepSpeed divides gradients by the accumulation g and averages over D data-parallel ranks, so that the factor is
        g * D / N, N = targets of the whole step. A collective: every rank calls.
        """

    @abstractmethod
    def loss(
        self, model: torch.nn.Module, batch: BatchT, scale: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scaled loss of a micro-batch (a scalar to differentiate) and its counts for the log (a vector)."""

    @abstractmethod
    def advance(self, state: RunState) -> RunState:
        """Return the state one step after `state`."""

    @abstractmethod
    def sample_ids(self, batch: BatchT) -> list[int]:
        """Return the numbers of the batch's samples, to name them in messages."""

    # ----------------------------------------------------------------------------------------------------- the loop

    @abstractmethod
    def next_micro_batches(self, session: TrainingSession, state: RunState) -> list[BatchT]:
        """Return this rank's micro-batches of the step after `state`. Raises `Stopped` on all ranks alike."""

    @abstractmethod
    def begin_next_step(self, session: TrainingSession) -> None:
        """Begin the agreement of all ranks on the next step; called beside the last backward pass of this one."""

    def check_micro_batches(self, micro_batches: Sequence[BatchT]) -> None:
        """Compare the batches of a step over ranks; every rank calls. Raises `GuardError`."""

    @abstractmethod
    def log_step(
        self, session: TrainingSession, state: RunState, result: StepResult, interval: Interval, *, skipped_steps: int
    ) -> None:
        """Log the interval that ends with step `state.step`; every rank calls."""

    @abstractmethod
    def is_evaluation_due(self, state: RunState) -> bool:
        """Return True if `state` is to be evaluated before the next step."""

    @abstractmethod
    def evaluate(self, session: TrainingSession, state: RunState) -> None:
        """Evaluate the model after `state`. Raises `Stopped` on all ranks alike."""

    @abstractmethod
    def is_save_due(self, state: RunState) -> bool:
        """Return True if `state` is to be saved before the next step."""

    def prepare_save(self, checkpointer: AsyncCheckpointer) -> dict[str, Any]:
        """Return what `state.json` holds besides the state; called right before each save."""
        return {}

    def close(self) -> None:
        """Release the data."""

    @abstractmethod
    def finish(self, session: TrainingSession, state: RunState) -> Any:
        """Conclude after the last step: `train_job` returns what this returns."""
