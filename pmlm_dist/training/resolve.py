"""What is fixed before a run's first step: settings, corpus, vocabulary, batch sizes, sample order.

    RunConfig + DeepSpeed's JSON + corpus manifest + topology [+ checkpoint]  ->  ResolvedRun

All problems are reported together, on every rank, before anything is computed.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pmlm_dist.checkpoint.initial_weights import initial_weights_problems
from pmlm_dist.checkpoint.resume import differences
from pmlm_dist.config import ConfigError, MaskingConfig, ModelConfig, RunConfig, as_dict
from pmlm_dist.corpus.shards import Manifest, misplaced
from pmlm_dist.data.batch import special_ids
from pmlm_dist.data.loader import BatchSource
from pmlm_dist.data.mixture import shares_of_period
from pmlm_dist.data.order import BatchShare, choose_lanes
from pmlm_dist.data.stream import CorpusSource
from pmlm_dist.engine.deepspeed_config import EngineConfig, batch_problems, load_engine_config
from pmlm_dist.likelihood.probe import Probe
from pmlm_dist.masking.blockwise import max_predictions
from pmlm_dist.metrics.flops import training_flops
from pmlm_dist.objectives import OBJECTIVES
from pmlm_dist.parallel.groups import Topology, raise_on_all_ranks
from pmlm_dist.relations import divisors
from pmlm_dist.vocabulary.vocabulary import Vocabulary

# Settings that may change on resume: they change how the model is computed, not what is learned.
_FREE_SETTINGS = ("model.attention", "model.activation_checkpointing")


@dataclass(frozen=True)
class ResolvedRun:
    """A run whose settings have been validated and completed from its corpus."""

    config: RunConfig
    engine: EngineConfig
    manifest: Manifest
    vocabulary: Vocabulary
    topology: Topology
    own_corpus: CorpusSource
    """The corpus that gives vocabulary and validation samples."""
    training: tuple[CorpusSource, ...]
    """The corpora of the training samples: `own_corpus`, or the sources of a mixture."""
    probe: Probe | None = None
    """The minimal pairs of `train.probe`."""

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
        """What the loader builds batches from."""
        return BatchSource(
            corpus=self.own_corpus,
            mixture=self.training,
            special=special_ids(self.vocabulary),
            masking=self.masking,
            seed=self.config.train.seed,
        )

    @property
    def lanes(self) -> int:
        assert self.config.data.lanes is not None
        return self.config.data.lanes

    @property
    def num_predictions(self) -> int:
        """M: prediction slots of a sequence."""
        return max_predictions(self.manifest.sequence_length, self.masking)

    @property
    def num_slots(self) -> int:
        """T: slots of a sequence, S + 2M; S alone if no objective uses the appended ones."""
        appended = 2 * self.num_predictions if "par" in OBJECTIVES[self.config.objective.kind] else 0
        return self.manifest.sequence_length + appended

    @property
    def sample_flops(self) -> float:
        return training_flops(
            self.config.model,
            context=self.manifest.sequence_length,
            predictions=self.num_predictions,
            vocab_rows=self.vocabulary.padded_size(),
            objectives=OBJECTIVES[self.config.objective.kind],
        )

    def unigram_log_probabilities(self) -> torch.Tensor:
        """Log frequencies [vocab_size] of the tokens in the training corpora, by weight, with one added to counts."""
        total = sum(source.weight for source in self.training)
        shares = torch.zeros(self.vocabulary.size, dtype=torch.float64)
        for source in self.training:
            counts = torch.from_numpy(source.manifest.unigram_counts) + 1.0
            shares += source.weight / total * counts / counts.sum()
        return shares.log().float()

    @property
    def last_step(self) -> int:
        """The step after which this attempt ends."""
        return min(self.config.train.steps, self.config.train.stop_at or self.config.train.steps)

    @property
    def masking(self) -> MaskingConfig:
        """The masking settings, with single-token spans if the objective is autoregressive."""
        masking = self.config.masking
        autoregressive = self.config.objective.kind in ("ar", "ae+ar")
        return dataclasses.replace(masking, span_probability=0.0) if autoregressive else masking

    @property
    def checkpoints(self) -> Path:
        return self.config.run_dir / "checkpoints"

    def configuration(self) -> dict[str, Any]:
        """Return everything as resolved, as JSON values: settings, DeepSpeed's JSON, corpus, topology."""
        return {
            **as_dict(self.config),
            "corpus": self.own_corpus.address or str(self.own_corpus.folder.absolute()),
            "engine": self.engine.raw,
            "corpus_fingerprint": self.manifest.fingerprint,
            "sequence_length": self.manifest.sequence_length,
            "topology": {"world_size": self.topology.world_size, "tp": self.topology.tp, "dp": self.topology.dp},
        }

    def _mixture_identity(self) -> dict[str, Any]:
        if not self.config.data.sources:
            return {}
        shares = shares_of_period([source.weight for source in self.training])
        fingerprints = [source.manifest.fingerprint for source in self.training]
        return {"data.sources": [[name, share] for name, share in zip(fingerprints, shares, strict=True)]}

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a checkpoint to be resumed: model, masks, data, order, precision.

        The topology is not part of it: a checkpoint opens on any.
        """
        settings = {
            f"{part}.{name}": value
            for part in ("model", "masking", "objective")
            for name, value in dataclasses.asdict(getattr(self.config, part)).items()
            if f"{part}.{name}" not in _FREE_SETTINGS
        }
        return {
            **settings,
            "train.seed": self.config.train.seed,
            "data.lanes": self.lanes,
            "corpus": self.manifest.fingerprint,
            **self._mixture_identity(),
            "vocabulary": self.vocabulary.fingerprint,
            "train_batch_size": self.engine.global_batch,
            "precision": self.engine.precision,
        }


def resolve(config: RunConfig, topology: Topology, *, saved: dict[str, Any] | None = None) -> ResolvedRun:
    """Validate `config` against its files, `topology` and the checkpoint, and complete it from the corpus.

    `saved`: the `state.json` of the checkpoint to resume, if any; its lanes are used unless the settings name others.
    Raises `ConfigError` with all problems on every rank, so that no rank waits for one that has left.
    """
    problems = _device_problems(config.model, topology.device)
    saved_lanes = saved["identity"]["data.lanes"] if saved else None
    has_accelerator, overrides = topology.device.type != "cpu", config.batch.overrides(zero=config.zero)
    engine = _collect_problems(
        problems, lambda: load_engine_config(config.ds_config, has_accelerator=has_accelerator, overrides=overrides)
    )
    own = _collect_problems(problems, lambda: CorpusSource.open(config.corpus, config.data))
    manifest = own and _collect_problems(problems, lambda: own.manifest)
    vocabulary = manifest and _collect_problems(problems, lambda: Vocabulary.load(own.folder))
    training = _mixture(problems, config) if config.data.sources else (own,) if manifest else ()
    if engine:
        problems += batch_problems(engine, dp=topology.dp)
    if vocabulary:
        problems += _corpus_problems(config, manifest, vocabulary)
        problems += _mixture_problems(training, manifest)
        if topology.local_rank == 0 and not saved:  # a shard lost later is quarantined when it is read
            local = [source for source in dict.fromkeys([own, *training]) if not source.address]
            problems += [problem for source in local for problem in misplaced(source.folder, source.manifest)]
    lanes = None
    if engine and manifest and not problems:
        lanes = _collect_problems(
            problems,
            lambda: _choose_lanes(
                config.data.lanes,
                saved_lanes,
                global_batch=engine.global_batch,
                shards=min(len(source.manifest.splits["train"].shards) for source in training),
                dp=topology.dp,
            ),
        )
        problems += _cache_problems(config, training, lanes=lanes) if lanes else []
    probe = None
    if config.train.probe is not None and vocabulary:
        limits = {"most": config.train.probe_pairs, "max_tokens": config.model.max_positions - 2}
        probe = _collect_problems(problems, partial(Probe.load, config.train.probe, vocabulary, **limits))
    if saved and not manifest:
        corpus, fingerprint = saved["configuration"].get("corpus"), saved["identity"].get("corpus")
        problems.append(
            f"the run to resume reads the corpus of sha256 {fingerprint}, which was {corpus}: name its place by "
            "--corpus"
        )
    raise_on_all_ranks(problems, topology)
    completed = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocabulary.size),
        data=dataclasses.replace(config.data, lanes=lanes),
    )
    run = ResolvedRun(completed, engine, manifest, vocabulary, topology, own, training, probe)
    if saved:
        problems += _identity_problems(saved, run, lanes_are_set=config.data.lanes is not None)
        raise_on_all_ranks(problems, topology)
    elif config.init is not None:
        if topology.local_rank == 0:
            problems += initial_weights_problems(config.init, completed.model, vocabulary)
        raise_on_all_ranks(problems, topology)
    return run


def _mixture(problems: list[str], config: RunConfig) -> tuple[CorpusSource, ...]:
    """Return the sources of a mixture whose manifests can be read."""
    opened = [
        _collect_problems(problems, partial(CorpusSource.open, corpus, config.data, weight=weight))
        for corpus, weight in config.data.sources.items()
    ]
    return tuple(s for s in opened if s and _collect_problems(problems, partial(getattr, s, "manifest")))


def _mixture_problems(training: tuple[CorpusSource, ...], manifest: Manifest) -> list[str]:
    """Return why the sources cannot be mixed with the corpus of `manifest`."""
    problems = []
    for source in training:
        other = source.manifest
        if other.vocabulary["fingerprint"] != manifest.vocabulary["fingerprint"]:
            problems.append(
                f"data.sources: {source.name} was written with another vocabulary than --corpus: prepare it with "
                "the tokenizer.json of --corpus"
            )
        if other.sequence_length != manifest.sequence_length:
            problems.append(
                f"data.sources: {source.name} has sequences of {other.sequence_length} tokens, --corpus of "
                f"{manifest.sequence_length}: prepare it with --sequence-length {manifest.sequence_length}"
            )
    return problems


def _cache_problems(config: RunConfig, training: tuple[CorpusSource, ...], *, lanes: int) -> list[str]:
    """Return a problem if the cache cannot hold three shards a lane: the last, the current, the one being fetched."""
    remote = [source.manifest.splits["train"].shards for source in training if source.address]
    needed = 3 * lanes * sum(max(shard.bytes for shard in shards) for shards in remote) / 2**30
    if needed <= config.data.cache_gib:
        return []
    return [
        f"data.cache_gib ({config.data.cache_gib:g}) must be at least {needed:.3g}, three shards for each of the "
        f"{lanes} lanes: raise it, or use fewer --data.lanes"
    ]


def _choose_lanes(wanted: int | None, saved: int | None, **fitting: int) -> int:
    """Return `wanted` lanes, else those of the checkpoint, else the default for the sizes in `fitting`.

    Lanes of a checkpoint that do not fit belong to another run, which `_identity_problems` reports.
    """
    try:
        return choose_lanes(wanted or saved, **fitting)
    except ConfigError:
        if wanted:
            raise
        return choose_lanes(None, **fitting)


def _identity_problems(saved: dict[str, Any], run: ResolvedRun, *, lanes_are_set: bool) -> list[str]:
    problems, before, now = [], saved["identity"], run.identity()
    lanes, dp = before["data.lanes"], run.topology.dp
    if lanes % dp and not lanes_are_set:
        problems.append(
            f"the run reads its corpus in {lanes} lanes, which {dp} data-parallel ranks cannot share: use one of "
            f"{divisors(lanes)} of them"
        )
        now["data.lanes"] = lanes
    others = differences(before, now)
    if others:
        others.append(
            f"the checkpoints in {run.checkpoints} belong to another run (above): use the settings they were "
            "written with, or choose another --run-dir"
        )
    return problems + others


def _collect_problems(problems: list[str], read: Any) -> Any:
    try:
        return read()
    except ConfigError as error:
        problems += error.problems
        return None


def _device_problems(model: ModelConfig, device: torch.device) -> list[str]:
    if model.attention == "triton" and device.type == "cpu":
        return ["model.attention triton needs a GPU, and this rank runs on a CPU: use --model.attention auto"]
    return []


def _corpus_problems(config: RunConfig, manifest: Manifest, vocabulary: Vocabulary) -> list[str]:
    problems = []
    if manifest.sequence_length > config.model.max_positions:
        problems.append(
            f"the sequence length of corpus {config.corpus} ({manifest.sequence_length}) exceeds model.max_positions "
            f"({config.model.max_positions}): raise it, or prepare the corpus with a shorter --sequence-length"
        )
    if vocabulary.fingerprint != manifest.vocabulary["fingerprint"]:
        problems.append(
            f"the vocabulary in {config.corpus} is not the one its shards were written with: restore its "
            "tokenizer.json, or prepare the corpus again"
        )
    if config.model.vocab_size not in (None, vocabulary.size):
        problems.append(
            f"model.vocab_size ({config.model.vocab_size}) is not that of corpus {config.corpus} ({vocabulary.size}): "
            "leave it out, it is taken from the corpus"
        )
    if config.model.segment_types < 2:
        problems.append(
            f"model.segment_types ({config.model.segment_types}) must be at least 2: samples have two segments"
        )
    return problems
