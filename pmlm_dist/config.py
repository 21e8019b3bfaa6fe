"""The settings of a run: frozen dataclasses, one home for each setting.

    preset (presets.py)  +  command line (train.py)  ->  RunConfig  ->  problems (relations.py)

Model, masking, data, schedule, intervals and tensor-parallel size live here; batch sizes, precision, ZeRO, clipping and
offload live in DeepSpeed's JSON (`engine/deepspeed_config.py`); sequence length and vocabulary in the corpus manifest.
Every field declares its range (`ranges.py`). The docstring below a field is its help on the command line. Standard
library only.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pmlm_dist.ranges import BelowOne, NotNegative, Positive, Probability, Range

DS_CONFIGS = Path(__file__).parent / "ds_configs"
"""DeepSpeed's JSON files of the presets; the folder `ds_configs` of a checkout is a link to it."""

MultipleOf4 = Range("be a positive multiple of 4: use 32", lambda value: value >= 4 and value % 4 == 0)
_UpToHalf = Range("lie above 0 and at most 0.5: the paper uses 0.15", lambda value: 0.0 < value <= 0.5)


class ConfigError(ValueError):
    """Invalid settings; the message lists every problem, one a line."""

    exit_code = 2  # ExitCode.BAD_CONFIGURATION

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(f"- {problem}" for problem in problems))


def raise_if_any(problems: list[str]) -> None:
    """Raise one `ConfigError` for all `problems`; do nothing when there are none."""
    if problems:
        raise ConfigError(problems)


KERNEL_HEAD_SIZES = (16, 32, 64, 128)
"""Head sizes of the attention backend `triton`."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the Transformer."""

    vocab_size: Annotated[int | None, Positive] = None
    """Tokens of the vocabulary; the embedding is padded to a multiple of 128 rows. None: the corpus' vocabulary."""
    hidden_size: Annotated[int, Positive] = 768
    """Width of the hidden states."""
    num_layers: Annotated[int, Positive] = 12
    """Number of Transformer layers."""
    num_heads: Annotated[int, Positive] = 12
    """Attention heads of a layer; must divide hidden_size."""
    ffn_size: Annotated[int, Positive] = 3072
    """Inner width of the feed-forward network."""
    max_positions: Annotated[int, Positive] = 512
    """Rows of the learned absolute position table; at least the corpus' sequence length."""
    segment_types: Annotated[int, Positive] = 2
    """Rows of the segment table."""
    relative_bias: bool = True
    """Add the T5-style relative position bias to the attention scores. Off: the paper's "no rel pos" model."""
    relative_buckets: Annotated[int, MultipleOf4] = 32
    """Buckets of the relative position bias, both signs together."""
    relative_max_distance: int = 128
    """Distance in tokens from which all positions share the last bucket of their sign."""
    hidden_dropout: Annotated[float, BelowOne] = 0.1
    """Dropout probability after embeddings, attention and feed-forward network."""
    attention_dropout: Annotated[float, BelowOne] = 0.0
    """Dropout probability of the attention probabilities. The paper's is 0.1; no current encoder has it, and on a GPU
    drawing a number for every pair is slow."""
    layer_norm_eps: Annotated[float, Positive] = 1e-12
    """Epsilon of LayerNorm."""
    initializer_range: Annotated[float, Positive] = 0.02
    """Standard deviation of the normal distribution that initial weights are drawn from."""
    initializer: Literal["scaled", "normal"] = "scaled"
    """`normal`: all matrices have that deviation, as in the paper. `scaled`: the output projections of attention and
    feed-forward network have it divided by sqrt(2 * num_layers), so that every layer begins close to the identity."""
    initial_head_bias: Literal["unigram", "zeros"] = "unigram"
    """Initial bias of the output. `unigram`: the log of each token's frequency in the training corpus, so that the
    first steps need not learn it. `zeros`: as BERT."""
    initial_relative_bias: Literal["local", "normal"] = "local"
    """Initial relative position bias. `local`: half of the heads begin looking at one neighbor each, at distances -1,
    1, -2, 2 and so on, so that masked tokens have their context from the first step on. `normal`: no head does, as in
    the paper; then small models stay at the loss of token frequencies for millions of tokens."""
    attention: Literal["auto", "fused", "triton", "reference"] = "auto"
    """Attention backend. `triton`: one kernel, on a GPU, for heads of 16, 32, 64 or 128. `fused`: fast on a CPU, works
    on any device. `reference`: one matrix over all pairs of slots, the specification. `auto`: `triton` where it works,
    else `fused`."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""

    @property
    def residual_range(self) -> float:
        """Standard deviation of the initial output projections of attention and feed-forward network."""
        return self.initializer_range / (math.sqrt(2 * self.num_layers) if self.initializer == "scaled" else 1.0)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    def attention_on(self, *, accelerator: bool) -> str:
        """Return the attention backend on an accelerator or on a CPU: resolves `auto`."""
        if self.attention != "auto":
            return self.attention
        return "triton" if accelerator and self.head_dim in KERNEL_HEAD_SIZES else "fused"


@dataclass(frozen=True)
class MaskingConfig:
    """Blockwise masking: the paper's Algorithm 1 (see masking/blockwise.py)."""

    rate: Annotated[float, _UpToHalf] = 0.15
    """Fraction of a sequence's tokens that is masked."""
    span_probability: Annotated[float, Probability] = 0.4
    """Probability that a draw is a span of several tokens; otherwise it is a single token."""
    min_span: int = 2
    """Length in tokens of the shortest span."""
    max_span: int = 6
    """Length in tokens of the longest span."""
    stop: Literal["exact", "paper"] = "exact"
    """`exact`: cut the last span so that ceil(rate * n) tokens are masked. `paper`: exceed the rate, as published."""
    corruption: Literal["paper", "mask_only"] = "paper"
    """`paper`: 80 % [MASK], 10 % random token, 10 % unchanged. `mask_only`: always [MASK]."""
    prefix_share: Annotated[float, Probability] = 0.0
    """Share of prefix samples: the text before a random cut is the context, and the tokens after it are predicted left
    to right, each in a step of its own, by PAR alone. 1 trains a left-to-right language model."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Objectives on the masked positions."""

    kind: Literal["ae+par", "ae", "par", "ar", "ae+ar"] = "ae+par"
    """`ae`: autoencoding. `par`: partially autoregressive. `ar`: PAR over spans of one token each. Or sums of two: the
    rows of the paper's Table 6. With `par` and `ar` alone the [M] slots stay as context and carry no loss."""
    ae_weight: Annotated[float, NotNegative] = 1.0
    """a in the loss a * AE + p * PAR; the paper's is 1."""
    par_weight: Annotated[float, NotNegative] = 1.0
    """p in the loss a * AE + p * PAR; the paper's is 1."""
    drop_kept: bool = False
    """Drop the PAR targets whose [M] slot shows the original token (10 % of them), since PAR can attend to it. The
    mean is then sum(nll of remaining targets) / number of remaining targets. The paper counts them."""


@dataclass(frozen=True)
class DataConfig:
    """Corpus and data loading."""

    lanes: Annotated[int | None, Positive] = None
    """Fixed reading positions of the corpus: a divisor of the global batch and a multiple of the data-parallel size.
    None: the largest such number that is at most 64 and at most the number of training shards."""
    workers: Annotated[int, NotNegative] = 2
    """Loader processes of each rank. 0: load in the training process."""
    prefetch: Annotated[int, Positive] = 4
    """Micro-batches that each loader process prepares ahead."""
    timeout_s: Annotated[float, Positive] = 600.0
    """Seconds to wait for a loader process; after that it counts as hung and the run ends."""
    sources: Mapping[str, float] = field(default_factory=dict)
    """Mixture of training corpora: folder or address and weight (rounded to a thousandth of the sum). Empty: --corpus
    alone. Vocabulary and validation samples always come from --corpus."""
    retries: Annotated[int, NotNegative] = 3
    """Retries for a shard that is unreadable or does not match its manifest."""
    retry_wait_s: Annotated[float, NotNegative] = 1.0
    """Seconds before the first retry; doubled before each further one."""
    quarantine_limit: Annotated[float, BelowOne] = 0.001
    """Fraction of the training samples that may lie in unreadable shards; more end the run. 0: one shard ends it."""
    cache: str | None = None
    """Folder on a disk of the node that caches remote shards, shared by its processes. None: no cache."""
    cache_gib: Annotated[float, Positive] = 64.0
    """Maximum size of the cache folder in GiB."""
    transfer_timeout_s: Annotated[float, Positive] = 60.0
    """Seconds without a byte after which the download of a shard is aborted and retried."""
    allow_pipe: bool = False
    """Allow corpora at `pipe:PROGRAM ARGUMENT ...`. The program runs without a shell, once a file, and writes the file
    to its standard output; `{}` in its arguments is replaced by the file's name."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and linear decay to zero."""

    peak_lr: Annotated[float, Positive] = 6e-4
    """Learning rate at the end of the warm-up."""
    warmup_steps: Annotated[int, NotNegative] = 24_000
    """Steps of linear warm-up from zero."""
    beta1: Annotated[float, BelowOne] = 0.9
    """Decay of Adam's first moment."""
    beta2: Annotated[float, BelowOne] = 0.98
    """Decay of Adam's second moment."""
    eps: Annotated[float, Positive] = 1e-6
    """Adam's epsilon."""
    weight_decay: Annotated[float, NotNegative] = 0.01
    """Decoupled weight decay; not applied to biases and LayerNorm."""


@dataclass(frozen=True)
class ParallelConfig:
    """Model parallelism; the data-parallel size is the number of ranks divided by tp."""

    tp: Annotated[int, Positive] = 1
    """Tensor-parallel size; must divide num_heads, ffn_size and the number of ranks."""


@dataclass(frozen=True)
class BatchConfig:
    """Batch sizes in place of those of DeepSpeed's JSON."""

    global_: Annotated[int | None, Positive] = None  # --batch.global
    """Sequences of an optimizer step over all ranks. None: from DeepSpeed's JSON."""
    micro: Annotated[int | None, Positive] = None
    """Sequences of one forward pass on one rank. None: from DeepSpeed's JSON."""

    def overrides(self, *, zero: int | None) -> dict[str, Any]:
        """Return what replaces settings of DeepSpeed's JSON, with the ZeRO stage `zero`."""
        settings = {"train_batch_size": self.global_, "train_micro_batch_size_per_gpu": self.micro}
        stage = {} if zero is None else {"zero_optimization": {"stage": zero}}
        return {name: value for name, value in settings.items() if value is not None} | stage


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, its intervals, its time limits and its seed."""

    steps: Annotated[int, Positive] = 500_000
    """Optimizer steps of the whole run."""
    stop_at: Annotated[int | None, Positive] = None
    """Save a checkpoint after this step and exit; the schedule is still that of `steps`, and the next call resumes.
    None: train to the end."""
    seed: Annotated[int, NotNegative] = 0
    """Seed of initialization, masks, sample order and dropout."""
    log_every: Annotated[int, Positive] = 10
    """Steps between console lines and TensorBoard points."""
    validate_every: Annotated[int, Positive] = 5_000
    """Steps between validations; the last step is always validated."""
    validation_samples: Annotated[int, Positive] = 4_096
    """Held-out samples of one validation, at most all of the corpus."""
    probe: Path | None = None
    """Minimal pairs that are scored at every validation: a folder, .zip or .jsonl as for `pmlm evaluate --suite`."""
    probe_pairs: Annotated[int, Positive] = 1_000
    """Pairs of `probe` that are scored, equally many of each paradigm."""
    fill_ins: Annotated[int, NotNegative] = 4
    """Validation samples whose masked text is filled in and written to TensorBoard."""
    checkpoint_every: Annotated[int, Positive] = 5_000
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Annotated[int, Positive] = 3
    """Number of newest checkpoints to keep."""
    keep_every: Annotated[int | None, Positive] = None
    """Also keep the checkpoints of steps that are multiples of this, without limit. None: the newest only."""
    save_timeout_s: Annotated[int, Positive] = 1800
    """Seconds after which an unfinished checkpoint is abandoned; the training continues."""
    grace_s: Annotated[float, Positive] = 120.0
    """Seconds from SIGTERM or SIGUSR1 until this process must have exited; a slower checkpoint is abandoned."""
    peak_tflops: Annotated[float | None, Positive] = None
    """Peak of one device in TFLOP/s for the model FLOPs utilization (mfu). None: by the device's name, if listed."""
    guard_every: Annotated[int, Positive] = 100
    """Steps between consistency checks over ranks: same batch on tensor-parallel peers, different samples on
    data-parallel ranks, equal replicas of the parameters. The first step of every attempt is also checked."""
    max_skipped_steps: Annotated[int, Positive] = 20
    """Consecutive steps with a non-finite gradient after which the run ends. Each is skipped: no weight changes."""
    collective_timeout_s: Annotated[int, Positive] = 300
    """Seconds after which an unfinished collective ends the run; torch's own limit is 600 to 1800."""
    allow_slow_steps: bool = False
    """Start also if a step is estimated to take more than five minutes on these devices."""
    keep_freed_memory: bool = True
    """CPU only: the process keeps freed memory for the next step. Off: a smaller process and slower steps."""


@dataclass(frozen=True)
class WatchdogConfig:
    """Time limits without progress, after which the supervisor ends a rank (supervision/supervisor.py)."""

    startup_s: Annotated[float, Positive] = 1800.0
    """Seconds between two heartbeats in start-up and the first step: loading a checkpoint, building the engine,
    rendezvous, compilation."""
    data_s: Annotated[float, Positive] = 900.0
    """Seconds that a rank waits for its own data; more than data.timeout_s, whose message has more details."""
    step_s: Annotated[float, Positive] = 240.0
    """Seconds for a forward pass, a backward pass or an optimizer step, including waits for other ranks. Less than
    train.collective_timeout_s, so that the hung rank is named before the ranks that wait for it time out."""
    save_s: Annotated[float, Positive] = 600.0
    """Seconds between two heartbeats while the training waits for a checkpoint."""
    validation_s: Annotated[float, Positive] = 240.0
    """Seconds for one batch of a validation."""
    slow_ratio: Annotated[float, Positive] = 1.5
    """A rank is reported as a straggler when its own work takes this many times as long as that of the others, three
    log lines in a row."""


@dataclass(frozen=True)
class RunConfig:
    """One pre-training run."""

    corpus: Path = Path("data/corpus")
    """Corpus folder, written by `pmlm prepare-corpus`."""
    run_dir: Path = Path("runs/base")
    """Folder of this run: checkpoints, TensorBoard files, resolved settings. An unfinished run in it is resumed."""
    ds_config: Path = DS_CONFIGS / "base.json"
    """DeepSpeed's JSON: batch sizes, precision, ZeRO, clipping, offload."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    zero: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage. None: from DeepSpeed's JSON."""
    init: Path | None = None
    """Initial weights: a folder that `pmlm import` wrote, or another run's. Ignored once this run has a checkpoint of
    its own. None: weights are drawn from the seed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values, nested like the dataclasses."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))
