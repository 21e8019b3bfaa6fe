"""Settings of `pmlm finetune` and `pmlm evaluate`, their presets and grids.

Batch size and learning rate belong to the recipe, because grids search over them; the other settings of the engine
(micro-batch, precision, ZeRO, clipping, offload) are in DeepSpeed's JSON. Standard library only.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pmlm_dist.config import (
    DS_CONFIGS,
    BatchConfig,
    ConfigError,
    OptimConfig,
    ParallelConfig,
    WatchdogConfig,
    raise_if_any,
)
from pmlm_dist.decoding.settings import DecodingConfig
from pmlm_dist.folder_lock import LOCK
from pmlm_dist.ranges import BelowOne, NotNegative, Positive, Probability, Range, range_problems

UNFINISHED = "UNFINISHED"
"""File in the folder of a fine-tuning that is not complete."""

PositiveFinite = Range("be positive and finite", lambda value: 0 < value < math.inf)
NotNegativeFinite = Range("be finite and not negative", lambda value: 0 <= value < math.inf)
AtLeastTwo = Range("be at least 2", lambda value: value >= 2)
AtLeastThree = Range("be at least 3", lambda value: value >= 3)


@dataclass(frozen=True)
class Recipe:
    """Optimization of a fine-tuning: AdamW, linear warm-up, linear decay to zero."""

    lr: Annotated[float, PositiveFinite] = 2e-5
    """Peak learning rate."""
    batch: Annotated[int, PositiveFinite] = 32
    """Examples of one optimizer step over all ranks; replaces `train_batch_size` of the DeepSpeed JSON.
    `--batch.global` has the same effect."""
    epochs: Annotated[int, PositiveFinite] = 10
    """Passes over the training examples."""
    warmup: Annotated[float, BelowOne] = 0.1
    """Share of the steps with rising learning rate."""
    weight_decay: Annotated[float, NotNegativeFinite] = 0.01
    """Decoupled weight decay; never on biases and LayerNorm."""
    dropout: Annotated[float | None, BelowOne] = 0.1
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
    """How examples of a task are read from rows."""

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
    Passages of spans are split into windows instead."""
    stride: Annotated[int, Positive] = 128
    """Spans: tokens from the start of a window to the start of the next."""
    max_question_tokens: Annotated[int, Positive] = 64
    """Spans: tokens of a question that are kept."""
    max_answer_tokens: Annotated[int, Positive] = 30
    """Spans: longest predicted answer, in tokens."""
    null_threshold: float = 0.0
    """Spans: a question is answered when its best span scores at least this much above [CLS], "no answer"."""


@dataclass(frozen=True)
class GenerationConfig:
    """Sources, targets and decoding of `--task seq2seq`."""

    max_source: Annotated[int, AtLeastThree] = 464
    """Tokens of a source with [CLS] and [SEP]; longer ones are truncated at the end."""
    max_target: Annotated[int, AtLeastTwo] = 48
    """Tokens of a target with its [SEP]; longer ones are truncated at the end."""
    target_mask_prob: Annotated[float, Probability] = 0.5
    """Probability that a target token is replaced by the id drawn for its pseudo mask (against exposure bias)."""
    label_smoothing: Annotated[float, Probability] = 0.1
    """Share of the target probability spread uniformly over the vocabulary."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)


GENERATION: dict[str, GenerationConfig] = {
    "cnn_dm": GenerationConfig(608, 160, decoding=DecodingConfig(beam=5, length_penalty=0.7, max_length=160)),
    "xsum": GenerationConfig(720, 48, decoding=DecodingConfig(beam=5, length_penalty=0.6, max_length=48)),
    "qg": GenerationConfig(464, 48, decoding=DecodingConfig(beam=8, length_penalty=1.3, max_length=48)),
    "demo_summary": GenerationConfig(
        44, 20, decoding=DecodingConfig(beam=4, length_penalty=0.7, max_length=20, min_length=3)
    ),
}
"""Lengths and decoding of a preset: the paper's data sets, and the demo."""


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning."""

    task: str
    """Name of the task; `pmlm finetune --task list` lists all."""
    model: Path
    """Pre-trained model: a run's folder, one of its checkpoints, or the output of `pmlm import`."""
    output: Path
    """Folder to write, which must not exist yet: best checkpoint, vocabulary, scores, predictions. An incomplete
    fine-tuning in it is resumed."""
    data: str | None = None
    """Folder with train, validation and test files (.jsonl, .csv, .tsv; .json for SQuAD), a folder that Hugging Face
    `datasets` saved, or the name of a data set, NAME or NAME:CONFIG. None: the task's own on the Hugging Face hub."""
    untrained: bool = False
    """Draw the weights from the seed instead of loading the model's: a baseline of the same shape and vocabulary."""
    pooling: Literal["mean", "cls"] = "mean"
    """Vector of a text for classification and regression: the mean of its tokens' states, or the state of [CLS]."""
    ds_config: Path = DS_CONFIGS / "finetune.json"
    """DeepSpeed's JSON: micro-batch, precision, ZeRO, clipping, offload."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    zero: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage. None: from DeepSpeed's JSON."""
    seed: Annotated[int, NotNegative] = 0
    """Seed of the head's weights, the order of the examples and dropout."""
    seeds: Annotated[int, Positive] = 1
    """Number of seeds, from `seed` on; mean and deviation are reported."""
    grid: tuple[str, ...] = ()
    """Settings of the recipe to search over, `lr=1e-5,3e-5 batch=16,32`, or `preset` for the preset's own grid."""
    report: tuple[str, ...] = ()
    """Further splits on which the best checkpoint is scored, `test` for example."""
    evaluate_every: Annotated[int | None, Positive] = None
    """Steps between evaluations. None: after every epoch."""
    log_every: Annotated[int, Positive] = 50
    """Steps between console lines."""
    recipe: Recipe = field(default_factory=Recipe)
    inputs: InputConfig = field(default_factory=InputConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    preset: str = "glue"
    """Where the recipe's defaults come from: glue, squad, demo; cnn_dm, xsum, qg, demo_summary for seq2seq."""
    max_skipped_steps: Annotated[int, Positive] = 20
    """Number of consecutive steps with a gradient that is not finite, after which the run ends."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    grace_s: Annotated[float, Positive] = 120.0
    """Seconds from a stop signal (SIGTERM, SIGUSR1) until the process exits; a save that takes longer is aborted."""
    collective_timeout_s: Annotated[int, Positive] = 600
    """Timeout of a collective in seconds; it ends the run."""


@dataclass(frozen=True)
class InferenceConfig:
    """What `pmlm evaluate` and `pmlm predict` have in common."""

    model: Path
    """Output of `pmlm finetune`, or one of its checkpoints."""
    batch: Annotated[int, Positive] = 32
    """Inputs of a forward pass on a rank."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Data type of weights and activations. None: that of the fine-tuning."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    collective_timeout_s: Annotated[int, Positive] = 600
    """Timeout of a collective in seconds; it ends the command."""


@dataclass(frozen=True)
class EvaluateConfig(InferenceConfig):
    """One evaluation of a fine-tuned model."""

    data: str | None = None
    """As for `pmlm finetune`. None: the data the model was fine-tuned on."""
    split: tuple[str, ...] = ()
    """Splits to evaluate. None: the task's validation splits."""
    predictions: Path | None = None
    """Folder for predictions-SPLIT.jsonl, which must not exist in it yet."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(InferenceConfig):
    """Predictions of a fine-tuned model for new inputs."""

    input: Path
    """Inputs without labels: .jsonl, .csv or .tsv with the columns of the fine-tuning's data, or SQuAD's .json."""
    output: Path | None = None
    """JSONL file to write, which must not exist yet. None: standard output."""


def problems(config: FinetuneConfig) -> list[str]:
    """Return everything that is wrong with `config` by itself, one sentence a problem."""
    found = range_problems(config)
    if config.output.exists() and not is_finetune_unfinished(config.output):
        found.append(f"--output ({config.output}) exists already, and nothing is overwritten: name another")
    return found


def is_finetune_unfinished(output: Path) -> bool:
    """Return True if `output` holds an incomplete fine-tuning, or only the lock of one."""
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    return UNFINISHED in names or bool(names and all(name.startswith(LOCK) for name in names))


def recipes(config: FinetuneConfig) -> list[Recipe]:
    """Return the recipes to try: one, or all combinations of the grid. Raises `ConfigError` for an empty grid."""
    grid: dict[str, tuple[float, ...]] = {}
    for entry in config.grid:
        grid |= GRIDS.get(config.preset, {}) if entry == "preset" else dict([_axis(entry)])
    if config.grid and not grid:
        raise ConfigError([f"--grid: the preset {config.preset} has no grid: name one, lr=1e-5,3e-5 for example"])
    if "batch" in grid and config.batch.global_:
        raise ConfigError([f"batch.global ({config.batch.global_}) contradicts the batches of --grid: leave one out"])
    names, recipe = list(grid), config.recipe
    if config.batch.global_:
        recipe = dataclasses.replace(recipe, batch=config.batch.global_)
    axes = (dict.fromkeys(values) for values in grid.values())  # a value named twice counts once
    return [dataclasses.replace(recipe, **dict(zip(names, v, strict=True))) for v in itertools.product(*axes)]


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
    """Return the optimizer's settings for `steps` steps; Adam's are those of BERT's fine-tuning."""
    warmup = min(steps - 1, round(recipe.warmup * steps))
    return OptimConfig(recipe.lr, warmup, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=recipe.weight_decay)


def check(config: FinetuneConfig) -> None:
    """Raise `ConfigError` for settings that are wrong by themselves."""
    raise_if_any(problems(config))
    for recipe in recipes(config):
        raise_if_any(problems(dataclasses.replace(config, recipe=recipe)))
