"""What all ranks together know about what cannot be read: a step's batches, or a shard less on every rank.

    this rank's batches, or a fault --any rank?--> no:  train on
                                                   yes: a bad shard    -> RUN_DIR/quarantine.json, the step is read anew
                                                        anything else  -> the run ends on every rank, with the reason

Which samples a step holds is a function of (order, set of shards in quarantine), the rule is `SampleOrder.locate`. The
set changes between steps only, on all ranks alike, and is on disk before a step is trained without the shard; a run
that goes on begins with it. Nothing of a shard is trained on before the whole file has been verified.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.shards import TRAIN, Manifest, ShardError
from pmlm_dist.data.batch import Batch
from pmlm_dist.data.cache import CacheError
from pmlm_dist.data.loader import training_batches
from pmlm_dist.data.mixture import Mixture
from pmlm_dist.data.worker_pool import WorkerError
from pmlm_dist.metrics.run_log import RunLog
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.supervision.signals import stop_signals_blocked
from pmlm_dist.training.resolve import ResolvedRun
from pmlm_dist.training.stopping import Prefetcher, StopAgreement

QUARANTINE = "quarantine.json"
_FAULTS = (ShardError, CacheError, WorkerError)


class CorpusReadError(RuntimeError):
    """Another rank cannot go on reading."""


@dataclass(frozen=True)
class BadShard:
    """A shard that could not be read."""

    corpus: str
    shard: str
    sha256: str
    samples: int
    offset: int | None
    """Byte at which it breaks, where that can be told."""
    error: str


class TrainBatches:
    """The batches of the steps after `state`, which all ranks have."""

    def __init__(self, run: ResolvedRun, state: RunState, log: RunLog):
        self._run, self._log = run, log
        self._samples_consumed = state.samples_consumed
        self._manifests = [Manifest.load(source.folder) for source in run.training]
        self._bad = run.topology.broadcast_object(
            load_quarantine(run.config.run_dir) if run.topology.is_rank_zero else None
        )
        self._check_limit()
        self._arriving = self._start()

    def next_micro_batches(self, stop: StopAgreement) -> list[Batch]:
        """This rank's micro-batches of the next step; every rank must call.

        Raises `Stopped`; ShardError on every rank above `data.quarantine_limit`; what no rule covers on the rank that
        met it, and ReadingError on the others.
        """
        while True:
            batches, fault = self._attempt(stop)
            (is_broken,) = self._run.topology.all_reduce_max(int(fault is not None))
            if not is_broken:
                self._samples_consumed += self._run.engine.global_batch
                return batches
            self._agree_on_quarantine(fault)

    def log_progress(self, step: int) -> None:
        """Write how far each source has been read, and what is in quarantine."""
        sources = self._run.training
        counts = Mixture([source.weight for source in sources], lanes=self._run.lanes).counts(self._samples_consumed)
        scalars: dict[str, float | None] = {
            "data/quarantined_shards": len(self._own()),
            "data/quarantined_samples": self._samples_lost(),
        }
        for source, manifest, count in zip(sources, self._manifests, counts, strict=True):
            scalars[f"data/samples/{source.name}"] = count
            scalars[f"data/epochs/{source.name}"] = count / manifest.splits[TRAIN].samples
        self._log.data_progress(scalars, step=step)

    def close(self) -> None:
        """End the workers."""
        self._arriving.close()

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
                quarantined={shard.sha256 for shard in self._bad},
            )
        return Prefetcher(batches, count=run.engine.accumulation(run.topology.dp))

    def _attempt(self, stop: StopAgreement) -> tuple[list[Batch], Exception | None]:
        try:
            return stop.wait_for(self._arriving), None
        except _FAULTS as fault:
            return [], fault

    def _agree_on_quarantine(self, fault: Exception | None) -> None:
        """Put what ranks could not read into quarantine and begin this step anew; every rank must call."""
        faults = self._run.topology.all_gather_object((None if fault is None else str(fault), self._bad_shard(fault)))
        for rank, (message, shard) in enumerate(faults):
            if message is not None and shard is None:
                _end(fault, rank, message)
        self.close()
        new = {shard.sha256: shard for _, shard in faults if shard is not None}
        self._bad = (*self._bad, *new.values())
        for shard in new.values():
            at = "" if shard.offset is None else f" at byte {shard.offset}"
            self._log.info(
                f"quarantine: {shard.shard} of {shard.corpus}, {shard.samples} samples, broken{at} ({shard.error}); "
                "its samples are left out from here on"
            )
        if self._run.topology.is_rank_zero:
            save_quarantine(self._run.config.run_dir, self._bad)
        self._check_limit()
        self._arriving = self._start()

    def _bad_shard(self, fault: Exception | None) -> BadShard | None:
        shard = fault.shard if isinstance(fault, ShardError) else None
        for source, manifest in zip(self._run.training, self._manifests, strict=True):
            if shard is not None and shard in manifest.splits[TRAIN].shards:
                offset = fault.offset if isinstance(fault, ShardError) else None
                return BadShard(source.name, shard.name, shard.sha256, shard.samples, offset, str(fault))
        return None

    def _own(self) -> dict[str, int]:
        """sha256 and samples of the shards in quarantine that this run's corpora hold."""
        of_corpora = {shard.sha256: shard for manifest in self._manifests for shard in manifest.splits[TRAIN].shards}
        known = {shard.sha256 for shard in self._bad} & of_corpora.keys()
        return {sha256: of_corpora[sha256].samples for sha256 in known}

    def _samples_lost(self) -> int:
        return sum(self._own().values())

    def _check_limit(self) -> None:
        lost, limit = self._samples_lost(), self._run.config.data.quarantine_limit
        total = sum(manifest.splits[TRAIN].samples for manifest in self._manifests)
        if lost > limit * total:
            names = ", ".join(f"{shard.shard} of {shard.corpus} ({shard.error})" for shard in self._bad[-3:])
            raise ShardError(
                f"{lost} of {total} training samples ({lost / total:.2%}) lie in shards that cannot be read, more than "
                f"data.quarantine_limit ({limit:.2%}) allows; the last of them: {names}. Restore them and remove them "
                f"from {self._run.config.run_dir / QUARANTINE}, or raise --data.quarantine-limit"
            )


def synchronized_batches(batches: Iterator[Batch], topology: Topology) -> Iterator[Batch]:
    """`batches`, as many on every rank; every rank must take all of them.

    What a rank cannot read ends all: raises its own error there, and ReadingError on the others. Nobody waits for it.
    """
    while True:
        batch, fault = None, None
        try:
            batch = next(batches, None)
        except _FAULTS as error:
            fault = error
        (is_broken,) = topology.all_reduce_max(int(fault is not None))
        if is_broken:
            told = topology.all_gather_object(None if fault is None else str(fault))
            _end(fault, *next((rank, message) for rank, message in enumerate(told) if message is not None))
        if batch is None:
            return
        yield batch


def _end(fault: Exception | None, rank: int, message: str) -> NoReturn:
    raise (fault or CorpusReadError(f"rank {rank} cannot go on reading: {message}"))


def load_quarantine(run_dir: Path) -> tuple[BadShard, ...]:
    """The shards that a run has put into quarantine; ConfigError for a file that is not of this kind."""
    path = run_dir / QUARANTINE
    try:
        return tuple(BadShard(**shard) for shard in json.loads(path.read_text(encoding="utf-8"))["shards"])
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{path} cannot be read ({error}): restore it, or remove it to read all shards"]) from error


def save_quarantine(run_dir: Path, shards: tuple[BadShard, ...]) -> None:
    """Write `run_dir`/quarantine.json: under a temporary name, to the disk, then renamed."""
    path, temporary = run_dir / QUARANTINE, run_dir / f".{QUARANTINE}"
    with temporary.open("w", encoding="utf-8") as out:
        json.dump({"shards": [dataclasses.asdict(shard) for shard in shards]}, out, indent=1)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)
