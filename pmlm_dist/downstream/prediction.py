"""Evaluation of a split over all ranks, with equal predictions and scores on any topology.

features --sorted by length, in batches--> task.predict on the data-parallel ranks in turn --> outputs (results.py)
outputs of all features --> task.predictions --> task.scores
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pmlm_dist.decoding.batch_generation import batches_by_length
from pmlm_dist.downstream.results import ResultsFile, compute_batches
from pmlm_dist.downstream.tasks.task import Task
from pmlm_dist.parallel.groups import Topology


@dataclass(frozen=True)
class Split:
    """Examples with their features."""

    name: str
    examples: Sequence[Any]
    features: Sequence[Any]
    labeled: bool = True


@dataclass(frozen=True)
class Evaluation:
    """Predictions and scores of a split; no scores if it is unlabeled."""

    predictions: list[dict[str, Any]]
    scores: dict[str, float]
    loss: float = math.nan
    """Mean loss of a labeled split."""
    signatures: dict[str, str] = field(default_factory=dict)
    """How metrics were computed that have variants."""


def batches_of(task: Task, split: Split, *, batch: int) -> list[list[int]]:
    """Return the numbers of the features in batches, longest first."""
    return list(batches_by_length([task.length(feature) for feature in split.features], batch=batch))


def evaluate(
    model: nn.Module,
    task: Task,
    split: Split,
    topology: Topology,
    *,
    batch: int,
    file: ResultsFile | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Predict `split` without dropout and score the predictions. Collective: all ranks get equal results.

    `model`: an engine or a module. `file` (rank 0): keeps the outputs. `before_batch` is called before each batch,
    equally often on all ranks.
    """

    @torch.no_grad()
    def predict(ids: Sequence[int]) -> list[Any]:
        inputs = task.collate([split.features[number] for number in ids], ids=ids, epoch=0, seed=0)
        return task.predict(model, inputs.to(topology.device))

    was_training = model.training
    model.eval()
    batches = batches_of(task, split, batch=batch)
    outputs = compute_batches(batches, predict, topology, file=file, before_batch=before_batch)
    model.train(was_training)
    predictions = task.predictions(split.examples, split.features, outputs)
    if not split.labeled:
        return Evaluation(predictions, {})
    scores, loss = task.scores(split.examples, predictions), task.mean_loss(split.features, outputs)
    return Evaluation(predictions, scores, loss, task.signatures(split.examples))


def batch_for(split: Split, topology: Topology, *, largest: int) -> int:
    """Return the batch with which all data-parallel ranks have work, at most `largest`."""
    return max(1, min(largest, math.ceil(len(split.features) / topology.dp)))


def predictions_file(folder: Path, split: str) -> Path:
    """Return the path of the predictions of `split`."""
    return folder / f"predictions-{split}.jsonl"


def score_line(name: str, evaluation: Evaluation, *, signed: bool = True) -> str:
    """Return a console line of the scores of split `name`; `signed`: with the signatures."""
    if not evaluation.scores:
        return f"{name}: no labels, predictions only"
    has_nll = "nll" in evaluation.scores  # the loss of generation by its usual name
    values = evaluation.scores | ({} if has_nll else {"loss": evaluation.loss})
    scores = ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
    how = "".join(f" ({metric}: {signature})" for metric, signature in evaluation.signatures.items())
    return f"{name}: {scores}{how if signed else ''}"
