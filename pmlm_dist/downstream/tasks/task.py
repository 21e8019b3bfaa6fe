"""What a task is: the contract between the driver (`finetune.py`) and what is learned.

    rows of a data set        rows.py: dictionaries, one a line of a file
       | task.read            examples: checked, with everything predictions and scores need
       | task.features        what the network reads, token ids; an example may give several (windows of a passage)
       | task.collate         a TaskBatch: padded tensors, and how many losses it sums up
       | task.loss            forward pass through the engine -> SUM of the losses of the batch
       | task.predict         forward pass through the engine -> one plain Python value for each feature
       | task.predictions     one JSON object for each example, in their order
       | task.scores          {name of a metric: value}

The driver owns order, ranks, steps, schedule, engine, checkpoints and files; a task knows none of them. It draws
epoch e's order of the features from (seed, e), gives every data-parallel rank its part and scales the loss: the
gradient of a step is that of sum(loss) / N, N the sum of `TaskBatch.count` over all micro-batches and data-parallel
ranks. What a task draws at random in `collate` (a target's noise, say) it draws from (seed, epoch, ids), so that it is
the same on any topology.

**The model** is `task.build_model`'s: a `PseudoMaskedLM`, or one with a head on it (`model/task_model.py`). `loss` and
`predict` get the engine (call it as the module: ZeRO needs that), so a task may just as well train the whole language
model on layouts with appended slots: `engine(inputs=..., targets_BM=..., objectives=("par",))`. A `predict` that
decodes step by step uses `engine.module`. Every rank of a world calls `loss` and `predict` equally often;
tensor-parallel peers with the same batch, data-parallel ranks with different ones.

A task is saved with its model as the JSON object `saved()`, and made from it again by its kind's `restore`; a kind is
an entry of the table `tasks.py::TASKS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from pmlm_dist.config import ModelConfig
from pmlm_dist.downstream.settings import FinetuneConfig
from pmlm_dist.model.transformer import PseudoMaskedLM, build_model
from pmlm_dist.vocab import Vocabulary

Row = Mapping[str, Any]
Example = TypeVar("Example")
Feature = TypeVar("Feature")


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """Features as tensors."""

    tensors: dict[str, Tensor]
    """Anything, by name; moved to the device by the driver."""
    count: int
    """Losses that the batch sums up: its examples, or its target tokens."""

    def to(self, device: Any) -> TaskBatch:
        """The same batch on `device`."""
        return TaskBatch({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.count)


class Task(ABC, Generic[Example, Feature]):
    """One task with its labels, limits and vocabulary; see the module's docstring for what happens when."""

    metric: str
    """The score by which the best checkpoint is chosen; higher is better."""

    @abstractmethod
    def read(self, rows: Sequence[Row], *, origin: str, labelled: bool = True) -> list[Example]:
        """Check `rows` and take from them what is needed; `origin` names them in errors.

        Without `labelled` rows need not say what is right (a hidden test set); scores are then not asked for. Raises
        `ConfigError` with every problem: a missing column, a label that was not in training, a score that is NaN.
        """

    @abstractmethod
    def has_labels(self, rows: Sequence[Row]) -> bool:
        """Whether `rows` say what is right, so that predictions of them can be scored."""

    @abstractmethod
    def features(self, examples: Sequence[Example], *, training: bool) -> list[Feature]:
        """What the network reads of `examples`. Raises `ConfigError` where one is too long and that is refused."""

    @abstractmethod
    def length(self, feature: Feature) -> int:
        """Tokens of a feature: features of like length are predicted together."""

    @abstractmethod
    def collate(self, features: Sequence[Feature], *, ids: Sequence[int], epoch: int, seed: int) -> TaskBatch:
        """`features` (never empty; numbers `ids` of their split) as tensors on the CPU."""

    def build_model(self, config: ModelConfig, *, padded_vocab_size: int) -> PseudoMaskedLM:
        """The network of the task, weights drawn; the language model itself unless the task puts a head on it."""
        return build_model(config, padded_vocab_size=padded_vocab_size)

    @abstractmethod
    def loss(self, engine: nn.Module, batch: TaskBatch) -> Tensor:
        """Sum of the losses of `batch`, a scalar with gradient."""

    @abstractmethod
    def predict(self, engine: nn.Module, batch: TaskBatch) -> list[Any]:
        """One small picklable value for each feature of `batch`; called in evaluation mode without gradients."""

    @abstractmethod
    def predictions(
        self, examples: Sequence[Example], features: Sequence[Feature], outputs: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """For each example what is predicted of it, as JSON values with its `id`; `outputs` are those of `features`."""

    @abstractmethod
    def scores(self, examples: Sequence[Example], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The metrics of labelled `examples`, `metric` among them."""

    @abstractmethod
    def saved(self) -> dict[str, Any]:
        """What `restore` makes this task from again, as JSON values."""

    def problems_of_choosing(self, examples: Sequence[Example]) -> list[str]:
        """Why `metric` of these labelled examples, the first validation split, is a number for no prediction."""
        return []

    def notes(self) -> list[str]:
        """What the user should know of how examples were read: how many were cut, for example."""
        return []


@dataclass(frozen=True)
class TaskKind:
    """A name that `--task` takes."""

    about: str
    """One line for people."""
    make: Callable[[FinetuneConfig, Sequence[Row], Vocabulary, ModelConfig], Task]
    """The task for the rows it is trained on. Raises `ConfigError`."""
    restore: Callable[[dict[str, Any], Vocabulary], Task]
    """The task that `saved()` was called of."""
    hub: str | None = None
    """Where its data are on the Hugging Face hub, NAME or NAME:CONFIG; None: it has no data of its own."""
    preset: str = "glue"
    """The preset of its recipe."""
    train: str = "train"
    """Name of the training split."""
    validation: tuple[str, ...] = field(default=("validation",))
    """Names of the validation splits; the first chooses the best checkpoint."""
