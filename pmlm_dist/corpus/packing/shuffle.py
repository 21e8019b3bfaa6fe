"""The exchange-shuffle: samples of all ranks into one pseudo-random order, with bounded memory, through files.

    every rank:   sample, key  ->  buffer  ->  sorted runs by key, on disk          (`Spill`)
    any rank:     a bucket = an equal range of keys  =  one slice of every run  ->  sorted       (`Shuffled`)
    buckets in order = all samples in the order of their keys  ->  any range of positions

A key is a pure function of the seed and the sample's origin, so the order depends on no rank, run or bucket. Memory:
`BUFFER_BYTES` twice while spilling, about twice a bucket while reading. The folder is shared by the ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pmlm_dist.corpus.shards import TokenDtype

BUFFER_BYTES = 32 << 20
BUCKET_BYTES = 32 << 20
INDEX_DTYPE = np.dtype([("key", "<u8"), ("start", "<u8"), ("unit", "<u4"), ("number", "<u4"), ("length", "<u4")])
_Origin = tuple[int, int, int]


@dataclass(frozen=True)
class Run:
    """Samples of one split, sorted by key, in two files."""

    folder: Path
    name: str
    dtype: TokenDtype

    @property
    def index_path(self) -> Path:
        """Records of `INDEX_DTYPE`; `start` counts tokens."""
        return self.folder / f"{self.name}.index"

    @property
    def tokens_path(self) -> Path:
        """Little-endian ids."""
        return self.folder / f"{self.name}.tokens"

    @property
    def stored(self) -> np.dtype:
        """Type of the ids."""
        return np.dtype(self.dtype).newbyteorder("<")

    def write(self, samples: Sequence[np.ndarray], origins: Sequence[_Origin]) -> None:
        """Sort and write samples with their (key, unit, number), and flush them to the disk."""
        keys, units, numbers = np.array(origins, np.uint64).T
        order = np.lexsort((numbers, units, keys))
        index = np.empty(len(samples), INDEX_DTYPE)
        index["key"], index["unit"], index["number"] = keys[order], units[order], numbers[order]
        index["length"] = [len(samples[place]) for place in order]
        index["start"] = np.cumsum(index["length"], dtype=np.uint64) - index["length"]
        with self.tokens_path.open("wb") as out:
            for place in order:
                out.write(samples[place].astype(self.stored, copy=False).data)
            out.flush()
            os.fsync(out.fileno())
        with self.index_path.open("wb") as out:
            out.write(index.tobytes())
            out.flush()
            os.fsync(out.fileno())

    def index(self) -> np.ndarray:
        """The records, mapped into memory."""
        return np.memmap(self.index_path, INDEX_DTYPE, mode="r")

    def slice(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Index and tokens of the samples with keys `low` to `high` - 1; `start` counts from the first."""
        index = self.index()
        first, stop = _places(index, [low, high])
        found = np.array(index[first:stop])
        if not len(found):
            return found, np.empty(0, self.stored)
        begin = int(found["start"][0])
        count = int(found["start"][-1]) + int(found["length"][-1]) - begin
        found["start"] -= np.uint64(begin)
        return found, np.fromfile(self.tokens_path, self.stored, count, offset=begin * self.stored.itemsize)


class Spill:
    """One rank's side of the exchange for one split: takes samples in any order, gives sorted runs."""

    def __init__(self, folder: Path, split: str, dtype: TokenDtype):
        self.bytes = 0
        """Held in memory."""
        self._folder, self._split = folder, split
        self._dtype: TokenDtype = dtype
        self._samples: list[np.ndarray] = []
        self._origins: list[_Origin] = []

    def add(self, ids: np.ndarray, *, key: int, unit: int, number: int) -> None:
        """Take one sample; (unit, number) is its origin and settles equal keys."""
        self._samples.append(ids.astype(self._dtype))
        self._origins.append((key, unit, number))
        self.bytes += self._samples[-1].nbytes

    def flush(self, name: str) -> list[str]:
        """Write what is held as the run `name` of this split; the names of runs written: one or none."""
        if not self._samples:
            return []
        run = Run(self._folder, f"{name}-{self._split}", self._dtype)
        run.write(self._samples, self._origins)
        self._samples, self._origins, self.bytes = [], [], 0
        return [run.name]


@dataclass
class Shuffled:
    """All samples of one split in the order of their keys."""

    runs: Sequence[Run]
    counts: Sequence[int]
    """Samples in each of the equal ranges that the keys 0 .. 2**64 - 1 are cut into."""
    _bucket: int = -1

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Samples at the positions `start` to `stop` - 1."""
        before = 0
        for bucket, count in enumerate(self.counts):
            first, last = max(start - before, 0), min(stop - before, count)
            before += count
            if first < last:
                yield from self._sorted(bucket, first=first, last=last)

    def _sorted(self, bucket: int, *, first: int, last: int) -> Iterator[np.ndarray]:
        if bucket != self._bucket:  # neighbouring shards share one
            self._load(bucket)
            self._bucket = bucket
        for place in self._order[first:last]:
            start = int(self._starts[place])
            yield self._tokens[start : start + int(self._index["length"][place])]

    def _load(self, bucket: int) -> None:
        self._tokens = np.empty(0)  # the last bucket makes room
        low, high = edges(len(self.counts))[bucket : bucket + 2]
        slices = [run.slice(low, high) for run in self.runs]
        self._index = np.concatenate([index for index, _ in slices])
        begins = np.cumsum([0, *(len(tokens) for _, tokens in slices)])
        shift = np.repeat(begins[:-1], [len(index) for index, _ in slices])
        self._starts = self._index["start"].astype(np.int64) + shift
        self._tokens = np.concatenate([tokens for _, tokens in slices])
        self._order = np.lexsort((self._index["number"], self._index["unit"], self._index["key"]))


def edges(count: int) -> list[int]:
    """First key of each of `count` equal ranges of the keys 0 .. 2**64 - 1, and what is beyond the last."""
    return [-(-(bucket << 64) // count) for bucket in range(count + 1)]


def bucket_counts(run: Run, count: int) -> np.ndarray:
    """Samples of a run in each of `count` buckets."""
    return np.diff(_places(run.index(), edges(count)))


def _places(index: np.ndarray, keys: Sequence[int]) -> list[int]:
    """Where each of `keys` (2**64: beyond all) would stand in a sorted index."""
    inside = np.array([min(key, (1 << 64) - 1) for key in keys], np.uint64)
    places = np.searchsorted(index["key"], inside)
    return [len(index) if key >> 64 else int(place) for key, place in zip(keys, places, strict=True)]
