"""Predicting a whole split over all ranks: the same predictions and scores on any topology."""

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
    """Examples with what the network reads of them."""

    name: str
    examples: Sequence[Any]
    features: Sequence[Any]
    labelled: bool = True


@dataclass(frozen=True)
class Evaluation:
    """What a model says to a split, and how right it is; no scores where the split does not tell."""

    predictions: list[dict[str, Any]]
    scores: dict[str, float]


def evaluate(
    engine: DeepSpeedEngine,
    task: Task,
    split: Split,
    topology: Topology,
    *,
    micro_batch: int,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Predict `split` without dropout and score the predictions; every rank must call and gets the same.

    `between` is called before each batch, on every rank equally often.
    """
    was_training = engine.training
    engine.eval()
    outputs = _predict(engine, task, split, topology, micro_batch=micro_batch, between=between)
    engine.train(was_training)
    predictions = task.predictions(split.examples, split.features, outputs)
    return Evaluation(predictions, task.scores(split.examples, predictions) if split.labelled else {})


@torch.no_grad()
def _predict(
    engine: DeepSpeedEngine,
    task: Task,
    split: Split,
    topology: Topology,
    *,
    micro_batch: int,
    between: Callable[[], None],
) -> list[Any]:
    """One output a feature. Features are batched by length; every rank computes equally many batches."""
    features = split.features
    by_length = sorted(range(len(features)), key=lambda number: task.length(features[number]), reverse=True)
    own, found = by_length[topology.dp_rank :: topology.dp], {}
    for start in range(0, math.ceil(len(features) / topology.dp), micro_batch):
        between()
        ids = own[start : start + micro_batch] or by_length[-1:]  # what another rank predicts, rather than nothing
        batch = task.collate([features[number] for number in ids], ids=ids, epoch=0, seed=0)
        found.update(zip(ids, task.predict(engine, batch.to(topology.device)), strict=True))
    gathered = topology.all_gather_object(found)[:: topology.tp]  # tensor-parallel peers know the same
    everything = {number: output for part in reversed(gathered) for number, output in part.items()}
    return [everything[number] for number in range(len(features))]


def write_predictions(path: Path, predictions: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line. Raises `FileExistsError` rather than overwrite."""
    with path.open("x", encoding="utf-8") as out:
        for prediction in predictions:
            out.write(json.dumps(prediction, ensure_ascii=False) + "\n")


def predictions_file(folder: Path, split: str) -> Path:
    """Return the path of the predictions of `split`."""
    return folder / f"predictions-{split}.jsonl"


def score_line(name: str, scores: dict[str, float]) -> str:
    """Return a console line of the scores of split `name`."""
    return f"{name}: " + (", ".join(f"{m} {v:.4f}" for m, v in scores.items()) or "no labels, predictions only")
