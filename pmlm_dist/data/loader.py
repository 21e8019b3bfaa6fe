"""Loader: the batches of a rank, prepared by worker processes.

    micro step i --order.py--> sample numbers --stream.py--> token ids --masking/--> Batch
                 `-------------- one worker builds the whole micro-batch --------------'

Micro-batch i is a function of i, so that workers take turns and the stream of batches is the same for any number of
them. It depends on (corpus, masking, seed, lanes, share of this rank, samples consumed) alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import multiprocessing.context
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pmlm_dist.config import DataConfig, MaskingConfig, refuse
from pmlm_dist.corpus.shards import VALIDATION, Manifest, ShardError
from pmlm_dist.data.batch import Batch, build_batch
from pmlm_dist.data.order import BatchShare, micro_batch_samples
from pmlm_dist.data.stream import Sample, SplitReader, TrainingStream
from pmlm_dist.masking.blockwise import SpecialIds

VALIDATION_SEED = 0x5EED
"""Seed of the validation masks: the same held-out task for every run, whatever its own seed."""


@dataclass(frozen=True)
class BatchSource:
    """Where samples come from and how they become batches."""

    corpus: Path
    """Folder with manifest and shards."""
    special: SpecialIds
    """Special ids of the corpus' vocabulary."""
    masking: MaskingConfig
    """How samples are masked."""
    seed: int
    """Seed of sample order and masks."""

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


def training_batches(
    source: BatchSource,
    *,
    lanes: int,
    share: BatchShare,
    samples_consumed: int = 0,
    loading: DataConfig | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This rank's micro-batches, without end, beginning after `samples_consumed` samples of the whole run.

    `lanes` as `choose_lanes` gives them. Workers start at once; close the iterator to end them. Raises ShardError for a
    shard that is missing or damaged.
    """
    if lanes % share.dp_size or share.global_batch % lanes:
        raise ValueError(
            f"lanes ({lanes}) must be a multiple of the data-parallel size ({share.dp_size}) and divide the "
            f"global batch ({share.global_batch})"
        )
    batches = _TrainingBatches(source, lanes=lanes, share=share, samples_consumed=samples_consumed)
    return _load(batches, itertools.count(), loading=loading or DataConfig(), pin_memory=pin_memory)


def validation_batches(
    source: BatchSource,
    *,
    samples: int,
    share: BatchShare,
    loading: DataConfig | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This rank's share of the first `samples` held-out samples (at most what there is), masked alike in every run.

    Every rank yields the same number of batches of the same shape: entries past the last sample repeat it with all
    weights 0. Of `share` the global batch does not matter. Raises ConfigError when there are no validation samples.
    """
    available = Manifest.load(source.corpus).splits[VALIDATION].samples
    if not available:
        refuse([f"corpus {source.corpus} has no validation samples: prepare one with a validation split"])
    samples = min(samples, available)
    share = dataclasses.replace(share, global_batch=share.micro_batch * share.dp_size)
    batches = _ValidationBatches(source, samples=samples, share=share)
    steps = -(-samples // share.global_batch)
    return _load(batches, range(steps), loading=loading or DataConfig(), pin_memory=pin_memory)


class _Batches(Protocol):
    source: BatchSource

    def __getitem__(self, micro_step: int, /) -> Batch: ...


class _TrainingBatches:
    """Micro-batch i of the training split; the stream is opened by whoever reads first: the worker."""

    def __init__(self, source: BatchSource, *, lanes: int, share: BatchShare, samples_consumed: int):
        self.source = source
        self._lanes = lanes
        self._share = share
        self._samples_consumed = samples_consumed

    @cached_property
    def _stream(self) -> TrainingStream:
        return TrainingStream(self.source.corpus, lanes=self._lanes, seed=self.source.seed)

    def __getitem__(self, micro_step: int) -> Batch:
        numbers = micro_batch_samples(self._samples_consumed, micro_step, share=self._share)
        return self.source.batch([self._stream[t] for t in numbers], seed=self.source.seed)


class _ValidationBatches:
    """Micro-batch i of the validation samples, filled up with copies of weight 0."""

    def __init__(self, source: BatchSource, *, samples: int, share: BatchShare):
        self.source = source
        self._samples = samples
        self._share = share

    @cached_property
    def _reader(self) -> SplitReader:
        return SplitReader(self.source.corpus, split=VALIDATION)

    def __getitem__(self, micro_step: int) -> Batch:
        numbers = micro_batch_samples(0, micro_step, share=self._share)
        samples = [self._reader.numbered(min(number, self._samples - 1)) for number in numbers]
        batch = self.source.batch(samples, seed=VALIDATION_SEED)
        real_B = torch.tensor([number < self._samples for number in numbers])
        return dataclasses.replace(batch, weights_BM=batch.weights_BM * real_B[:, None])


Arrays = dict[str, np.ndarray]


class _ArraysOrError(Dataset["Arrays | ShardError"]):
    """Batches as arrays, or the shard's error as a value: what goes through the pipe from a worker.

    Arrays go by value in one message; tensors would go through shared memory, a file descriptor each, which takes
    longer than masking them. An error raised in a worker would arrive wrapped in torch's report of it.
    """

    def __init__(self, batches: _Batches):
        self._batches = batches

    def __getitem__(self, micro_step: int) -> Arrays | ShardError:
        try:
            return self._batches[micro_step].arrays()
        except ShardError as error:
            return error


def _load(batches: _Batches, micro_steps: Iterable[int], *, loading: DataConfig, pin_memory: bool) -> Iterator[Batch]:
    _compile(batches.source)
    loader = DataLoader(
        _ArraysOrError(batches),
        collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]
        batch_size=None,
        sampler=micro_steps,
        num_workers=loading.workers,
        prefetch_factor=loading.prefetch if loading.workers else None,
        multiprocessing_context=_worker_context() if loading.workers else None,
        worker_init_fn=_end_with_parent,
        # A generator of its own: the loader draws a seed for its workers; the model's random numbers must not move.
        generator=torch.Generator(),
    )
    return _until_closed(iter(loader), pin_memory=pin_memory)


def _as_it_is(arrays: Arrays | ShardError) -> Arrays | ShardError:
    return arrays


def _until_closed(loaded: Iterator[Arrays | ShardError], *, pin_memory: bool) -> Iterator[Batch]:
    try:
        for arrays in loaded:
            if isinstance(arrays, ShardError):
                raise arrays
            batch = Batch.from_arrays(arrays)
            yield batch.pin_memory() if pin_memory else batch
    finally:
        # The last reference: torch's iterator ends its workers when it goes.
        del loaded


def _worker_context() -> multiprocessing.context.BaseContext:
    """How workers are started: forked from a server process that has imported this module and done nothing else.

    `fork` would copy a process with threads (torch, gloo, CUDA, MPI) whose locks may be held at that moment, and the
    memory that an InfiniBand card has registered. `spawn` would import torch anew in every worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _end_with_parent(_worker: int) -> None:
    """End this worker when the training process is gone.

    torch's own watchdog looks at the parent by process id, which is the fork server here and outlives a killed trainer.
    """
    threading.Thread(target=_watch_parent, name="end-with-parent", daemon=True).start()


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker has a parent to watch"
    parent.join()
    os._exit(1)


def _compile(source: BatchSource) -> None:
    """Compile masking once, before workers start: each of them then loads machine code from numba's cache."""
    tokens = np.array([source.special.cls, source.special.sep], dtype=np.int64)
    source.batch([Sample(tokens, 0, 0)], seed=0)
