"""Classes and scores of one text or a pair: the head reads [CLS].

A class is a string: labels of any type are compared as `str`. The classes are those of the training split, sorted, or
the ones a task is known to have; a score is a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pmlm_dist.config import ConfigError, ModelConfig
from pmlm_dist.downstream.settings import FinetuneConfig
from pmlm_dist.downstream.tasks import scores
from pmlm_dist.downstream.tasks.inputs import (
    Encoded,
    collate,
    column,
    fit,
    id_of,
    join,
    longest_input,
    network_inputs,
    raise_row_problems,
    text_of,
)
from pmlm_dist.downstream.tasks.task import Row, Task, TaskBatch
from pmlm_dist.model.task_model import TaskModel
from pmlm_dist.vocab import Vocabulary

MAX_TOKENS = 128

Metric = Callable[[Sequence[Any], Sequence[Any]], float]
METRICS: dict[str, Metric] = {
    "accuracy": scores.accuracy,
    "f1": scores.f1_of("1"),
    "macro_f1": scores.macro_f1,
    "matthews": scores.matthews,
    "pearson": scores.pearson,
    "spearman": scores.spearman,
    "rmse": scores.root_mean_square_error,
}


@dataclass(frozen=True)
class Shape:
    """What a task of this family is, before any data are seen."""

    text: tuple[str, ...] = ("text", "sentence")
    """What the column of the text may be called."""
    pair: tuple[str, ...] = ("pair",)
    """What the column of the second text may be called."""
    label: tuple[str, ...] = ("label",)
    """What the column of the class or score may be called."""
    pairs: bool | None = None
    """Whether there is a second text; None: if its column is there."""
    labels: tuple[str, ...] = ()
    """The classes; empty: those of the training split, or a score."""
    names: dict[str, str] = field(default_factory=dict)
    """Other names of classes that data may use."""
    is_score: bool = False
    metrics: tuple[str, ...] = ("accuracy", "macro_f1")
    """What is measured. The best checkpoint is chosen by the first, or by the mean of those in `chosen_by`."""
    chosen_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What is saved of a task with its model."""

    text: str
    pair: str | None
    label: str
    labels: tuple[str, ...]
    """The classes in the order of the head's outputs; empty for a score."""
    names: dict[str, str]
    metrics: tuple[str, ...]
    chosen_by: tuple[str, ...]
    max_tokens: int
    too_long: str


@dataclass(frozen=True)
class TextExample:
    """One row, checked."""

    id: Any
    texts: tuple[str, ...]
    label: str | float | None
    """A class, a score, or None where it is not told."""
    where: str


@dataclass(frozen=True)
class TextFeature:
    """What the network reads, and the number of the class or the score."""

    encoded: Encoded
    target: float


class Classification(Task[TextExample, TextFeature]):
    """A class of a text or pair, or, without classes, a score."""

    def __init__(self, settings: Settings, vocabulary: Vocabulary):
        self.settings, self.vocabulary = settings, vocabulary
        self.metric = "mean" if len(settings.chosen_by) > 1 else settings.metrics[0]
        self._cut = 0

    @classmethod
    def make(
        cls, shape: Shape, config: FinetuneConfig, rows: Sequence[Row], vocabulary: Vocabulary, model: ModelConfig
    ) -> Classification:
        """The task of `shape` for the training `rows`. Raises `ConfigError`."""
        inputs, origin = config.inputs, f"--task {config.task}"
        text = column(rows, inputs.text, shape.text, what="text", origin=origin)
        pair = None
        if shape.pairs or inputs.pair or (shape.pairs is None and any(name in rows[0] for name in shape.pair)):
            pair = column(rows, inputs.pair, shape.pair, what="pair", origin=origin)
        label = column(rows, inputs.label, shape.label, what="label", origin=origin)
        labels = shape.labels
        if not shape.is_score and not labels:
            labels = tuple(sorted({str(row[label]) for row in rows if _is_label(row.get(label))}))
        if len(labels) == 1:
            raise ConfigError([f"{origin}: every training example is of the class {labels[0]!r}: two are needed"])
        settings = Settings(
            text=text,
            pair=pair,
            label=label,
            labels=labels,
            names=dict(shape.names),
            metrics=shape.metrics,
            chosen_by=shape.chosen_by,
            max_tokens=longest_input(inputs.max_tokens, default=MAX_TOKENS, model=model),
            too_long=inputs.too_long,
        )
        return cls(settings, vocabulary)

    @classmethod
    def restore(cls, saved: dict[str, Any], vocabulary: Vocabulary) -> Classification:
        """The task that `saved` was called of."""
        lists = ("labels", "metrics", "chosen_by")
        return cls(Settings(**{**saved, **{name: tuple(saved[name]) for name in lists}}), vocabulary)

    def saved(self) -> dict[str, Any]:
        """The settings."""
        return asdict(self.settings)

    # -------------------------------------------------------------------------------------------------------- examples

    def has_labels(self, rows: Sequence[Row]) -> bool:
        """Whether rows have a label: those of a hidden test set have none, or -1 throughout."""
        return not {str(row.get(self.settings.label)) for row in rows} <= {"None", "-1", "-1.0", ""}

    def read(self, rows: Sequence[Row], *, origin: str, labelled: bool = True) -> list[TextExample]:
        """Check texts and labels of all rows."""
        settings, problems, examples = self.settings, [], []
        wanted = [settings.text, *([settings.pair] if settings.pair else []), *([settings.label] if labelled else [])]
        missing = [name for name in wanted if name not in rows[0]]
        if missing:
            raise ConfigError([f"{origin}: no column {name}, there are {', '.join(rows[0])}" for name in missing])
        for number, row in enumerate(rows, start=1):
            where = f"{origin}, row {number}"
            names = [settings.text, *([settings.pair] if settings.pair else [])]
            texts = tuple(text_of(row, name, where=where, problems=problems) for name in names)
            label = self._label(row.get(settings.label), where=where, problems=problems) if labelled else None
            examples.append(TextExample(id_of(row, number - 1), texts, label, where))
        raise_row_problems(problems)
        return examples

    def _label(self, value: Any, *, where: str, problems: list[str]) -> str | float | None:
        settings = self.settings
        if not settings.labels:
            try:
                score = float(value)
            except (TypeError, ValueError):
                score = math.nan
            if not math.isfinite(score):
                problems.append(f"{where}: the score in column {settings.label} ({value!r}) is not a finite number")
            return score
        label = settings.names.get(str(value), str(value))
        if not _is_label(value):
            problems.append(f"{where}: {value!r} in column {settings.label} is no label")
        elif label not in settings.labels:
            problems.append(
                f"{where}: the label {value!r} in column {settings.label} was not in training, which had "
                f"{', '.join(settings.labels)}"
            )
        return label

    def features(self, examples: Sequence[TextExample], *, training: bool) -> list[TextFeature]:
        """Token ids, cut or refused where too long."""
        by_place = [self.vocabulary.encode_batch([e.texts[i] for e in examples]) for i in range(self._num_texts)]
        room, problems, found = self.settings.max_tokens - 1 - self._num_texts, [], []
        for example, parts in zip(examples, zip(*by_place, strict=True), strict=True):
            if sum(map(len, parts)) > room:
                self._cut += 1
                if self.settings.too_long == "refuse":
                    problems.append(
                        f"{example.where}: {sum(map(len, parts)) + 1 + len(parts)} tokens, at most "
                        f"{self.settings.max_tokens} (inputs.max_tokens) are allowed with --inputs.too-long refuse"
                    )
            found.append(TextFeature(join(fit(parts, room=room), self.vocabulary), self._target(example)))
        raise_row_problems(problems)
        return found

    @property
    def _num_texts(self) -> int:
        return 2 if self.settings.pair else 1

    def _target(self, example: TextExample) -> float:
        if example.label is None:
            return 0.0
        return float(self.settings.labels.index(str(example.label))) if self.settings.labels else float(example.label)

    def problems_of_choosing(self, examples: Sequence[TextExample]) -> list[str]:
        """A correlation needs scores that differ."""
        if self.settings.labels or len({example.label for example in examples}) > 1:
            return []
        metric, score = self.settings.metrics[0], examples[0].label
        return [f"all scores of the validation split are {score}: {metric} is no number then, name at least two scores"]

    def notes(self) -> list[str]:
        """How many inputs were cut."""
        if not self._cut:
            return []
        return [
            f"{self._cut:,} inputs were longer than {self.settings.max_tokens} tokens; their longer text lost its end"
        ]

    # --------------------------------------------------------------------------------------------------------- network

    def build_model(self, config: ModelConfig, *, padded_vocab_size: int) -> TaskModel:
        """An output for each class, or one for the score."""
        outputs = len(self.settings.labels) or 1
        return TaskModel(config, padded_vocab_size=padded_vocab_size, outputs=outputs, pooling="cls")

    def length(self, feature: TextFeature) -> int:
        """Tokens."""
        return len(feature.encoded.ids)

    def collate(self, features: Sequence[TextFeature], *, ids: Sequence[int], epoch: int, seed: int) -> TaskBatch:
        """Padded token ids with `targets_B`."""
        return collate([f.encoded for f in features], self.vocabulary, targets_B=[f.target for f in features])

    def loss(self, engine: nn.Module, batch: TaskBatch) -> Tensor:
        """Cross entropy, or squared error of the score, summed."""
        outputs_BC, targets_B = engine(inputs=network_inputs(batch)).float(), batch.tensors["targets_B"]
        if self.settings.labels:
            return F.cross_entropy(outputs_BC, targets_B.long(), reduction="sum")
        return F.mse_loss(outputs_BC[:, 0], targets_B.float(), reduction="sum")

    def predict(self, engine: nn.Module, batch: TaskBatch) -> list[Any]:
        """Probabilities of the classes, or the score."""
        outputs_BC = engine(inputs=network_inputs(batch)).float()
        return (outputs_BC.softmax(dim=-1) if self.settings.labels else outputs_BC[:, 0]).tolist()

    # ------------------------------------------------------------------------------------------------------ predictions

    def predictions(
        self, examples: Sequence[TextExample], features: Sequence[TextFeature], outputs: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """`label` and its `probability`, or `score`."""
        labels = self.settings.labels
        found = []
        for example, output in zip(examples, outputs, strict=True):
            if labels:
                best = max(range(len(labels)), key=output.__getitem__)
                found.append({"id": example.id, "label": labels[best], "probability": round(output[best], 6)})
            else:
                found.append({"id": example.id, "score": output})
        return found

    def scores(self, examples: Sequence[TextExample], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The task's metrics."""
        right = [example.label for example in examples]
        predicted = [prediction["label" if self.settings.labels else "score"] for prediction in predictions]
        found = {name: METRICS[name](right, predicted) for name in self.settings.metrics}
        if self.metric == "mean":
            found["mean"] = math.fsum(found[name] for name in self.settings.chosen_by) / len(self.settings.chosen_by)
        return found


def _is_label(value: Any) -> bool:
    """Whether `value` can name a class: a word or a number, not an empty cell."""
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, (int, float)) and math.isfinite(value)
