"""Loader: the micro-batches of one rank, built by worker processes.

    micro step i --order.py--> sample indices --stream.py--> token ids --masking/--> Batch
                 `------- one worker (worker_pool.py) builds the whole micro-batch -------'

Micro-batch i is a function of i, so workers take turns and any number of them gives the same stream of batches. The
stream is a function of (corpora, masking, seed, lanes, quarantined shards, share of this rank, samples consumed).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from pmlm_dist.config import ConfigError, DataConfig, MaskingConfig
from pmlm_dist.corpus.shards import VALIDATION, ShardError
from pmlm_dist.data.batch import Batch, build_batch
from pmlm_dist.data.cache import CacheError
from pmlm_dist.data.order import BatchShare, micro_batch_samples
from pmlm_dist.data.stream import CorpusSource, Sample, ShardAccess, SplitReader, TrainingStream
from pmlm_dist.data.worker_pool import WorkerPool
from pmlm_dist.masking.blockwise import SpecialIds

VALIDATION_SEED = 0x5EED
"""Seed of the validation masks, independent of the run's seed: every run is validated on the same predictions."""

Arrays = dict[str, np.ndarray]
"""A batch in transit from a worker: pickled arrays in one message.

Tensors would be sent through shared memory with one file descriptor each, which takes longer than masking them.
"""


@dataclass(frozen=True)
class BatchSource:
    """Corpora and masking: how samples become batches."""

    corpus: CorpusSource
    """Source of the validation samples, and of the training samples without a `mixture`."""
    special: SpecialIds
    masking: MaskingConfig
    seed: int
    """Seed of sample order and masks."""
    mixture: tuple[CorpusSource, ...] = ()
    """Weighted training sources."""

    @property
    def training_sources(self) -> tuple[CorpusSource, ...]:
        return self.mixture or (self.corpus,)

    @property
    def sequence_length(self) -> int:
        """S: tokens of a sequence, from the manifest."""
        return self.corpus.manifest.sequence_length

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


class BatchLoader(Iterator[Batch]):
    """Micro-batches in order; `close` stops the workers that build them."""

    def __init__(
        self,
        builder: _TrainingBuilder | _ValidationBuilder,
        numbers: Iterable[int],
        *,
        data: DataConfig,
        pin_memory: bool,
    ):
        # Compiled before the workers start: they then load the machine code from numba's cache on disk.
        special = builder.source.special
        builder.source.batch([Sample(np.array([special.cls, special.sep], dtype=np.int64), 0, 0)], seed=0)
        self._pin_memory = pin_memory
        self._arrays = WorkerPool(
            builder, numbers, workers=data.workers, prefetch=data.prefetch, timeout_s=data.timeout_s, preload=__name__
        )

    def __next__(self) -> Batch:
        try:
            batch = Batch.from_arrays(next(self._arrays))
        except BaseException:
            self.close()
            raise
        return batch.pin_memory() if self._pin_memory else batch

    def close(self) -> None:
        """Stop the workers; the iterator is then exhausted."""
        self._arrays.close()


def training_batches(
    source: BatchSource,
    *,
    lanes: int,
    share: BatchShare,
    samples_consumed: int = 0,
    loading: DataConfig | None = None,
    pin_memory: bool = False,
    quarantined: Set[str] = frozenset(),
) -> BatchLoader:
    """Return this rank's micro-batches as an infinite iterator, after `samples_consumed` samples of the whole run.

    `lanes`: from `choose_lanes`. `quarantined`: sha256 of shards to exclude. Workers start immediately; close the
    loader to stop them. Iteration raises ShardError for a missing or corrupt shard, CacheError, and WorkerError.
    """
    if lanes % share.dp_size or share.global_batch % lanes:
        raise ValueError(
            f"lanes ({lanes}) must be a multiple of the data-parallel size ({share.dp_size}) and divide the "
            f"global batch ({share.global_batch})"
        )
    data = loading or DataConfig()
    access = ShardAccess.from_config(data)
    builder = _TrainingBuilder(source, lanes, share, samples_consumed, access, frozenset(quarantined))
    return BatchLoader(builder, itertools.count(), data=data, pin_memory=pin_memory)


def validation_batches(
    source: BatchSource, *, samples: int, share: BatchShare, loading: DataConfig | None = None, pin_memory: bool = False
) -> BatchLoader:
    """Return this rank's share of the first `samples` validation samples (all if there are fewer), with fixed masks.

    Every rank yields the same number of batches of the same shape: rows past the last sample repeat it with weight 0.
    The global batch of `share` is ignored. Raises ConfigError if the corpus has no validation samples.
    """
    available = source.corpus.manifest.splits[VALIDATION].samples
    if not available:
        raise ConfigError(
            [f"corpus {source.corpus.folder} has no validation samples: prepare it with a validation split"]
        )
    samples, data = min(samples, available), loading or DataConfig()
    share = dataclasses.replace(share, global_batch=share.micro_batch * share.dp_size)
    builder = _ValidationBuilder(source, samples, share, ShardAccess.from_config(data))
    numbers = range(-(-samples // share.global_batch))
    return BatchLoader(builder, numbers, data=data, pin_memory=pin_memory)


@dataclass(frozen=True)
class _TrainingBuilder:
    """Builds micro-batch i of the training split."""

    source: BatchSource
    lanes: int
    share: BatchShare
    samples_consumed: int
    access: ShardAccess
    quarantined: frozenset[str]

    expected_errors = (ShardError, CacheError)

    # On first use, that is in the worker: open files cannot be pickled.
    @cached_property
    def _stream(self) -> TrainingStream:
        return TrainingStream(
            self.source.training_sources,
            lanes=self.lanes,
            seed=self.source.seed,
            access=self.access,
            quarantined=self.quarantined,
        )

    def build(self, number: int, *, set_progress: Callable[[int], None]) -> Arrays:
        samples = []
        for t in micro_batch_samples(self.samples_consumed, number, share=self.share):
            set_progress(t)
            samples.append(self._stream[t])
        return self.source.batch(samples, seed=self.source.seed).arrays()

    def describe(self, position: int) -> str:
        return self._stream.describe(position)


@dataclass(frozen=True)
class _ValidationBuilder:
    """Builds micro-batch i of the validation samples; the last ones are padded with rows of weight 0."""

    source: BatchSource
    samples: int
    share: BatchShare
    access: ShardAccess

    expected_errors = (ShardError, CacheError)

    @cached_property
    def _reader(self) -> SplitReader:
        return SplitReader(self.source.corpus, split=VALIDATION, access=self.access)

    def build(self, number: int, *, set_progress: Callable[[int], None]) -> Arrays:
        samples = []
        numbers = micro_batch_samples(0, number, share=self.share)
        for sample in numbers:
            set_progress(sample)
            samples.append(self._reader.sample(min(sample, self.samples - 1)))
        batch = self.source.batch(samples, seed=VALIDATION_SEED)
        is_sample_B = torch.tensor([sample < self.samples for sample in numbers])
        return dataclasses.replace(batch, weights_BM=batch.weights_BM * is_sample_B[:, None]).arrays()

    def describe(self, position: int) -> str:
        return f"validation sample {min(position, self.samples - 1)} of {self.source.corpus.name}"
