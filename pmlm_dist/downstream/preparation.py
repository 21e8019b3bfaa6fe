"""What fine-tuning and evaluation prepare alike: the model to start from, the splits of a task, the engine.

    checkpoint -> PretrainedModel;  rows -> Task -> Split (examples and features);  DeepSpeed's JSON -> EngineConfig

Every problem is a `ConfigError`, raised before anything is computed or written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from pmlm_dist.config import BatchConfig, ConfigError, ModelConfig, OptimConfig, divisors, raise_if_any
from pmlm_dist.conversion.pretrained import PretrainedModel, find_pretrained
from pmlm_dist.downstream.prediction import Split
from pmlm_dist.downstream.rows import read_rows
from pmlm_dist.downstream.settings import FinetuneConfig
from pmlm_dist.downstream.tasks.registry import TASKS
from pmlm_dist.downstream.tasks.task import Task
from pmlm_dist.engine.deepspeed_config import EngineConfig, load_engine_config
from pmlm_dist.engine.deepspeed_engine import initialize_engine
from pmlm_dist.parallel import seeding
from pmlm_dist.parallel.groups import Topology


@dataclass(frozen=True)
class FinetuneData:
    """What the fine-tunings of one command share."""

    config: FinetuneConfig
    topology: Topology
    start: PretrainedModel
    task: Task
    train: Split
    scored: tuple[Split, ...]
    """The validation splits; the first chooses the best checkpoint."""
    reported: tuple[Split, ...]
    digest: str
    """sha256 of the training rows."""


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
    raise_if_any([] if train.features else [f"{source}: the split {kind.train} holds nothing to train on"])
    scored = tuple(_split(task, name, read_rows(source, name)) for name in kind.validation)
    raise_if_any(task.metric_problems(scored[0].examples))
    reported = tuple(read_split(task, name, source) for name in config.report)
    return FinetuneData(config, topology, start, task, train, scored, reported, _digest(rows))


def read_split(task: Task, name: str, source: str) -> Split:
    """Read a split to predict; it is scored if its rows have labels."""
    rows = read_rows(source, name)
    return _split(task, name, rows, labelled=task.has_labels(rows))


def _split(task: Task, name: str, rows: Sequence[Any], *, training: bool = False, labelled: bool = True) -> Split:
    examples = task.read(rows, origin=f"split {name}", labeled=labelled)
    return Split(name, examples, task.features(examples, training=training), labelled)


def _digest(rows: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def engine_config_for_batch(
    path: Path, topology: Topology, *, batch: int | None, micro: int | None = None, zero: int | None = None
) -> EngineConfig:
    """Load DeepSpeed's JSON with the global batch `batch`, in the largest micro-batches that fit it and the file.

    `batch` None: one micro-batch of the file on each data-parallel rank. `micro`, `zero`: in place of the file's
    micro-batch, exactly, and ZeRO stage. Raises `ConfigError`.
    """
    has_accelerator, overrides = topology.device.type != "cpu", BatchConfig(micro=micro).overrides(zero=zero)
    stated = load_engine_config(path, has_accelerator=has_accelerator, overrides=overrides)
    batch = stated.micro_batch * topology.dp if batch is None else batch
    if batch % topology.dp:
        raise ConfigError(
            [f"recipe.batch ({batch}) must be a multiple of the data-parallel ranks ({topology.dp}): "
             f"use {topology.dp * -(-batch // topology.dp)}, or fewer ranks"]
        )  # fmt: skip
    usable = divisors(batch // topology.dp)
    if micro not in (None, *usable):
        raise ConfigError(
            [f"batch.micro ({micro}) must divide the {batch // topology.dp} examples of a rank: use one of {usable}"]
        )
    largest = max(size for size in usable if size <= stated.micro_batch)
    overrides = BatchConfig(batch, largest).overrides(zero=zero)
    return load_engine_config(path, has_accelerator=has_accelerator, overrides=overrides)


def task_model_config(model: ModelConfig, *, dropout: float | None) -> ModelConfig:
    """Return the settings of the pre-trained model with the attention backend that every device has."""
    model = dataclasses.replace(model, attention="fused", activation_checkpointing=False)
    if dropout is None:
        return model
    return dataclasses.replace(model, hidden_dropout=dropout, attention_dropout=dropout)


def build_task_engine(
    task: Task, model: ModelConfig, *, engine: EngineConfig, optim: OptimConfig, topology: Topology, seed: int
) -> DeepSpeedEngine:
    """Build the engine of a task's model, with weights drawn from `seed`; every rank calls."""
    assert model.vocab_size is not None
    seeding.seed_initialization(seed)
    padded = -(-model.vocab_size // 128) * 128
    return initialize_engine(
        task.build_model(model, padded_vocab_size=padded), optim=optim, config=engine, topology=topology
    )
