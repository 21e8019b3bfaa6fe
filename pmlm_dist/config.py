"""The settings of a run: frozen dataclasses, one home for each setting.

    preset (presets.py)  +  command line (train.py)  ->  RunConfig  ->  problems(config)

Model, masking, data, schedule, intervals and tensor-parallel size live here; batch sizes, precision, ZeRO, clipping and
offload live in DeepSpeed's JSON (`engine/deepspeed_config.py`); sequence length and vocabulary in the corpus manifest.
Every field is documented below itself; the same text is the command line's help. Standard library only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """Settings that a user can mend; the message lists every problem found, one a line."""

    exit_code = 2  # ExitCode.BAD_CONFIGURATION

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(f"- {problem}" for problem in problems))


def raise_if_any(problems: list[str]) -> None:
    """Raise one `ConfigError` for all `problems`; do nothing when there are none."""
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the Transformer."""

    vocab_size: int | None = None
    """Number of tokens. None: that of the corpus' vocabulary. Its rows are padded to a multiple of 128."""
    hidden_size: int = 768
    """Width of the hidden states."""
    num_layers: int = 12
    """Number of Transformer layers."""
    num_heads: int = 12
    """Attention heads of a layer; must divide hidden_size."""
    ffn_size: int = 3072
    """Inner width of the feed-forward network."""
    max_positions: int = 512
    """Rows of the learned absolute position table; the corpus' sequence length must not exceed it."""
    segment_types: int = 2
    """Rows of the segment table."""
    relative_bias: bool = True
    """Add the T5-style relative position bias to the attention scores. Off: the paper's "no rel pos" model."""
    relative_buckets: int = 32
    """Buckets of the relative position bias, both signs together."""
    relative_max_distance: int = 128
    """Distance from which on all positions share the last bucket of their sign."""
    hidden_dropout: float = 0.1
    """Dropout of embeddings and of the output of attention and feed-forward network."""
    attention_dropout: float = 0.1
    """Dropout of the attention probabilities."""
    layer_norm_eps: float = 1e-12
    """Epsilon of LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the normal initialiser."""
    attention: Literal["fused", "reference", "flex"] = "fused"
    """How visibility is computed: `fused` (fast, any device), `reference` (one mask over all, the specification) or `flex`
    (FlexAttention: trains on a GPU only, without attention_dropout)."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class MaskingConfig:
    """Blockwise masking: the paper's Algorithm 1 (see masking/blockwise.py)."""

    rate: float = 0.15
    """Share of a sequence's tokens that is masked."""
    span_probability: float = 0.4
    """Probability that a draw is a span of several tokens; else it is a single token."""
    min_span: int = 2
    """Shortest span of several tokens."""
    max_span: int = 6
    """Longest span."""
    stop: Literal["exact", "paper"] = "exact"
    """`exact`: the last span is cut so that just ceil(rate * n) tokens are masked; `paper`: overshoot as published."""
    corruption: Literal["paper", "mask_only"] = "paper"
    """`paper`: 80 % [MASK], 10 % random token, 10 % kept; `mask_only`: always [MASK]."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned on the masked positions."""

    kind: Literal["ae+par", "ae", "par", "ar", "ae+ar"] = "ae+par"
    """`ae`: autoencoding; `par`: partially autoregressive; `ar`: PAR over spans of one token each; or sums of two: the
    rows of the paper's Table 6. With `par` and `ar` alone the [M] slots stay as context and carry no loss."""
    ae_weight: float = 1.0
    """a in the loss a * AE + p * PAR; the paper's is 1."""
    par_weight: float = 1.0
    """p in the loss a * AE + p * PAR; the paper's is 1."""
    drop_kept: bool = False
    """Leave out the PAR targets whose [M] slot shows the original token (10 % of them), which PAR can read: its mean
    is then sum(nll of targets not kept) / number of targets not kept. The paper counts them."""


@dataclass(frozen=True)
class DataConfig:
    """Reading the corpus."""

    lanes: int | None = None
    """Parallel reading positions in the corpus: a divisor of the global batch and a multiple of the data-parallel size.
    None: the largest such number that is at most 64 and at most the number of training shards."""
    workers: int = 2
    """Loader processes of each rank; 0 loads in the training process."""
    prefetch: int = 4
    """Micro-batches that each loader process prepares ahead."""
    timeout_s: float = 600.0
    """Seconds that the training waits for a loader process before it counts as stuck, which ends the run."""
    sources: Mapping[str, float] = field(default_factory=dict)
    """Corpora that the training reads in a mixture, each a folder or an address with its weight (kept to a thousandth
    of their sum). None: --corpus alone. Vocabulary and validation samples are always those of --corpus."""
    retries: int = 3
    """How often a shard that cannot be read, or is not what its manifest says, is tried again."""
    retry_wait_s: float = 1.0
    """Seconds before it is tried again the first time; before each further attempt twice as many."""
    quarantine_limit: float = 0.001
    """Share of the training samples that may lie in shards which cannot be read; more end the run (0: one does)."""
    cache: str | None = None
    """Folder on a disk of the node for shards that are fetched from an address; its processes share it."""
    cache_gib: float = 64.0
    """Size of the cache folder at most, in GiB."""
    transfer_timeout_s: float = 60.0
    """Seconds without a byte after which fetching a shard is given up, to be tried again."""
    allow_pipe: bool = False
    """Allow corpora at `pipe:PROGRAM ARGUMENT ...`: the program is run, without a shell, for each of their files, `{}`
    in its arguments being the file's name, and writes the file to its standard output."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and linear decay to zero."""

    peak_lr: float = 6e-4
    """Learning rate at the end of the warm-up."""
    warmup_steps: int = 24_000
    """Steps of linear warm-up from zero."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.98
    """Decay of Adam's second moment."""
    eps: float = 1e-6
    """Adam's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay; never on biases and LayerNorm."""


@dataclass(frozen=True)
class ParallelConfig:
    """How one copy of the model is spread over ranks; data parallelism takes what is left of the world."""

    tp: int = 1
    """Tensor-parallel size; must divide num_heads, ffn_size and the number of ranks."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, its intervals and its seed."""

    steps: int = 500_000
    """Optimizer steps of the whole run."""
    stop_at: int | None = None
    """Stop, with a checkpoint, after this step; the schedule stays that of `steps`, and a later call goes on."""
    seed: int = 0
    """Seed of initialisation, masks, sample order and dropout."""
    log_every: int = 10
    """Steps between console lines and TensorBoard points."""
    validate_every: int = 5_000
    """Steps between validations; the last step is always validated."""
    validation_samples: int = 4_096
    """Held-out samples of one validation (at most what the corpus has)."""
    fill_ins: int = 4
    """Validation samples whose masked text is filled in and written to TensorBoard."""
    checkpoint_every: int = 5_000
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Also keep, for ever, the checkpoints of steps that are multiples of this."""
    save_timeout_s: int = 1800
    """Seconds after which a checkpoint that is still not written is given up; the training goes on."""
    grace_s: float = 120.0
    """Seconds after SIGTERM or SIGUSR1 until this process must be gone; a checkpoint that takes longer is given up."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s for the model FLOPs utilisation (mfu). None: by the device's name, if known."""
    guard_every: int = 100
    """Steps between checks that ranks agree: same batch on tensor-parallel peers, different samples on data-parallel
    ranks, equal replicas of the parameters. The first step of every start is checked, too."""
    max_skipped_steps: int = 20
    """Steps in a row whose gradient is not finite, after which the run ends. Each is left out: no weight changes."""
    collective_timeout_s: int = 300
    """Seconds after which a collective without an answer ends the run; torch's own limit is 600 to 1800."""
    keep_freed_memory: bool = True
    """On a CPU: the process keeps freed memory for the next step. False: a smaller process, and slower steps."""


@dataclass(frozen=True)
class WatchdogConfig:
    """How long a rank may show no progress before its supervisor ends the run (supervision/supervisor.py)."""

    startup_s: float = 1800.0
    """Seconds from one sign of life to the next in start-up and the first step: reading a checkpoint, building the
    engine, finding the other ranks, compiling."""
    data_s: float = 900.0
    """Seconds that a rank waits for its own data; more than data.timeout_s, which tells more when it comes first."""
    step_s: float = 240.0
    """Seconds for a forward pass, a backward pass or an update, with what it waits for other ranks in it; less than
    train.collective_timeout_s, so that the rank that hangs is named before those that wait for it give up."""
    save_s: float = 600.0
    """Seconds between two signs of life while the training waits for a checkpoint."""
    validation_s: float = 240.0
    """Seconds for a batch of a validation."""
    slow_ratio: float = 1.5
    """A rank that takes so many times as long as the others for its own work, three log lines in a row, is named."""


@dataclass(frozen=True)
class RunConfig:
    """One pre-training run."""

    corpus: Path = Path("data/corpus")
    """Folder that `pmlm prepare-corpus` wrote."""
    run_dir: Path = Path("runs/base")
    """Folder of this run: checkpoints, TensorBoard files, resolved settings. An unfinished run is gone on with."""
    ds_config: Path = Path("ds_configs/base.json")
    """DeepSpeed's JSON: batch sizes, precision, ZeRO, clipping, offload."""
    init: Path | None = None
    """Weights to start from: a folder that `pmlm import` wrote, or another run's. Once this run has a checkpoint of its
    own, it goes on from that. None: weights are drawn from the seed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values, nested as the dataclasses are."""
    plain = dataclasses.asdict(config)
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def divisors(number: int) -> list[int]:
    """All positive divisors of `number`, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def problems(config: RunConfig) -> list[str]:
    """Everything that is wrong with `config` by itself, one sentence a problem: setting, value, constraint, way out."""
    return [
        *problems_of_model(config.model, tp=config.parallel.tp),
        *_masking_problems(config.masking),
        *_objective_problems(config.objective),
        *_mixture_problems(config.data.sources),
        *_number_problems(config),
    ]


def problems_of_model(model: ModelConfig, *, tp: int) -> list[str]:
    """What keeps `model` from being computed on `tp` tensor-parallel ranks."""
    return [*_model_problems(model), *_parallel_problems(model, tp=tp)]


def _model_problems(model: ModelConfig) -> list[str]:
    found = []
    if model.num_heads > 0 and model.hidden_size % model.num_heads:
        found.append(
            f"model.num_heads ({model.num_heads}) must divide model.hidden_size ({model.hidden_size}): "
            f"use one of {divisors(model.hidden_size)}"
        )
    if model.relative_buckets < 4 or model.relative_buckets % 4:
        found.append(f"model.relative_buckets ({model.relative_buckets}) must be a positive multiple of 4: use 32")
    elif model.relative_max_distance <= model.relative_buckets // 4:
        found.append(
            f"model.relative_max_distance ({model.relative_max_distance}) must exceed a quarter of "
            f"model.relative_buckets ({model.relative_buckets // 4}): use 128"
        )
    if model.attention == "flex" and model.attention_dropout > 0:
        found.append(
            f"model.attention_dropout ({model.attention_dropout}) must be 0 with model.attention flex, whose kernel "
            "drops no attention probabilities: use --model.attention-dropout 0, or --model.attention fused"
        )
    return found


def _parallel_problems(model: ModelConfig, *, tp: int) -> list[str]:
    found = []
    for name in ("num_heads", "ffn_size"):
        size = getattr(model, name)
        if tp > 0 and size > 0 and size % tp:
            usable = [d for d in divisors(size) if 128 % d == 0]
            found.append(f"parallel.tp ({tp}) must divide model.{name} ({size}): use one of {usable}")
    if tp > 0 and 128 % tp:
        found.append(
            f"parallel.tp ({tp}) must divide 128, the multiple that the vocabulary is padded to: use a power of two"
        )
    return found


def _masking_problems(masking: MaskingConfig) -> list[str]:
    found = []
    if not 0.0 < masking.rate <= 0.5:
        found.append(f"masking.rate ({masking.rate}) must lie above 0 and at most 0.5: the paper uses 0.15")
    if not 2 <= masking.min_span <= masking.max_span:
        found.append(
            f"masking.min_span ({masking.min_span}) and masking.max_span ({masking.max_span}) must satisfy "
            "2 <= min_span <= max_span: the paper uses 2 and 6"
        )
    return found


def _objective_problems(objective: ObjectiveConfig) -> list[str]:
    parts = objective.kind.split("+")
    weights = {"objective.ae_weight": objective.ae_weight} if "ae" in parts else {}
    if "par" in parts or "ar" in parts:
        weights["objective.par_weight"] = objective.par_weight
    if any(weights.values()):
        return []
    stated = " and ".join(f"{name} ({weight})" for name, weight in weights.items())
    return [f"{stated} must not be 0: with objective.kind {objective.kind} nothing would be learned; the paper uses 1"]


def _mixture_problems(sources: Mapping[str, float]) -> list[str]:
    weights = list(sources.values())
    if not weights or 0 < sum(weights) / 1000 <= min(weights) < float("inf") > sum(weights):
        return []
    return [f"data.sources ({dict(sources)}): weights must be positive and at least a thousandth of their sum"]


_POSITIVE = (
    "model.hidden_size",
    "model.num_layers",
    "model.num_heads",
    "model.ffn_size",
    "model.max_positions",
    "model.segment_types",
    "model.layer_norm_eps",
    "model.initializer_range",
    "optim.peak_lr",
    "optim.eps",
    "parallel.tp",
    "train.steps",
    "train.log_every",
    "train.validate_every",
    "train.validation_samples",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.save_timeout_s",
    "train.grace_s",
    "train.guard_every",
    "train.max_skipped_steps",
    "train.collective_timeout_s",
    "data.prefetch",
    "data.timeout_s",
    "data.cache_gib",
    "data.transfer_timeout_s",
    "watchdog.startup_s",
    "watchdog.data_s",
    "watchdog.step_s",
    "watchdog.save_s",
    "watchdog.validation_s",
    "watchdog.slow_ratio",
)
_NOT_NEGATIVE = (
    "data.workers",
    "data.retries",
    "data.retry_wait_s",
    "optim.warmup_steps",
    "optim.weight_decay",
    "objective.ae_weight",
    "objective.par_weight",
    "train.seed",
    "train.fill_ins",
)
_PROBABILITIES = (
    "model.hidden_dropout",
    "model.attention_dropout",
    "data.quarantine_limit",
    "optim.beta1",
    "optim.beta2",
)
_POSITIVE_OR_NONE = (
    "model.vocab_size",
    "data.lanes",
    "train.peak_tflops",
    "train.stop_at",
    "train.keep_every",
)


def _number_problems(config: RunConfig) -> list[str]:
    found = []
    for name in _POSITIVE:
        if not setting(config, name) > 0:
            found.append(f"{name} ({setting(config, name)}) must be positive")
    for name in _NOT_NEGATIVE:
        if not setting(config, name) >= 0:
            found.append(f"{name} ({setting(config, name)}) must not be negative")
    for name in _PROBABILITIES:
        if not 0.0 <= setting(config, name) < 1.0:
            found.append(f"{name} ({setting(config, name)}) must be at least 0 and below 1")
    for name in _POSITIVE_OR_NONE:
        value = setting(config, name)
        if value is not None and not value > 0:
            found.append(f"{name} ({value}) must be positive, or None")
    if not 0.0 <= config.masking.span_probability <= 1.0:
        found.append(f"masking.span_probability ({config.masking.span_probability}) must lie between 0 and 1")
    if config.optim.warmup_steps >= config.train.steps > 0:
        found.append(
            f"optim.warmup_steps ({config.optim.warmup_steps}) must be below train.steps ({config.train.steps}): "
            f"the paper's share of about 5 % would be {max(1, config.train.steps // 20)}"
        )
    return found


def setting(config: RunConfig, name: str) -> Any:
    """Value of a setting by its dotted name, `train.steps` for example."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
