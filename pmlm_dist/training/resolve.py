"""What is fixed for a run before its first step: settings, corpus, vocabulary, batch sizes, sample order.

RunConfig + DeepSpeed's JSON + corpus manifest + topology  ->  Run      (every problem is listed at once)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pmlm_dist.checkpoint.initial_weights import initial_weights_problems
from pmlm_dist.checkpoint.resume import differences
from pmlm_dist.config import (
    ConfigError,
    MaskingConfig,
    ModelConfig,
    RunConfig,
    as_dict,
    divisors,
    problems,
    raise_if_any,
)
from pmlm_dist.corpus.shards import Manifest, misplaced
from pmlm_dist.data.batch import special_ids
from pmlm_dist.data.loader import BatchSource
from pmlm_dist.data.mixture import shares_of_period
from pmlm_dist.data.order import BatchShare, choose_lanes
from pmlm_dist.data.stream import CorpusSource
from pmlm_dist.engine.deepspeed_config import EngineConfig, batch_problems, load_engine_config
from pmlm_dist.masking.blockwise import max_predictions
from pmlm_dist.objectives import OBJECTIVES
from pmlm_dist.parallel.groups import Topology, raise_on_all_ranks
from pmlm_dist.supervision.run_lock import FolderInUse, RunLock
from pmlm_dist.vocab import Vocabulary

# Settings that may differ when a run goes on: they change how it is computed, read or logged, not what is learned.
_FREE_MODEL_SETTINGS = ("attention", "activation_checkpointing")

_SMALLEST_FLEX_HEAD = 16  # the smallest product that the kernel's language (Triton) has


@dataclass(frozen=True)
class ResolvedRun:
    """A run whose settings have been checked and completed from its corpus."""

    config: RunConfig
    engine: EngineConfig
    manifest: Manifest
    vocabulary: Vocabulary
    topology: Topology
    own_corpus: CorpusSource
    """The corpus of vocabulary and validation."""
    training: tuple[CorpusSource, ...]
    """What training reads: `own`, or the sources of a mixture."""

    @property
    def share(self) -> BatchShare:
        """This rank's part of every global batch."""
        return BatchShare(
            global_batch=self.engine.global_batch,
            micro_batch=self.engine.micro_batch,
            dp_rank=self.topology.dp_rank,
            dp_size=self.topology.dp,
        )

    @property
    def source(self) -> BatchSource:
        """Where batches come from."""
        return BatchSource(
            corpus=self.own_corpus.folder,
            address=self.own_corpus.address,
            mixture=self.training,
            special=special_ids(self.vocabulary),
            masking=self.masking,
            seed=self.config.train.seed,
        )

    @property
    def lanes(self) -> int:
        """Lanes of the sample order."""
        assert self.config.data.lanes is not None
        return self.config.data.lanes

    @property
    def num_predictions(self) -> int:
        """M: prediction slots of a sequence."""
        return max_predictions(self.manifest.sequence_length, self.masking)

    @property
    def num_slots(self) -> int:
        """T: slots of a sequence that are computed, S + 2M, or S alone where nothing reads the appended ones."""
        appended = 2 * self.num_predictions if "par" in OBJECTIVES[self.config.objective.kind] else 0
        return self.manifest.sequence_length + appended

    @property
    def last_step(self) -> int:
        """The step after which this start of the run ends."""
        return min(self.config.train.steps, self.config.train.stop_at or self.config.train.steps)

    def is_logged(self, step: int) -> bool:
        """Whether `step` gets a log line."""
        return step == self.last_step or step % self.config.train.log_every == 0

    @property
    def masking(self) -> MaskingConfig:
        """How samples are masked: as set, with spans of one token each where the objective is autoregressive."""
        masking = self.config.masking
        autoregressive = self.config.objective.kind in ("ar", "ae+ar")
        return dataclasses.replace(masking, span_probability=0.0) if autoregressive else masking

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.config.run_dir / "checkpoints"

    def configuration(self) -> dict[str, Any]:
        """The resolved whole, as JSON values: settings, DeepSpeed's JSON, corpus, topology."""
        return {
            **as_dict(self.config),
            "engine": self.engine.raw,
            "corpus_fingerprint": self.manifest.fingerprint,
            "sequence_length": self.manifest.sequence_length,
            "topology": {"world_size": self.topology.world_size, "tp": self.topology.tp, "dp": self.topology.dp},
        }

    def _mixture_identity(self) -> dict[str, Any]:
        if not self.config.data.sources:
            return {}
        shares = shares_of_period([source.weight for source in self.training])
        fingerprints = [Manifest.load(source.folder).fingerprint for source in self.training]
        return {"data.sources": [[name, share] for name, share in zip(fingerprints, shares, strict=True)]}

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from: model, masks, data, order, precision.

        Not how it is spread over ranks: a checkpoint opens on any topology.
        """
        model = {
            f"model.{k}": v for k, v in dataclasses.asdict(self.config.model).items() if k not in _FREE_MODEL_SETTINGS
        }
        masking = {f"masking.{k}": v for k, v in dataclasses.asdict(self.config.masking).items()}
        objective = {f"objective.{k}": v for k, v in dataclasses.asdict(self.config.objective).items()}
        return {
            **model,
            **masking,
            **objective,
            "train.seed": self.config.train.seed,
            "data.lanes": self.lanes,
            "corpus": self.manifest.fingerprint,
            **self._mixture_identity(),
            "vocabulary": self.vocabulary.fingerprint,
            "train_batch_size": self.engine.global_batch,
            "precision": self.engine.precision,
        }


def check(config: RunConfig) -> None:
    """Refuse settings that are wrong by themselves; needs no other rank and no file."""
    raise_if_any(problems(config))


def resolve(config: RunConfig, topology: Topology, *, saved: dict[str, Any] | None = None) -> ResolvedRun:
    """Check `config` against its files, `topology` and the run it goes on with, and complete it from the corpus.

    `saved`: the `state.json` of the checkpoint to go on from, if any; its lanes hold unless the settings name others.
    Raises `ConfigError` with all problems on every rank, also on those that saw none: nobody waits for one that left.
    """
    found = _device_problems(config.model, topology.device)
    saved_lanes = saved["identity"]["data.lanes"] if saved else None
    engine = _collect_problems(
        found, lambda: load_engine_config(config.ds_config, has_accelerator=topology.device.type != "cpu")
    )
    own: CorpusSource | None = _collect_problems(found, lambda: CorpusSource.open(config.corpus, config.data))
    manifest = None if own is None else _collect_problems(found, partial(Manifest.load, own.folder))
    vocabulary = (
        None if own is None or manifest is None else _collect_problems(found, partial(Vocabulary.load, own.folder))
    )
    training = () if own is None or manifest is None else (own,)
    if config.data.sources:
        training = _mixture(found, config)
    if engine is not None:
        found += batch_problems(engine, dp=topology.dp)
    if own is not None and manifest is not None and vocabulary is not None:
        found += _corpus_problems(config, manifest, vocabulary)
        found += _mixture_problems(training, manifest)
        if topology.local_rank == 0 and not saved:  # what is lost on the way goes into quarantine when it is met
            found += [problem for source in dict.fromkeys([own, *training]) for problem in _misplaced(source)]
    lanes = None
    if engine is not None and manifest is not None and not found:
        lanes = _collect_problems(
            found,
            lambda: _choose_lanes(
                config.data.lanes,
                saved_lanes,
                global_batch=engine.global_batch,
                shards=min(len(Manifest.load(source.folder).splits["train"].shards) for source in training),
                dp=topology.dp,
            ),
        )
        found += _cache_problems(config, training, lanes=lanes) if lanes else []
    raise_on_all_ranks(found, topology)
    assert engine is not None
    assert own is not None
    assert manifest is not None
    assert vocabulary is not None
    completed = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocabulary.size),
        data=dataclasses.replace(config.data, lanes=lanes),
    )
    run = ResolvedRun(completed, engine, manifest, vocabulary, topology, own, training)
    if saved:
        found += _identity_problems(saved, run, lanes_are_set=config.data.lanes is not None)
        raise_on_all_ranks(found, topology)
    elif config.init is not None:
        if topology.local_rank == 0:
            found += initial_weights_problems(config.init, completed.model, vocabulary)
        raise_on_all_ranks(found, topology)
    return run


@dataclass(frozen=True)
class RunLease:
    """What makes this start of a run the one that may write into its folder."""

    attempt: str
    """The name of this start."""
    check: Callable[[], None]
    """Raises `Superseded` when another start has taken over; asked on rank 0 before a checkpoint is committed."""


@contextmanager
def run_lease(run_dir: Path, topology: Topology) -> Iterator[RunLease]:
    """Hold the lock of `run_dir` (`run_lock.py`), by rank 0 for all; every rank must call.

    Raises on every rank `FolderInUse` when another start is at work there, ConfigError when nothing can be written.
    """
    lock, in_use, problems = None, "", []
    if topology.is_rank_zero:
        try:
            lock = RunLock.acquire(run_dir)
        except FolderInUse as error:
            in_use = str(error)
        except OSError as error:
            problems = [f"the folder to write, {run_dir}, cannot be written to: {error}"]
    attempt, in_use, problems = topology.broadcast_object((lock.attempt if lock else "", in_use, problems))
    raise_if_any(problems)
    if in_use:
        raise FolderInUse(in_use)
    try:
        yield RunLease(attempt, check=lock.check if lock else _nothing)
    finally:
        if lock:
            lock.release()


def _nothing() -> None:
    """The lock is rank 0's."""


def _mixture(found: list[str], config: RunConfig) -> tuple[CorpusSource, ...]:
    """The sources of a mixture whose manifests can be read."""
    sources = []
    for corpus, weight in config.data.sources.items():
        sources.append(_collect_problems(found, partial(CorpusSource.open, corpus, config.data, weight=weight)))
    return tuple(
        s for s in sources if s is not None and _collect_problems(found, partial(Manifest.load, s.folder)) is not None
    )


def _mixture_problems(training: tuple[CorpusSource, ...], manifest: Manifest) -> list[str]:
    """What keeps the sources from being read as one corpus with that of `manifest`."""
    found = []
    for source in training:
        other = Manifest.load(source.folder)
        if other.vocabulary["fingerprint"] != manifest.vocabulary["fingerprint"]:
            found.append(
                f"data.sources: {source.name} was written with another vocabulary than --corpus: prepare it with "
                "the tokenizer.json of --corpus"
            )
        if other.sequence_length != manifest.sequence_length:
            found.append(
                f"data.sources: {source.name} has sequences of {other.sequence_length} tokens, --corpus of "
                f"{manifest.sequence_length}: prepare it with --sequence-length {manifest.sequence_length}"
            )
    return found


def _misplaced(source: CorpusSource) -> list[str]:
    return [] if source.address else misplaced(source.folder, Manifest.load(source.folder))


def _cache_problems(config: RunConfig, training: tuple[CorpusSource, ...], *, lanes: int) -> list[str]:
    """Room for what the lanes of one node may hold: of each the shard before, this one, and the one being fetched."""
    remote = [Manifest.load(source.folder).splits["train"].shards for source in training if source.address]
    needed = 3 * lanes * sum(max(shard.bytes for shard in shards) for shards in remote) / 2**30
    if needed <= config.data.cache_gib:
        return []
    return [
        f"data.cache_gib ({config.data.cache_gib:g}) must be at least {needed:.3g}, three shards for each of the "
        f"{lanes} lanes: raise it, or use fewer --data.lanes"
    ]


def _choose_lanes(wanted: int | None, saved: int | None, **fitting: int) -> int:
    """`wanted` lanes, else those of the checkpoint. Where they do not fit it is another run's: `_other_run` says so."""
    try:
        return choose_lanes(wanted or saved, **fitting)
    except ConfigError:
        if wanted:
            raise
        return choose_lanes(None, **fitting)


def _identity_problems(saved: dict[str, Any], run: ResolvedRun, *, lanes_are_set: bool) -> list[str]:
    found, before, now = [], saved["identity"], run.identity()
    lanes, dp = before["data.lanes"], run.topology.dp
    if lanes % dp and not lanes_are_set:
        found.append(
            f"the run reads its corpus in {lanes} lanes, which {dp} data-parallel ranks cannot share: use one of "
            f"{divisors(lanes)} of them"
        )
        now["data.lanes"] = lanes
    others = differences(before, now)
    if others:
        others.append(
            f"the checkpoints in {run.checkpoints} are of another run (above): go on with the settings they were "
            "written with, or choose another --run-dir"
        )
    return found + others


def _collect_problems(found: list[str], read: Any) -> Any:
    try:
        return read()
    except ConfigError as error:
        found += error.problems
        return None


def _device_problems(model: ModelConfig, device: torch.device) -> list[str]:
    if model.attention != "flex":
        return []
    if device.type == "cpu":
        return [
            "model.attention flex cannot train on a CPU, where FlexAttention has no backward pass: "
            "use --model.attention fused"
        ]
    if model.head_dim < _SMALLEST_FLEX_HEAD:
        return [
            f"model.hidden_size / model.num_heads ({model.head_dim}) must be at least {_SMALLEST_FLEX_HEAD} with "
            "model.attention flex on a GPU: use fewer heads, or --model.attention fused"
        ]
    return []


def _corpus_problems(config: RunConfig, manifest: Manifest, vocabulary: Vocabulary) -> list[str]:
    found = []
    if manifest.sequence_length > config.model.max_positions:
        found.append(
            f"the sequence length of corpus {config.corpus} ({manifest.sequence_length}) exceeds model.max_positions "
            f"({config.model.max_positions}): raise it, or prepare the corpus with a shorter --sequence-length"
        )
    if vocabulary.fingerprint != manifest.vocabulary["fingerprint"]:
        found.append(
            f"the vocabulary in {config.corpus} is not the one its shards were written with: restore its "
            "tokenizer.json, or prepare the corpus anew"
        )
    if config.model.vocab_size not in (None, vocabulary.size):
        found.append(
            f"model.vocab_size ({config.model.vocab_size}) is not that of corpus {config.corpus} ({vocabulary.size}): "
            "leave it out, it is taken from the corpus"
        )
    if config.model.segment_types < 2:
        found.append(
            f"model.segment_types ({config.model.segment_types}) must be at least 2: samples have two segments"
        )
    return found
