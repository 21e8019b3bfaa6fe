"""Classification and regression of a text or a pair, from the task head's output.

    row {text, pair?, label} -> TextExample -> TextFeature -> model -> class probabilities [B, C] | scores [B, 1]

A class is a string: labels of any type are compared as `str`. The classes are those of the training split, sorted, or
the fixed ones of a GLUE task. A regression target is a number.

Legend: B batch, C classes (1 for regression).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from pmlm_dist.config import ConfigError, ModelConfig
from pmlm_dist.downstream.settings import FinetuneConfig
from pmlm_dist.downstream.tasks import scores
from pmlm_dist.downstream.tasks.inputs import (
    EncodedInput,
    ValidRow,
    collate,
    find_column,
    join,
    max_input_tokens,
    model_inputs,
    raise_row_problems,
    truncate,
    valid_rows,
)
from pmlm_dist.downstream.tasks.task import Row, Task, TaskBatch
from pmlm_dist.model.task_model import TaskModel
from pmlm_dist.vocabulary.vocabulary import Vocabulary

MAX_TOKENS = 128

Metric = Callable[[Sequence[Any], Sequence[Any]], float]
METRICS: dict[str, Metric] = {
    "accuracy": scores.accuracy,
    "f1": scores.f1,
    "macro_f1": scores.macro_f1,
    "matthews": scores.matthews,
    "pearson": scores.pearson,
    "spearman": scores.spearman,
    "rmse": scores.root_mean_square_error,
}


@dataclass(frozen=True)
class DatasetFormat:
    """Columns, classes and metrics of a task kind, independent of any data."""

    text: tuple[str, ...] = ("text", "sentence")
    """Possible names of the text column."""
    pair: tuple[str, ...] = ("pair",)
    """Possible names of the column with the second text."""
    label: tuple[str, ...] = ("label",)
    """Possible names of the column with the class or score."""
    has_pairs: bool | None = None
    """True: pairs; False: single texts; None: pairs if the column exists."""
    labels: tuple[str, ...] = ()
    """The classes; empty: those of the training split, or regression."""
    label_aliases: dict[str, str] = field(default_factory=dict)
    """Other names of the classes in data files -> names in `labels`."""
    hidden_labels: tuple[str, ...] = ()
    """Labels that the data set's documentation gives to test examples whose label is hidden."""
    is_regression: bool = False
    metrics: tuple[str, ...] = ("accuracy", "macro_f1")
    """Reported metrics; the first selects the best checkpoint, unless `averaged` lists several."""
    averaged: tuple[str, ...] = ()
    """Metrics whose mean selects the best checkpoint."""


@dataclass(frozen=True)
class ClassificationSettings:
    """The saved state of a task."""

    text: str
    pair: str | None
    label: str
    labels: tuple[str, ...]
    """The classes in the order of the head's outputs; empty for regression."""
    label_aliases: dict[str, str]
    metrics: tuple[str, ...]
    averaged: tuple[str, ...]
    max_tokens: int
    too_long: str
    pooling: Literal["mean", "cls"]

    @property
    def text_columns(self) -> tuple[str, ...]:
        """One column, or two for pairs."""
        return (self.text, self.pair) if self.pair else (self.text,)


@dataclass(frozen=True)
class TextExample:
    """One validated row."""

    id: Any
    texts: tuple[str, ...]
    label: str | float | None
    """A class or a score; None if unlabeled."""
    location: str


@dataclass(frozen=True)
class TextFeature:
    """Token ids, and the index of the class or the score."""

    encoded: EncodedInput
    target: float


class Classification(Task[TextExample, TextFeature]):
    """Classification of a text or pair; regression if `settings.labels` is empty."""

    def __init__(
        self, settings: ClassificationSettings, vocabulary: Vocabulary, *, hidden_labels: tuple[str, ...] = ()
    ):
        self.settings, self.vocabulary, self._hidden_labels = settings, vocabulary, {*hidden_labels}
        self.metric = "mean" if len(settings.averaged) > 1 else settings.metrics[0]
        self._num_truncated = 0

    @classmethod
    def make(
        cls,
        dataset: DatasetFormat,
        config: FinetuneConfig,
        rows: Sequence[Row],
        vocabulary: Vocabulary,
        model: ModelConfig,
    ) -> Self:
        """Build the task for training `rows` in the format `dataset`. Raises `ConfigError`."""
        inputs, origin = config.inputs, f"--task {config.task}"
        text = find_column(rows, inputs.text, dataset.text, role="text", origin=origin)
        pair = None
        has_column = dataset.has_pairs is None and any(name in rows[0] for name in dataset.pair)
        if dataset.has_pairs or inputs.pair or has_column:
            pair = find_column(rows, inputs.pair, dataset.pair, role="pair", origin=origin)
        label = find_column(rows, inputs.label, dataset.label, role="label", origin=origin)
        labels = dataset.labels
        if not dataset.is_regression and not labels:
            labels = tuple(sorted({str(row[label]) for row in rows if _is_label(row.get(label))}))
        if len(labels) == 1:
            raise ConfigError([f"{origin}: every training example is of the class {labels[0]!r}: two are needed"])
        settings = ClassificationSettings(
            text=text,
            pair=pair,
            label=label,
            labels=labels,
            label_aliases=dict(dataset.label_aliases),
            metrics=dataset.metrics,
            averaged=dataset.averaged,
            max_tokens=max_input_tokens(inputs.max_tokens, default=MAX_TOKENS, model=model),
            too_long=inputs.too_long,
            pooling=config.pooling,
        )
        return cls(settings, vocabulary, hidden_labels=dataset.hidden_labels)

    @classmethod
    def restore(cls, saved: dict[str, Any], vocabulary: Vocabulary, *, hidden_labels: tuple[str, ...] = ()) -> Self:
        lists = {name: tuple(saved[name]) for name in ("labels", "metrics", "averaged")}
        return cls(ClassificationSettings(**{**saved, **lists}), vocabulary, hidden_labels=hidden_labels)

    def as_json(self) -> dict[str, Any]:
        return asdict(self.settings)

    # -------------------------------------------------------------------------------------------------------- examples

    def has_labels(self, rows: Sequence[Row]) -> bool:
        """Return False if all labels are missing, or are those of the data set's hidden test examples."""
        values = (row.get(self.settings.label) for row in rows)
        labels = {"" if value is None else str(value).strip() for value in values}
        return not labels <= {"", *self._hidden_labels}

    def read(self, rows: Sequence[Row], *, origin: str, labeled: bool = True) -> list[TextExample]:
        label = self.settings.label if labeled else None
        return [
            TextExample(row.id, row.texts, self._label(row) if labeled else None, row.location)
            for row in valid_rows(rows, self.settings.text_columns, label=label, origin=origin)
        ]

    def _label(self, row: ValidRow) -> str | float | None:
        settings, value = self.settings, row.values.get(self.settings.label)
        if not settings.labels:
            try:
                score = float(value)  # pyright: ignore[reportArgumentType] (None raises TypeError)
            except (TypeError, ValueError):
                score = math.nan
            if not math.isfinite(score):
                row.problems.append(
                    f"{row.location}: the score in column {settings.label} ({value!r}) is not a finite number"
                )
            return score
        label = settings.label_aliases.get(str(value), str(value))
        if not _is_label(value):
            row.problems.append(f"{row.location}: {value!r} in column {settings.label} is not a label")
        elif label not in settings.labels:
            row.problems.append(
                f"{row.location}: the label {value!r} in column {settings.label} was not in training, which had "
                f"{', '.join(settings.labels)}"
            )
        return label

    def features(self, examples: Sequence[TextExample], *, training: bool) -> list[TextFeature]:
        """Tokenize and truncate; raises `ConfigError` for inputs that are too long if `too_long` is "raise"."""
        num_texts = len(self.settings.text_columns)
        token_columns = [self.vocabulary.encode_batch([e.texts[i] for e in examples]) for i in range(num_texts)]
        room, problems, features = self.settings.max_tokens - 1 - num_texts, [], []
        for example, parts in zip(examples, zip(*token_columns, strict=True), strict=True):
            if sum(map(len, parts)) > room:
                self._num_truncated += 1
                if self.settings.too_long == "raise":
                    problems.append(
                        f"{example.location}: {sum(map(len, parts)) + 1 + len(parts)} tokens, at most "
                        f"{self.settings.max_tokens} (inputs.max_tokens) are allowed with --inputs.too-long raise"
                    )
            encoded = join(truncate(parts, room=room), self.vocabulary)
            features.append(TextFeature(encoded, self._target(example)))
        raise_row_problems(problems)
        return features

    def _target(self, example: TextExample) -> float:
        if example.label is None:
            return 0.0
        return float(self.settings.labels.index(str(example.label))) if self.settings.labels else float(example.label)

    def metric_problems(self, examples: Sequence[TextExample]) -> list[str]:
        """A correlation is undefined if all labels are equal."""
        if self.settings.labels or len({example.label for example in examples}) > 1:
            return []
        metric, score = self.settings.metrics[0], examples[0].label
        return [f"all scores of the validation split are {score}: {metric} is undefined, at least two must differ"]

    def notes(self) -> list[str]:
        if not self._num_truncated:
            return []
        return [
            f"{self._num_truncated:,} inputs were longer than {self.settings.max_tokens} tokens; the end of their "
            "longer text was truncated"
        ]

    # ----------------------------------------------------------------------------------------------------------- model

    def build_model(self, config: ModelConfig, *, padded_vocab_size: int) -> TaskModel:
        """Build the model with one output per class, or one for the score."""
        outputs = len(self.settings.labels) or 1
        return TaskModel(config, padded_vocab_size=padded_vocab_size, outputs=outputs, pooling=self.settings.pooling)

    def length(self, feature: TextFeature) -> int:
        return len(feature.encoded.ids)

    def collate(self, features: Sequence[TextFeature], *, ids: Sequence[int], epoch: int, seed: int) -> TaskBatch:
        """Pad token ids; `targets_B` has the class indices or scores."""
        return collate([f.encoded for f in features], self.vocabulary, targets_B=[f.target for f in features])

    def loss(self, engine: nn.Module, batch: TaskBatch) -> Tensor:
        """Return the summed cross entropy, or the summed squared error of the scores."""
        # In fp32: bf16 outputs have three digits, too few for the log-sum-exp and for differences of scores.
        outputs_BC, targets_B = engine(inputs=model_inputs(batch)).float(), batch.tensors["targets_B"]
        if self.settings.labels:
            return F.cross_entropy(outputs_BC, targets_B.long(), reduction="sum")
        return F.mse_loss(outputs_BC[:, 0], targets_B.float(), reduction="sum")

    def predict(self, engine: nn.Module, batch: TaskBatch) -> list[Any]:
        """Return the log probabilities of the classes, or the score, of each input."""
        outputs_BC = engine(inputs=model_inputs(batch)).float()
        return (outputs_BC.log_softmax(dim=-1) if self.settings.labels else outputs_BC[:, 0]).tolist()

    # ------------------------------------------------------------------------------------------------------ predictions

    def predictions(
        self, examples: Sequence[TextExample], features: Sequence[TextFeature], outputs: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """Return `text` (and `pair`), the `label` if known, and the `prediction`: a class or a score.

        A class has its `probability`, and `probabilities` has those of all classes.
        """
        return [
            {
                "id": example.id,
                **dict(zip(("text", "pair"), example.texts, strict=False)),
                **({} if example.label is None else {"label": example.label}),
                **self._prediction(output),
            }
            for example, output in zip(examples, outputs, strict=True)
        ]

    def _prediction(self, output: Any) -> dict[str, Any]:
        labels = self.settings.labels
        if not labels:
            return {"prediction": output}
        best = max(range(len(labels)), key=output.__getitem__)
        probabilities = [round(math.exp(value), 6) for value in output]
        return {
            "prediction": labels[best],
            "probability": probabilities[best],
            "probabilities": dict(zip(labels, probabilities, strict=True)),
        }

    def scores(self, examples: Sequence[TextExample], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        labels = [example.label for example in examples]
        predicted = [prediction["prediction"] for prediction in predictions]
        values = {name: METRICS[name](labels, predicted) for name in self.settings.metrics}
        if self.metric == "mean":
            values["mean"] = math.fsum(values[name] for name in self.settings.averaged) / len(self.settings.averaged)
        return values

    def mean_loss(self, features: Sequence[TextFeature], outputs: Sequence[Any]) -> float:
        """Return the mean cross entropy, or squared error."""
        pairs = list(zip(features, outputs, strict=True))
        if self.settings.labels:
            return -math.fsum(output[int(feature.target)] for feature, output in pairs) / len(pairs)
        return math.fsum((output - feature.target) ** 2 for feature, output in pairs) / len(pairs)


def _is_label(value: Any) -> bool:
    """Return True for a class name: a word or a finite number, not an empty cell."""
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, (int, float)) and math.isfinite(value)
