"""The task interface: dataset rows -> examples -> features -> batches -> loss, predictions, scores.

    rows of a data set     rows.py: one dictionary per line of a file
       | task.read         validated examples, with everything that predictions and scores need
       | task.features     model inputs as token ids; one example may give several (windows of a passage)
       | task.collate      TaskBatch: padded tensors, and the number of losses in their sum
       | task.loss         forward pass through the engine -> SUM of the losses of the batch
       | task.predict      forward pass through the engine -> one JSON value per feature
       | task.predictions  one JSON object per example, in the order of the examples
       | task.scores       {metric: value}; task.mean_loss decides between equal values

The fine-tuning job (`job.py`) and the training loop own data order, ranks, schedule, engine, checkpoints and files; a
task is independent of all of them. The gradient of a step is that of sum(loss) / N, where N is the sum of
`TaskBatch.count` over all micro-batches and data-parallel ranks. Random draws in `collate` (noise in a target, for
example) depend on (seed, epoch, ids) only, so that they are equal on any topology.

`loss` and `predict` receive the engine and call it like the module, because ZeRO hooks need that; a `predict` that
decodes step by step uses `engine.module`. All ranks call both equally often: tensor-parallel ranks with the same batch,
data-parallel ranks with different batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from pmlm_dist.config import ModelConfig
from pmlm_dist.downstream.settings import FinetuneConfig
from pmlm_dist.model.transformer import PseudoMaskedLM, build_model
from pmlm_dist.vocabulary.vocabulary import Vocabulary

Row = Mapping[str, Any]
Example = TypeVar("Example")
Feature = TypeVar("Feature")


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """Collated features."""

    tensors: dict[str, Tensor]
    """Task-specific tensors by name; the job moves them to the device."""
    count: int
    """Number of losses in the sum: examples, or target tokens."""

    def to(self, device: Any) -> TaskBatch:
        return TaskBatch({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.count)


class Task(ABC, Generic[Example, Feature]):
    """A task with its labels, limits and vocabulary; the module docstring shows the order of calls."""

    metric: str
    """The score that selects the best checkpoint; higher is better."""

    @abstractmethod
    def read(self, rows: Sequence[Row], *, origin: str, labeled: bool = True) -> list[Example]:
        """Validate `rows` and convert them to examples; `origin` names the data set in error messages.

        With `labeled=False` (a hidden test set) labels may be missing, and `scores` is not called. Raises
        `ConfigError` with all problems: a missing column, a label unseen in training, a score that is NaN.
        """

    @abstractmethod
    def has_labels(self, rows: Sequence[Row]) -> bool:
        """Return True if `rows` have labels, so that predictions can be scored."""

    @abstractmethod
    def features(self, examples: Sequence[Example], *, training: bool) -> list[Feature]:
        """Tokenize `examples`. Raises `ConfigError` for an input that is too long, if `too_long` is "raise"."""

    @abstractmethod
    def length(self, feature: Feature) -> int:
        """Return the tokens of a feature; prediction batches group features of similar length."""

    @abstractmethod
    def collate(self, features: Sequence[Feature], *, ids: Sequence[int], epoch: int, seed: int) -> TaskBatch:
        """Build CPU tensors of `features` (at least one); `ids` are their indices in the split."""

    def build_model(self, config: ModelConfig, *, padded_vocab_size: int) -> PseudoMaskedLM:
        """Build the model with random weights: the language model itself, unless the task adds a head."""
        return build_model(config, padded_vocab_size=padded_vocab_size)

    @abstractmethod
    def loss(self, engine: nn.Module, batch: TaskBatch) -> Tensor:
        """Return the sum of the losses of `batch`: a scalar with gradient."""

    @abstractmethod
    def predict(self, engine: nn.Module, batch: TaskBatch) -> list[Any]:
        """Return one small JSON value (or tuple) per feature of `batch`; runs in evaluation mode without gradients.

        `engine` is an engine, or the module itself.
        """

    @abstractmethod
    def predictions(
        self, examples: Sequence[Example], features: Sequence[Feature], outputs: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """Return one complete row per example: its `id`, inputs, label if known, and `prediction`, as JSON values.

        `outputs`: one per feature, from `predict` or read from JSON, where tuples have become lists.
        """

    @abstractmethod
    def scores(self, examples: Sequence[Example], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return the metrics of labeled `examples`; `self.metric` is one of them."""

    @abstractmethod
    def mean_loss(self, features: Sequence[Feature], outputs: Sequence[Any]) -> float:
        """Return the mean loss of labeled `features`; it decides between checkpoints with equal `metric`."""

    def signatures(self, examples: Sequence[Example]) -> dict[str, str]:
        """Return how metrics were computed that have variants: {metric: signature}."""
        return {}

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """Return the JSON values from which `TaskKind.restore` rebuilds this task."""

    def metric_problems(self, examples: Sequence[Example]) -> list[str]:
        """Return why `self.metric` is NaN on these labeled `examples` (the first validation split) for any model."""
        return []

    def notes(self) -> list[str]:
        """Return remarks for the log: the number of truncated inputs, for example."""
        return []


@dataclass(frozen=True)
class TaskKind:
    """An entry of the task registry: one value of `--task`."""

    about: str
    """One-line description for the user."""
    make: Callable[[FinetuneConfig, Sequence[Row], Vocabulary, ModelConfig], Task]
    """Build the task for its training rows. Raises `ConfigError`."""
    restore: Callable[[dict[str, Any], Vocabulary], Task]
    """Rebuild a task from its `as_json()`."""
    hub: str | None = None
    """Its data set on the Hugging Face hub, NAME or NAME:CONFIG. None: no default data set."""
    preset: str = "glue"
    """Preset of its recipe."""
    validation: tuple[str, ...] = ("validation",)
    """Names of the validation splits; the first selects the best checkpoint."""
