"""Loader: the batches of a rank, prepared by worker processes.

    micro step i --order.py--> sample numbers --stream.py--> token ids --masking/--> Batch
                 `-------- one worker (workers.py) builds the whole micro-batch -------'

Micro-batch i is a function of i, so that workers take turns and the stream of batches is the same for any number of
them. It depends on (corpora, masking, seed, lanes, shards in quarantine, share of this rank, samples consumed) alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from pmlm_dist.config import DataConfig, MaskingConfig, raise_if_any
from pmlm_dist.corpus.shards import VALIDATION, Manifest, ShardError
from pmlm_dist.data.batch import Batch, build_batch
from pmlm_dist.data.cache import CacheError
from pmlm_dist.data.order import BatchShare, micro_batch_samples
from pmlm_dist.data.stream import CorpusSource, Sample, ShardAccess, SplitReader, TrainingStream
from pmlm_dist.data.worker_pool import WorkerPool
from pmlm_dist.masking.blockwise import SpecialIds

VALIDATION_SEED = 0x5EED
"""Seed of the validation masks: the same held-out task for every run, whatever its own seed."""


@dataclass(frozen=True)
class BatchSource:
    """Where samples come from and how they become batches."""

    corpus: Path
    """Folder with manifest and vocabulary, and with the shards unless there is an address."""
    special: SpecialIds
    """Special ids of the corpus' vocabulary."""
    masking: MaskingConfig
    """How samples are masked."""
    seed: int
    """Seed of sample order and masks."""
    address: str | None = None
    """Where the shards of `corpus` are fetched from."""
    mixture: tuple[CorpusSource, ...] = ()
    """What training reads, by weight; empty: `corpus` alone. Validation always reads `corpus`."""

    @property
    def own(self) -> CorpusSource:
        """`corpus` as what is read."""
        return CorpusSource(self.corpus, self.address)

    @property
    def training(self) -> tuple[CorpusSource, ...]:
        """What training reads."""
        return self.mixture or (self.own,)

    @cached_property
    def sequence_length(self) -> int:
        """S: tokens of a sequence, from the manifest."""
        return Manifest.load(self.corpus).sequence_length

    def batch(self, samples: list[Sample], *, seed: int) -> Batch:
        """Mask and lay out `samples`."""
        return build_batch(
            [sample.tokens for sample in samples],
            [sample.sample_id for sample in samples],
            [sample.epoch for sample in samples],
            sequence_length=self.sequence_length,
            masking=self.masking,
            special=self.special,
            seed=seed,
        )


class Batches(Iterator[Batch]):
    """Micro-batches, in order; `close` ends the workers that build them."""

    def __init__(self, builder: _TrainingBatches | _ValidationBatches, numbers: Iterable[int], loading: Loading):
        _compile(builder.source)
        data, self._pin_memory = loading.data, loading.pin_memory
        self._arrays = WorkerPool(
            builder,
            numbers,
            workers=data.workers,
            prefetch=data.prefetch,
            timeout_s=data.timeout_s,
            preload=__name__,
        )

    def __next__(self) -> Batch:
        try:
            batch = Batch.from_arrays(next(self._arrays))
        except BaseException:
            self.close()
            raise
        return batch.pin_memory() if self._pin_memory else batch

    def close(self) -> None:
        """End the workers; there are no more batches then."""
        self._arrays.close()


@dataclass(frozen=True)
class Loading:
    """How batches are loaded: the settings, and whether into page-locked memory."""

    data: DataConfig
    pin_memory: bool = False


def training_batches(
    source: BatchSource,
    *,
    lanes: int,
    share: BatchShare,
    samples_consumed: int = 0,
    loading: DataConfig | None = None,
    pin_memory: bool = False,
    quarantined: Set[str] = frozenset(),
) -> Batches:
    """This rank's micro-batches, without end, beginning after `samples_consumed` samples of the whole run.

    `lanes` as `choose_lanes` gives them; `quarantined`: sha256 of shards that are not read. Workers start at once;
    close the batches to end them. Raises ShardError for a shard that is missing or damaged, CacheError, WorkerError.
    """
    if lanes % share.dp_size or share.global_batch % lanes:
        raise ValueError(
            f"lanes ({lanes}) must be a multiple of the data-parallel size ({share.dp_size}) and divide the "
            f"global batch ({share.global_batch})"
        )
    data = loading or DataConfig()
    builder = _TrainingBatches(source, lanes, share, samples_consumed, ShardAccess.of(data), frozenset(quarantined))
    return Batches(builder, itertools.count(), Loading(data, pin_memory))


def validation_batches(
    source: BatchSource,
    *,
    samples: int,
    share: BatchShare,
    loading: DataConfig | None = None,
    pin_memory: bool = False,
) -> Batches:
    """This rank's share of the first `samples` held-out samples (at most what there is), masked alike in every run.

    Every rank yields the same number of batches of the same shape: entries past the last sample repeat it with all
    weights 0. Of `share` the global batch does not matter. Raises ConfigError when there are no validation samples.
    """
    available = Manifest.load(source.corpus).splits[VALIDATION].samples
    if not available:
        raise_if_any([f"corpus {source.corpus} has no validation samples: prepare one with a validation split"])
    samples, data = min(samples, available), loading or DataConfig()
    share = dataclasses.replace(share, global_batch=share.micro_batch * share.dp_size)
    builder = _ValidationBatches(source, samples, share, ShardAccess.of(data))
    return Batches(builder, range(-(-samples // share.global_batch)), Loading(data, pin_memory))


@dataclass(frozen=True)
class _TrainingBatches:
    """Micro-batch i of the training split; the stream is opened by whoever reads first: the worker."""

    source: BatchSource
    lanes: int
    share: BatchShare
    samples_consumed: int
    access: ShardAccess
    quarantined: frozenset[str]

    expected = (ShardError, CacheError)

    @cached_property
    def _stream(self) -> TrainingStream:
        source = self.source
        return TrainingStream(
            source.training, lanes=self.lanes, seed=source.seed, access=self.access, quarantined=self.quarantined
        )

    def build(self, number: int, *, mark: Callable[[int], None]) -> Arrays:
        """Micro-batch `number` as arrays."""
        samples = []
        for t in micro_batch_samples(self.samples_consumed, number, share=self.share):
            mark(t)
            samples.append(self._stream[t])
        return self.source.batch(samples, seed=self.source.seed).arrays()

    def describe(self, place: int) -> str:
        """Which sample of which shard global sample `place` is."""
        return self._stream.describe(place)


@dataclass(frozen=True)
class _ValidationBatches:
    """Micro-batch i of the validation samples, filled up with copies of weight 0."""

    source: BatchSource
    samples: int
    share: BatchShare
    access: ShardAccess

    expected = (ShardError, CacheError)

    @cached_property
    def _reader(self) -> SplitReader:
        return SplitReader(self.source.own, split=VALIDATION, access=self.access)

    def build(self, number: int, *, mark: Callable[[int], None]) -> Arrays:
        """Micro-batch `number` as arrays."""
        samples = []
        numbers = micro_batch_samples(0, number, share=self.share)
        for sample in numbers:
            mark(sample)
            samples.append(self._reader.numbered(min(sample, self.samples - 1)))
        batch = self.source.batch(samples, seed=VALIDATION_SEED)
        real_B = torch.tensor([sample < self.samples for sample in numbers])
        return dataclasses.replace(batch, weights_BM=batch.weights_BM * real_B[:, None]).arrays()

    def describe(self, place: int) -> str:
        """Which validation sample `place` is."""
        return f"validation sample {min(place, self.samples - 1)} of {self.source.own.name}"


Arrays = dict[str, np.ndarray]
"""A batch as it goes through the pipe from a worker, by value in one message.

Tensors would go through shared memory, a file descriptor each, which takes longer than masking them.
"""


def _compile(source: BatchSource) -> None:
    """Compile masking once, before workers start: each of them then loads machine code from numba's cache."""
    tokens = np.array([source.special.cls, source.special.sep], dtype=np.int64)
    source.batch([Sample(tokens, 0, 0)], seed=0)
