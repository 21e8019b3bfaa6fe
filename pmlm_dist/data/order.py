"""Sample order: where global sample t lies, and who reads it. Pure in (shard sizes, lanes, seed, bad shards, t).

    epoch e: shards permuted by (seed, e) -> p0 p1 p2 p3 p4 p5 ...
    lane l of L reads p[l], p[l+L], p[l+2L], ..., each shard as it lies, then goes on with epoch e+1
    global sample t is element t // L of lane t mod L
    data-parallel rank r of R reads the samples with t mod R = r (R divides L: whole lanes)

One training step consumes samples [t0, t0 + global batch) under any number of ranks, accumulation and loader workers;
the whole state is the integer `samples_consumed`. Lanes never wait for each other, so their epochs may differ;
every sample of the split is read exactly once in each epoch, by one lane. A shard that cannot be read moves nothing:
its places are filled from the shard that the same lane reads next.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pmlm_dist.config import divisors, raise_if_any
from pmlm_dist.masking.random_state import seed_state

DEFAULT_LANES = 64


class SampleAddress(NamedTuple):
    """Where a sample lies."""

    epoch: int
    """Epoch of the lane that reads it, from 0."""
    shard: int
    """Number of the shard in the manifest."""
    index: int
    """Number of the sample in the shard."""


@dataclass(frozen=True)
class BatchShare:
    """The part of every global batch that one data-parallel rank reads, a micro-batch at a time."""

    global_batch: int
    """Samples of one optimizer step over all ranks."""
    micro_batch: int
    """Samples of one forward pass on one rank."""
    dp_rank: int = 0
    """Number of this data-parallel rank."""
    dp_size: int = 1
    """Number of data-parallel ranks."""

    def __post_init__(self) -> None:
        if not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"dp_rank ({self.dp_rank}) must be at least 0 and below dp_size ({self.dp_size})")
        if self.micro_batch < 1 or self.global_batch < 1 or self.global_batch % (self.micro_batch * self.dp_size):
            raise ValueError(
                f"the global batch ({self.global_batch}) must be a multiple of micro batch ({self.micro_batch}) x "
                f"data-parallel size ({self.dp_size})"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in one optimizer step."""
        return self.global_batch // (self.micro_batch * self.dp_size)


@dataclass(frozen=True)
class _Epoch:
    """One epoch's shards as the lanes read them."""

    shards: tuple[np.ndarray, ...]
    """For each lane: its shards in reading order."""
    ends: tuple[np.ndarray, ...]
    """For each lane: samples up to and including each of its shards."""

    @property
    def lengths(self) -> np.ndarray:
        """Samples of each lane [lanes]."""
        return np.array([ends[-1] for ends in self.ends], dtype=np.int64)


class SampleOrder:
    """The order of all samples of a split, without end.

    `shard_sizes` are the samples of each shard, none 0; `lanes` at most the number of shards. What was computed of an
    epoch is kept (16 bytes a shard), so that both sequential and random access cost a binary search.
    """

    def __init__(self, shard_sizes: tuple[int, ...], *, lanes: int, seed: int):
        if not 1 <= lanes <= len(shard_sizes):
            raise ValueError(
                f"lanes ({lanes}) must be at least 1 and at most the number of shards ({len(shard_sizes)})"
            )
        if min(shard_sizes) < 1:
            raise ValueError(f"shard {shard_sizes.index(min(shard_sizes))} holds no sample: write the corpus anew")
        self.lanes = lanes
        self.seed = seed
        self._sizes = np.array(shard_sizes, dtype=np.int64)
        self._first_samples = np.cumsum(self._sizes) - self._sizes
        self._epochs: list[_Epoch] = []
        # Row e: samples that each lane has read before epoch e.
        self._starts = [np.zeros(lanes, dtype=np.int64)]

    def locate(self, t: int, *, bad: Set[int] = frozenset()) -> SampleAddress:
        """Address of global sample `t`, at least 0, where the shards `bad` cannot be read.

        The place of a sample of a bad shard goes to the shard that its lane reads next, bad ones passed over: element
        i of n to its sample i mod n', in the epoch in which the lane comes to it. All other places stay as they are.
        """
        epoch, nth, index = self._place(t)
        shard = int(self._epochs[epoch].shards[t % self.lanes][nth])
        if shard in bad:
            epoch, shard = next(self._readable_from(t, epoch, nth, bad=bad))
        return SampleAddress(epoch, shard, index % int(self._sizes[shard]))

    def next_shard(self, t: int, *, bad: Set[int] = frozenset()) -> int:
        """The shard that the lane of global sample `t` reads after the one that `t` is read from."""
        epoch, nth, _ = self._place(t)
        _, (_, shard) = itertools.islice(self._readable_from(t, epoch, nth, bad=bad), 2)
        return shard

    def sample_id(self, address: SampleAddress) -> int:
        """Number of a sample in its split, counted through the shards of the manifest."""
        return int(self._first_samples[address.shard]) + address.index

    def _place(self, t: int) -> tuple[int, int, int]:
        """Of global sample `t`: epoch, which of its lane's shards in that epoch, which sample of the shard."""
        element, lane = divmod(t, self.lanes)
        while self._starts[-1][lane] <= element:
            self._add_epoch()
        epoch = bisect.bisect_right(self._starts, element, key=lambda starts: starts[lane]) - 1
        within = element - int(self._starts[epoch][lane])
        ends = self._epochs[epoch].ends[lane]
        nth = int(ends.searchsorted(within, side="right"))
        shard = int(self._epochs[epoch].shards[lane][nth])
        return epoch, nth, within - int(ends[nth]) + int(self._sizes[shard])

    def _readable_from(self, t: int, epoch: int, nth: int, *, bad: Set[int]) -> Iterator[tuple[int, int]]:
        """(epoch, shard) of what the lane of `t` reads from its `nth` shard of `epoch` on, without end or `bad`."""
        if len(bad) >= len(self._sizes):
            raise ValueError(f"none of the {len(self._sizes)} shards can be read")
        for number in itertools.count(epoch):
            if number == len(self._epochs):
                self._add_epoch()
            shards = self._epochs[number].shards[t % self.lanes]
            rest = shards[nth if number == epoch else 0 :]
            yield from ((number, shard) for shard in rest.tolist() if shard not in bad)

    def _add_epoch(self) -> None:
        order = permutation(len(self._sizes), seed=self.seed, epoch=len(self._epochs))
        shards = tuple(order[lane :: self.lanes] for lane in range(self.lanes))
        epoch = _Epoch(shards, tuple(np.cumsum(self._sizes[of_lane]) for of_lane in shards))
        self._epochs.append(epoch)
        self._starts.append(self._starts[-1] + epoch.lengths)


def permutation(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """A random order of 0 .. count-1, by sorting hashes: equal under every NumPy, as its generators need not be."""
    keys = np.array([seed_state(seed, epoch, item) for item in range(count)], dtype=np.uint64)
    return np.argsort(keys, kind="stable")


def micro_batch_samples(samples_consumed: int, micro_step: int, *, share: BatchShare) -> range:
    """Global sample numbers of a rank's `micro_step`-th micro-batch after `samples_consumed` samples of the whole run.

    The step's samples are [t0, t0 + global batch); rank r of R takes those with t mod R = r in order, `micro_batch` of
    them at a time.
    """
    step, part = divmod(micro_step, share.accumulation)
    step_start = samples_consumed + step * share.global_batch
    first = step_start + (share.dp_rank - step_start) % share.dp_size + part * share.micro_batch * share.dp_size
    return range(first, first + share.micro_batch * share.dp_size, share.dp_size)


def choose_lanes(wanted: int | None, *, global_batch: int, shards: int, dp: int) -> int:
    """Number of lanes: `wanted` if it fits the run, else ConfigError with the numbers that would.

    None: the largest divisor of the global batch that is a multiple of the data-parallel size `dp`, at most 64 and at
    most `shards`; the smallest above 64 where none is that small.
    """
    usable = [lanes for lanes in divisors(global_batch) if lanes % dp == 0 and lanes <= shards]
    if wanted is None:
        raise_if_any([] if usable else [_no_lanes(global_batch=global_batch, shards=shards, dp=dp)])
        return max((lanes for lanes in usable if lanes <= DEFAULT_LANES), default=usable[0])
    way_out = f"use one of {usable}" if usable else _no_lanes(global_batch=global_batch, shards=shards, dp=dp)
    found = []
    if wanted < 1 or global_batch % wanted:
        found.append(f"data.lanes ({wanted}) must divide the global batch ({global_batch}): {way_out}")
    if wanted % dp:
        found.append(f"data.lanes ({wanted}) must be a multiple of the data-parallel size ({dp}): {way_out}")
    if wanted > shards:
        found.append(f"data.lanes ({wanted}) must not exceed the number of training shards ({shards}): {way_out}")
    raise_if_any(found)
    return wanted


def _no_lanes(*, global_batch: int, shards: int, dp: int) -> str:
    if global_batch % dp:
        return f"the global batch ({global_batch}) must be a multiple of the data-parallel size ({dp})"
    return (
        f"the corpus has {shards} training shards for {dp} data-parallel ranks: write it with at least {dp} shards, "
        f"or use one of {[d for d in divisors(global_batch) if d <= shards]} ranks"
    )
