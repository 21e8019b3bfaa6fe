"""Batches of the training steps, and the agreement of all ranks on shards that cannot be read.

    this rank's batches, or an error --on any rank?--> no:  train
                                                       yes: a corrupt shard -> quarantine.json, the step is read again
                                                            anything else   -> every rank raises, with the reason

The samples of a step are a function of (order, quarantined shards) (`SampleOrder.locate`). The quarantine changes
between steps only, on all ranks alike, and is on disk before a step is trained without the shard; a resumed run starts
with it. A shard is verified as a whole before any of its samples is used.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.shards import TRAIN, Shard, ShardError
from pmlm_dist.data.batch import Batch
from pmlm_dist.data.cache import CacheError
from pmlm_dist.data.loader import training_batches
from pmlm_dist.data.mixture import Mixture
from pmlm_dist.data.worker_pool import WorkerError
from pmlm_dist.files import write_atomically
from pmlm_dist.json_input import parse_json
from pmlm_dist.metrics.run_log import RunLog
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.supervision.signals import stop_signals_blocked
from pmlm_dist.training.resolve import ResolvedRun
from pmlm_dist.training.stopping import Prefetcher, Readiness, StopAgreement

QUARANTINE = "quarantine.json"
_READ_ERRORS = (ShardError, CacheError, WorkerError)


class CorpusReadError(RuntimeError):
    """Another rank cannot read its batches."""


@dataclass(frozen=True)
class CorruptShard:
    """A shard that could not be read."""

    corpus: str
    shard: str
    sha256: str
    samples: int
    offset: int | None
    """Byte of the first error, if known."""
    error: str


class TrainBatches:
    """The training batches after `state`, the same on all ranks."""

    def __init__(self, run: ResolvedRun, state: RunState, log: RunLog):
        self._run, self._log = run, log
        self._samples_consumed = state.samples_consumed
        self._manifests = [source.manifest for source in run.training]
        self._quarantine = run.topology.broadcast_object(
            load_quarantine(run.config.run_dir) if run.topology.is_rank_zero else None
        )
        self._check_limit()
        self._prefetcher = self._start()

    def next_micro_batches(self, stop: StopAgreement, *, is_last: bool) -> list[Batch]:
        """Return this rank's micro-batches of the next step, and start to read the step after it; every rank calls.

        Raises `Stopped`; ShardError on every rank above `data.quarantine_limit`; any other read error on its own rank,
        and CorpusReadError on the others.
        """
        while not stop.wait_for(self._prefetcher):
            self._agree_on_quarantine(self._error())
        self._samples_consumed += self._run.engine.global_batch
        batches = self._prefetcher.take()
        if not is_last:
            self._prefetcher.start()
        return batches

    def begin_next(self, stop: StopAgreement) -> None:
        """Begin the agreement on the batches of the next step, which are being read; every rank calls."""
        stop.begin(self._prefetcher.readiness())

    def log_progress(self, step: int) -> None:
        """Log samples and epochs read of each source, and the quarantine."""
        sources = self._run.training
        counts = Mixture([source.weight for source in sources], lanes=self._run.lanes).counts(self._samples_consumed)
        scalars: dict[str, float | None] = {
            "data/quarantined_shards": len(self._quarantined()),
            "data/quarantined_samples": sum(shard.samples for shard in self._quarantined()),
        }
        for source, manifest, count in zip(sources, self._manifests, counts, strict=True):
            scalars[f"data/samples/{source.name}"] = count
            scalars[f"data/epochs/{source.name}"] = count / manifest.splits[TRAIN].samples
        self._log.scalars(scalars, step=step)

    def close(self) -> None:
        self._prefetcher.close()

    def _start(self) -> Prefetcher[Batch]:
        run = self._run
        with stop_signals_blocked():
            batches = training_batches(
                run.source,
                lanes=run.lanes,
                share=run.share,
                samples_consumed=self._samples_consumed,
                loading=run.config.data,
                pin_memory=run.topology.device.type == "cuda",
                quarantined={shard.sha256 for shard in self._quarantine},
            )
        return Prefetcher(batches, count=run.engine.accumulation(run.topology.dp))

    def _error(self) -> Exception | None:
        """Return the error of reading this rank's batches; None if there is none."""
        if self._prefetcher.readiness() is not Readiness.FAILED:
            return None
        try:
            self._prefetcher.take()
        except Exception as error:
            return error
        return None

    def _agree_on_quarantine(self, error: Exception | None) -> None:
        """Quarantine the shards that ranks could not read and restart the step's data; every rank calls."""
        errors = self._run.topology.all_gather_object(
            (None if error is None else str(error), self._corrupt_shard(error))
        )
        for rank, (message, shard) in enumerate(errors):
            if message is not None and shard is None:
                _raise_read_error(error, rank, message)
        self.close()
        new = {shard.sha256: shard for _, shard in errors if shard is not None}
        self._quarantine = (*self._quarantine, *new.values())
        for shard in new.values():
            at = "" if shard.offset is None else f" at byte {shard.offset}"
            self._log.info(
                f"quarantine: {shard.shard} of {shard.corpus}, {shard.samples} samples, corrupt{at} ({shard.error}); "
                "its samples are skipped from here on"
            )
        if self._run.topology.is_rank_zero:
            save_quarantine(self._run.config.run_dir, self._quarantine)
        self._check_limit()
        self._prefetcher = self._start()

    def _corrupt_shard(self, error: Exception | None) -> CorruptShard | None:
        if not isinstance(error, ShardError):
            return None
        for source, manifest in zip(self._run.training, self._manifests, strict=True):
            if (shard := error.shard) in manifest.splits[TRAIN].shards:
                return CorruptShard(source.name, shard.name, shard.sha256, shard.samples, error.offset, str(error))
        return None

    def _quarantined(self) -> list[Shard]:
        """Return the quarantined shards of this run's corpora."""
        known = {shard.sha256 for shard in self._quarantine}
        shards = {shard.sha256: shard for manifest in self._manifests for shard in manifest.splits[TRAIN].shards}
        return [shard for sha256, shard in shards.items() if sha256 in known]

    def _check_limit(self) -> None:
        lost, limit = sum(shard.samples for shard in self._quarantined()), self._run.config.data.quarantine_limit
        total = sum(manifest.splits[TRAIN].samples for manifest in self._manifests)
        if lost > limit * total:
            names = ", ".join(f"{shard.shard} of {shard.corpus} ({shard.error})" for shard in self._quarantine[-3:])
            raise ShardError(
                f"{lost} of {total} training samples ({lost / total:.2%}) lie in shards that cannot be read, more than "
                f"data.quarantine_limit ({limit:.2%}) allows; the last of them: {names}. Restore them and remove them "
                f"from {self._run.config.run_dir / QUARANTINE}, or raise --data.quarantine-limit"
            )


def synchronized_batches(batches: Iterator[Batch], topology: Topology) -> Iterator[Batch]:
    """Yield `batches`, equally many on every rank; every rank takes all of them.

    If a rank cannot read a batch, it raises its error and the others raise CorpusReadError: no rank waits for it.
    """
    while True:
        batch, error = None, None
        try:
            batch = next(batches, None)
        except _READ_ERRORS as caught:
            error = caught
        (is_failed,) = topology.all_reduce_max(int(error is not None))
        if is_failed:
            messages = topology.all_gather_object(None if error is None else str(error))
            _raise_read_error(
                error, *next((rank, message) for rank, message in enumerate(messages) if message is not None)
            )
        if batch is None:
            return
        yield batch


def _raise_read_error(error: Exception | None, rank: int, message: str) -> NoReturn:
    raise (error or CorpusReadError(f"rank {rank} cannot read its batches: {message}"))


def load_quarantine(run_dir: Path) -> tuple[CorruptShard, ...]:
    """Return the quarantined shards of a run. Raises `ConfigError` for a file of another format."""
    path = run_dir / QUARANTINE
    try:
        return tuple(CorruptShard(**shard) for shard in parse_json(path.read_bytes())["shards"])
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{path} cannot be read ({error}): restore it, or remove it to read all shards"]) from error


def save_quarantine(run_dir: Path, shards: tuple[CorruptShard, ...]) -> None:
    """Write `run_dir`/quarantine.json, durably."""
    document = {"shards": [dataclasses.asdict(shard) for shard in shards]}
    write_atomically(run_dir / QUARANTINE, json.dumps(document, indent=1) + "\n")
