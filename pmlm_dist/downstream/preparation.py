"""What fine-tuning and evaluation prepare alike: the model to start from, the splits of a task, the engine's settings.

    checkpoint -> PretrainedModel;  rows -> Task -> Split (examples and features);  DeepSpeed's JSON -> EngineConfig

Every problem is a `ConfigError`, raised before anything is computed or written.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmlm_dist.config import BatchConfig, ConfigError, ModelConfig, raise_if_any
from pmlm_dist.conversion.pretrained import PretrainedModel, find_pretrained
from pmlm_dist.downstream.prediction import Split
from pmlm_dist.downstream.results import digest_of
from pmlm_dist.downstream.rows import read_rows
from pmlm_dist.downstream.settings import FinetuneConfig
from pmlm_dist.downstream.tasks.registry import TASKS
from pmlm_dist.downstream.tasks.task import Row, Task
from pmlm_dist.engine.deepspeed_config import EngineConfig, load_engine_config
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.relations import divisors


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
    start = find_pretrained(config.model)
    source = config.data or kind.hub
    if source is None:
        raise ConfigError([f"--task {config.task} has no data of its own: name yours by --data"])
    rows = read_rows(source, "train")
    task = kind.make(config, rows, start.vocabulary, start.model)
    train = split_of(task, "train", rows, training=True)
    raise_if_any([] if train.features else [f"{source}: the split train holds nothing to train on"])
    scored = tuple(split_of(task, name, read_rows(source, name)) for name in kind.validation)
    raise_if_any(task.metric_problems(scored[0].examples))
    reported = tuple(read_split(task, name, source) for name in config.report)
    return FinetuneData(config, topology, start, task, train, scored, reported, digest_of(rows))


def read_split(task: Task, name: str, source: str) -> Split:
    """Read a split to predict; it is scored if its rows have labels."""
    rows = read_rows(source, name)
    return split_of(task, name, rows, labeled=task.has_labels(rows))


def split_of(
    task: Task, name: str, rows: Sequence[Row], *, training: bool = False, labeled: bool = True, origin: str = ""
) -> Split:
    """Return the examples and features of `rows`; `origin`: their name in messages. Raises `ConfigError`."""
    examples = task.read(rows, origin=origin or f"split {name}", labeled=labeled)
    return Split(name, examples, task.features(examples, training=training), labeled)


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
