"""The settings of `pmlm finetune` and `pmlm evaluate`; their presets and what a grid is made of.

Batch size and learning rate belong to the recipe here, because they are searched over; everything else of the engine
(micro-batch, precision, ZeRO, clipping, offload) stays in DeepSpeed's JSON. Standard library only.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pmlm_dist.config import ConfigError, OptimConfig, ParallelConfig, WatchdogConfig, raise_if_any
from pmlm_dist.decoding.settings import DecodingConfig
from pmlm_dist.supervision.run_lock import LOCK

UNFINISHED = "UNFINISHED"
"""A file in the folder of a fine-tuning that has not come to its end."""


@dataclass(frozen=True)
class Recipe:
    """How a task is learned. Linear warm-up, linear decay to zero, AdamW."""

    lr: float = 2e-5
    """Peak learning rate."""
    batch: int = 32
    """Examples of one optimizer step over all ranks, whatever `train_batch_size` the DeepSpeed JSON names."""
    epochs: int = 10
    """How often every training example is read."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.01
    """Decoupled weight decay; never on biases and LayerNorm."""
    dropout: float | None = 0.1
    """Dropout of hidden states, attention probabilities and the task's head. None: as in pre-training."""


GLUE_GRID: dict[str, tuple[float, ...]] = {
    "batch": (16, 32),
    "lr": (5e-6, 1e-5, 1.5e-5, 2e-5, 3e-5),
    "warmup": (0.1, 0.2),
    "weight_decay": (0.01, 0.1),
    "epochs": (10, 15),
}
"""The paper's grid for GLUE: 80 runs."""

RECIPES: dict[str, Recipe] = {
    "glue": Recipe(),
    "squad": Recipe(epochs=4),
    "demo": Recipe(lr=3e-4, epochs=4, dropout=None),
    "cnn_dm": Recipe(lr=7e-5, batch=64, epochs=14, warmup=0.02),
    "xsum": Recipe(lr=7e-5, batch=64, epochs=14, warmup=0.02),
    "qg": Recipe(lr=2e-5, batch=48, epochs=16, warmup=0.1),
    "demo_summary": Recipe(lr=1e-3, batch=32, epochs=3, warmup=0.1, dropout=None),
}
"""glue: from the paper's grid; squad: the paper's; demo: for the tiny model, whose learning rates are larger."""

GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "glue": GLUE_GRID,
    "demo": {"lr": (1e-4, 3e-4, 1e-3)},
    "demo_summary": {"lr": (3e-4, 1e-3, 3e-3)},
}
"""What `--grid preset` searches; the other presets have one recipe, the paper's."""


@dataclass(frozen=True)
class InputConfig:
    """How the examples of a task are read from rows."""

    text: str | None = None
    """Column of the text (spans: of the question). None: what the task's data set calls it, else `text`."""
    pair: str | None = None
    """Column of the second text (spans: of the passage). None: what the data set calls it, else `pair`, if there is."""
    label: str | None = None
    """Column of the class, the score, or the answers. None: what the data set calls it, else `label`."""
    max_tokens: int | None = None
    """Tokens of an input with [CLS] and [SEP]s. None: 128, for spans 384; never more than the model has positions."""
    too_long: Literal["truncate", "raise"] = "truncate"
    """`truncate`: the longer text loses tokens at its end until the input fits; `raise`: such an example is an error.
    Passages of spans are cut into windows instead."""
    stride: int = 128
    """Spans: tokens from the start of a window to the start of the next."""
    max_question_tokens: int = 64
    """Spans: tokens of a question that are kept."""
    max_answer_tokens: int = 30
    """Spans: the longest answer that is predicted."""
    null_threshold: float = 0.0
    """Spans: a question is answered when its best span scores at least this much above [CLS], "no answer"."""


@dataclass(frozen=True)
class GenerationConfig:
    """Sources, targets and answers of `--task seq2seq`."""

    max_source: int = 464
    """Tokens of a source with [CLS] and [SEP]; more are cut off at the end."""
    max_target: int = 48
    """Tokens of a target with its [SEP]; more are cut off at the end."""
    target_mask_prob: float = 0.5
    """Probability that a token of the target is shown as what was drawn for its pseudo mask."""
    label_smoothing: float = 0.1
    """Share of the wanted probability that is spread over the whole vocabulary."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)


GENERATION: dict[str, GenerationConfig] = {
    "cnn_dm": GenerationConfig(608, 160, decoding=DecodingConfig(beam=5, length_penalty=0.7, max_length=160)),
    "xsum": GenerationConfig(720, 48, decoding=DecodingConfig(beam=5, length_penalty=0.6, max_length=48)),
    "qg": GenerationConfig(464, 48, decoding=DecodingConfig(beam=8, length_penalty=1.3, max_length=48)),
    "demo_summary": GenerationConfig(
        96, 20, decoding=DecodingConfig(beam=4, length_penalty=0.7, max_length=20, min_length=3)
    ),
}
"""Lengths and decoding of a preset: the paper's data sets, and the demo."""


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning."""

    task: str
    """What is learned: `pmlm finetune --task list` shows all."""
    model: Path
    """The model to start from: a run's folder, one of its checkpoints, or what `pmlm import` wrote."""
    output: Path
    """Folder to write, which must not be there yet: best checkpoint, vocabulary, scores, predictions. A fine-tuning
    that did not come to its end there goes on."""
    data: str | None = None
    """Folder with train, validation and test files (.jsonl, .csv, .tsv; .json for SQuAD), a folder that Hugging Face
    `datasets` saved, or the name of a data set, NAME or NAME:CONFIG. None: the task's own on the Hugging Face hub."""
    untrained: bool = False
    """Draw the weights anew instead of taking the model's: a baseline of the same shape and vocabulary."""
    vocabulary: Path | None = None
    """Where the model's vocabulary lies. None: beside imported weights, else in the corpus of its run."""
    ds_config: Path = Path("ds_configs/finetune.json")
    """DeepSpeed's JSON: micro-batch, precision, ZeRO, clipping, offload."""
    seed: int = 0
    """Seed of the head's weights, the order of the examples and dropout."""
    seeds: int = 1
    """Repeat with this many seeds, from `seed` on, and give mean and deviation."""
    grid: tuple[str, ...] = ()
    """Settings of the recipe to search over, `lr=1e-5,3e-5 batch=16,32`, or `preset` for the preset's own grid."""
    report: tuple[str, ...] = ()
    """Further splits on which the best checkpoint is scored, `test` for example."""
    evaluate_every: int | None = None
    """Steps between evaluations. None: after every epoch."""
    log_every: int = 50
    """Steps between console lines."""
    recipe: Recipe = field(default_factory=Recipe)
    inputs: InputConfig = field(default_factory=InputConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    preset: str = "glue"
    """Where the recipe's defaults come from: glue, squad, demo; cnn_dm, xsum, qg, demo_summary for seq2seq."""
    max_skipped_steps: int = 20
    """Steps in a row whose gradient is not finite, after which the run ends."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    grace_s: float = 120.0
    """Seconds from a signal to stop (SIGTERM, SIGUSR1) until the process must be gone, its checkpoint saved."""
    collective_timeout_s: int = 600
    """Seconds after which a collective without an answer ends the run."""


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation of a fine-tuned model."""

    model: Path
    """What `pmlm finetune` wrote, or one of its checkpoints."""
    data: str | None = None
    """As for `pmlm finetune`. None: the data the model was fine-tuned on."""
    split: tuple[str, ...] = ()
    """Splits to evaluate. None: the task's validation splits."""
    predictions: Path | None = None
    """Folder for predictions-SPLIT.jsonl, which must not hold such files yet."""
    vocabulary: Path | None = None
    """Where the model's vocabulary lies. None: in its folder."""
    ds_config: Path = Path("ds_configs/finetune.json")
    """DeepSpeed's JSON: micro-batch, precision, ZeRO."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    collective_timeout_s: int = 600
    """Seconds after which a collective without an answer ends the run."""


def problems(config: FinetuneConfig) -> list[str]:
    """Everything that is wrong with `config` by itself, one sentence a problem."""
    found = _recipe_problems(config.recipe)
    if config.seed < 0:
        found.append(f"seed ({config.seed}) must not be negative")
    for name in ("seeds", "log_every", "max_skipped_steps", "collective_timeout_s"):
        if getattr(config, name) < 1:
            found.append(f"{name} ({getattr(config, name)}) must be positive")
    if config.evaluate_every is not None and config.evaluate_every < 1:
        found.append(f"evaluate_every ({config.evaluate_every}) must be positive, or None")
    for limit in dataclasses.fields(config.watchdog):
        if not getattr(config.watchdog, limit.name) > 0:
            found.append(f"watchdog.{limit.name} ({getattr(config.watchdog, limit.name)}) must be positive")
    for name in ("stride", "max_question_tokens", "max_answer_tokens"):
        if getattr(config.inputs, name) < 1:
            found.append(f"inputs.{name} ({getattr(config.inputs, name)}) must be positive")
    if not config.grace_s > 0:
        found.append(f"grace_s ({config.grace_s}) must be positive")
    if config.output.exists() and not is_finetune_unfinished(config.output):
        found.append(f"--output ({config.output}) is there already, and nothing is overwritten: name another")
    return found


def _recipe_problems(recipe: Recipe) -> list[str]:
    found = [
        f"recipe.{n} ({getattr(recipe, n)}) must be positive and finite"
        for n in ("lr", "batch", "epochs")
        if not 0 < getattr(recipe, n) < math.inf
    ]
    if not 0.0 <= recipe.warmup < 1.0:
        found.append(f"recipe.warmup ({recipe.warmup}) is a share of the steps: use at least 0 and less than 1")
    if not 0 <= recipe.weight_decay < math.inf:
        found.append(f"recipe.weight_decay ({recipe.weight_decay}) must be finite and not negative")
    if recipe.dropout is not None and not 0.0 <= recipe.dropout < 1.0:
        found.append(f"recipe.dropout ({recipe.dropout}) must be at least 0 and below 1, or None")
    return found


def is_finetune_unfinished(output: Path) -> bool:
    """Whether a fine-tuning was started in `output` that did not come to its end; it may not even have begun."""
    return output.is_dir() and ((output / UNFINISHED).is_file() or [path.name for path in output.iterdir()] == [LOCK])


def recipes(config: FinetuneConfig) -> list[Recipe]:
    """The recipes to try: one, or every combination of the grid. Raises `ConfigError` for a grid that has none."""
    grid: dict[str, tuple[float, ...]] = {}
    for entry in config.grid:
        grid |= GRIDS.get(config.preset, {}) if entry == "preset" else dict([_axis(entry)])
    if config.grid and not grid:
        raise ConfigError([f"--grid: the preset {config.preset} has no grid: name one, lr=1e-5,3e-5 for example"])
    names = list(grid)
    axes = (dict.fromkeys(values) for values in grid.values())  # a value named twice is one run, not two of a mean
    return [dataclasses.replace(config.recipe, **dict(zip(names, v, strict=True))) for v in itertools.product(*axes)]


def _axis(entry: str) -> tuple[str, tuple[Any, ...]]:
    kinds = {"lr": float, "batch": int, "epochs": int, "warmup": float, "weight_decay": float, "dropout": float}
    name, equals, values = entry.partition("=")
    name = name.replace("-", "_")
    try:
        return name, tuple(kinds[name](value) for value in values.split(",") if equals)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            [f"--grid ({entry}) is not NAME=VALUE,VALUE with a name of {', '.join(kinds)}, nor `preset`"]
        ) from error


def optim_config(recipe: Recipe, *, steps: int) -> OptimConfig:
    """The optimizer's settings of a fine-tuning of `steps` steps; Adam's as in BERT's fine-tuning."""
    warmup = min(steps - 1, round(recipe.warmup * steps))
    return OptimConfig(recipe.lr, warmup, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=recipe.weight_decay)


def check(config: FinetuneConfig) -> None:
    """Refuse settings that are wrong by themselves."""
    raise_if_any(problems(config))
    for recipe in recipes(config):
        raise_if_any(problems(dataclasses.replace(config, recipe=recipe)))
