"""Evaluation of a split over all ranks, with equal predictions and scores on any topology.

features --sorted by length, sharded over data-parallel ranks--> batches --task.predict--> outputs
outputs of all ranks --all-gather--> task.predictions --> task.scores
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

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


def evaluate(
    engine: DeepSpeedEngine,
    task: Task,
    split: Split,
    topology: Topology,
    *,
    micro_batch: int,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Predict `split` without dropout and score the predictions. Collective: all ranks get equal results.

    `before_batch` is called before each batch, equally often on all ranks.
    """
    was_training = engine.training
    engine.eval()
    outputs = _predict(engine, task, split, topology, micro_batch=micro_batch, before_batch=before_batch)
    engine.train(was_training)
    predictions = task.predictions(split.examples, split.features, outputs)
    return Evaluation(predictions, task.scores(split.examples, predictions) if split.labeled else {})


@torch.no_grad()
def _predict(
    engine: DeepSpeedEngine,
    task: Task,
    split: Split,
    topology: Topology,
    *,
    micro_batch: int,
    before_batch: Callable[[], None],
) -> list[Any]:
    """Return one output per feature. All ranks compute equally many batches."""
    features = split.features
    # Longest first: little padding, and an out-of-memory error comes with the first batch.
    by_length = sorted(range(len(features)), key=lambda number: task.length(features[number]), reverse=True)
    own, outputs = by_length[topology.dp_rank :: topology.dp], {}
    for start in range(0, math.ceil(len(features) / topology.dp), micro_batch):
        before_batch()
        ids = own[start : start + micro_batch] or by_length[-1:]  # `predict` is collective: repeat the shortest
        batch = task.collate([features[number] for number in ids], ids=ids, epoch=0, seed=0)
        outputs.update(zip(ids, task.predict(engine, batch.to(topology.device)), strict=True))
    per_rank = topology.all_gather_object(outputs)[:: topology.tp]  # tensor-parallel ranks have equal outputs
    # Reversed: for a repeated feature, the output of the lowest rank wins.
    merged = {number: output for part in reversed(per_rank) for number, output in part.items()}
    return [merged[number] for number in range(len(features))]


def write_predictions(path: Path, predictions: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object per line. Raises `FileExistsError` if `path` exists."""
    with path.open("x", encoding="utf-8") as out:
        for prediction in predictions:
            out.write(json.dumps(prediction, ensure_ascii=False) + "\n")


def predictions_file(folder: Path, split: str) -> Path:
    """Return the path of the predictions of `split`."""
    return folder / f"predictions-{split}.jsonl"


def score_line(name: str, scores: dict[str, float]) -> str:
    """Return a console line of the scores of split `name`."""
    return f"{name}: " + (", ".join(f"{m} {v:.4f}" for m, v in scores.items()) or "no labels, predictions only")
