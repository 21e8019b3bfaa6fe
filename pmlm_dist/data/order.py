"""Sample order: where global sample t is stored, and which rank reads it.

    epoch e: shards permuted by (seed, e) -> p0 p1 p2 p3 p4 p5 ...
    lane l of L reads p[l], p[l+L], p[l+2L], ..., each shard from start to end, then continues with epoch e+1
    global sample t is element t // L of lane t mod L
    data-parallel rank r of R reads the samples with t mod R = r (R divides L: whole lanes)

A pure function of (shard sizes, lanes, seed, excluded shards, t). One training step consumes the samples
[t0, t0 + global batch) under any number of ranks, accumulation steps and loader workers. The whole state is the integer
`samples_consumed`. Lanes are independent, so their epochs may differ; each sample of the split is read exactly once per
epoch, by one lane. Excluding an unreadable shard shifts no other sample: its positions are filled with samples of the
shard that the same lane reads next.
"""

import bisect
import itertools
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pmlm_dist.config import raise_if_any
from pmlm_dist.masking.random_state import seed_state
from pmlm_dist.relations import divisors

DEFAULT_LANES = 64


class SampleAddress(NamedTuple):
    """Storage location of a sample."""

    epoch: int
    """Epoch of the lane that reads it, from 0."""
    shard: int
    """Index of the shard in the manifest."""
    index: int
    """Index of the sample in the shard."""


@dataclass(frozen=True)
class BatchShare:
    """The part of each global batch that one data-parallel rank reads, split into micro-batches."""

    global_batch: int
    """Samples of one optimizer step over all ranks."""
    micro_batch: int
    """Samples of one forward pass on one rank."""
    dp_rank: int = 0
    dp_size: int = 1

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
        """Micro-batches per rank in one optimizer step."""
        return self.global_batch // (self.micro_batch * self.dp_size)


@dataclass(frozen=True)
class _Epoch:
    """The shards of one epoch, assigned to lanes."""

    shards: tuple[np.ndarray, ...]
    """For each lane: its shards in reading order."""
    ends: tuple[np.ndarray, ...]
    """For each lane: cumulative number of samples at the end of each of its shards."""


class SampleOrder:
    """The infinite sample order of one split.

    `shard_sizes`: samples per shard, all positive. `lanes`: at most the number of shards. Computed epochs are cached
    (16 bytes per shard), so sequential and random access both cost one binary search.
    """

    def __init__(self, shard_sizes: tuple[int, ...], *, lanes: int, seed: int):
        if not 1 <= lanes <= len(shard_sizes):
            raise ValueError(
                f"lanes ({lanes}) must be at least 1 and at most the number of shards ({len(shard_sizes)})"
            )
        if min(shard_sizes) < 1:
            raise ValueError(f"shard {shard_sizes.index(min(shard_sizes))} has no samples: prepare the corpus again")
        self.lanes = lanes
        self.seed = seed
        self._sizes = np.array(shard_sizes, dtype=np.int64)
        self._first_samples = np.cumsum(self._sizes) - self._sizes
        self._epochs: list[_Epoch] = []
        # Row e: samples that each lane has read before epoch e.
        self._starts = [np.zeros(lanes, dtype=np.int64)]

    def locate(self, t: int, *, excluded: Set[int] = frozenset()) -> SampleAddress:
        """Return the address of global sample `t` >= 0 without reading the shards `excluded`.

        A position in an excluded shard is filled from the next readable shard of its lane: element i becomes sample
        i mod n of that shard (n samples), in the epoch in which the lane reads it. All other positions are unchanged.
        """
        epoch, nth, index = self._position(t)
        shard = int(self._epochs[epoch].shards[t % self.lanes][nth])
        if shard in excluded:
            epoch, shard = next(self._readable_shards(t, epoch, nth, excluded=excluded))
        return SampleAddress(epoch, shard, index % int(self._sizes[shard]))

    def next_shard(self, t: int, *, excluded: Set[int] = frozenset()) -> int:
        """Return the shard that the lane of global sample `t` reads after the shard of `t`."""
        epoch, nth, _ = self._position(t)
        _, (_, shard) = itertools.islice(self._readable_shards(t, epoch, nth, excluded=excluded), 2)
        return shard

    def sample_id(self, address: SampleAddress) -> int:
        """Return the index of a sample in its split, counted over the shards in manifest order."""
        return int(self._first_samples[address.shard]) + address.index

    def _position(self, t: int) -> tuple[int, int, int]:
        """Return (epoch, index among the lane's shards of that epoch, sample index in the shard) of sample `t`."""
        element, lane = divmod(t, self.lanes)
        while self._starts[-1][lane] <= element:
            self._add_epoch()
        # Lanes differ in length, so each one has its own epoch boundaries.
        epoch = bisect.bisect_right(self._starts, element, key=lambda starts: starts[lane]) - 1
        within = element - int(self._starts[epoch][lane])
        ends = self._epochs[epoch].ends[lane]
        nth = int(ends.searchsorted(within, side="right"))
        shard = int(self._epochs[epoch].shards[lane][nth])
        return epoch, nth, within - int(ends[nth]) + int(self._sizes[shard])

    def _readable_shards(self, t: int, epoch: int, nth: int, *, excluded: Set[int]) -> Iterator[tuple[int, int]]:
        """Yield (epoch, shard) in the reading order of the lane of `t`, from its `nth` shard of `epoch`, forever."""
        if len(excluded) >= len(self._sizes):
            raise ValueError(f"none of the {len(self._sizes)} shards can be read")
        for number in itertools.count(epoch):
            if number == len(self._epochs):
                self._add_epoch()
            shards = self._epochs[number].shards[t % self.lanes]
            rest = shards[nth if number == epoch else 0 :]
            yield from ((number, shard) for shard in rest.tolist() if shard not in excluded)

    def _add_epoch(self) -> None:
        order = permutation(len(self._sizes), seed=self.seed, epoch=len(self._epochs))
        shards = tuple(order[lane :: self.lanes] for lane in range(self.lanes))
        epoch = _Epoch(shards, tuple(np.cumsum(self._sizes[lane_shards]) for lane_shards in shards))
        self._epochs.append(epoch)
        self._starts.append(self._starts[-1] + np.array([ends[-1] for ends in epoch.ends], dtype=np.int64))


def permutation(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return a random permutation of 0 .. `count` - 1, a function of (`seed`, `epoch`)."""
    # Sorted hashes instead of a NumPy generator: NumPy may change its streams between releases (NEP 19), and a resumed
    # run must keep its order.
    keys = np.array([seed_state(seed, epoch, item) for item in range(count)], dtype=np.uint64)
    return np.argsort(keys, kind="stable")


def micro_batch_samples(samples_consumed: int, micro_step: int, *, share: BatchShare) -> range:
    """Return the global sample indices of one micro-batch of a rank.

    `micro_step` counts the rank's micro-batches after `samples_consumed` samples of the whole run. The samples of a
    step are [t0, t0 + global batch); rank r of R reads those with t mod R = r in order, `micro_batch` at a time.
    """
    step, part = divmod(micro_step, share.accumulation)
    step_start = samples_consumed + step * share.global_batch
    first = step_start + (share.dp_rank - step_start) % share.dp_size + part * share.micro_batch * share.dp_size
    return range(first, first + share.micro_batch * share.dp_size, share.dp_size)


def choose_lanes(requested: int | None, *, global_batch: int, shards: int, dp: int) -> int:
    """Return the number of lanes: `requested` if valid, else raise ConfigError with the valid numbers.

    None: the largest divisor of the global batch that is a multiple of the data-parallel size `dp`, at most 64 and at
    most `shards`; if all are above 64, the smallest.
    """
    usable = [lanes for lanes in divisors(global_batch) if lanes % dp == 0 and lanes <= shards]
    if requested is None:
        raise_if_any([] if usable else [_no_lanes(global_batch=global_batch, shards=shards, dp=dp)])
        return max((lanes for lanes in usable if lanes <= DEFAULT_LANES), default=usable[0])
    way_out = f"use one of {usable}" if usable else _no_lanes(global_batch=global_batch, shards=shards, dp=dp)
    violated = {
        f"divide the global batch ({global_batch})": requested < 1 or global_batch % requested,
        f"be a multiple of the data-parallel size ({dp})": requested % dp,
        f"not exceed the number of training shards ({shards})": requested > shards,
    }
    raise_if_any([f"data.lanes ({requested}) must {rule}: {way_out}" for rule, is_so in violated.items() if is_so])
    return requested


def _no_lanes(*, global_batch: int, shards: int, dp: int) -> str:
    if global_batch % dp:
        return f"the global batch ({global_batch}) must be a multiple of the data-parallel size ({dp})"
    return (
        f"the corpus has {shards} training shards for {dp} data-parallel ranks: prepare it with at least {dp} shards, "
        f"or use one of {[d for d in divisors(global_batch) if d <= shards]} ranks"
    )
