"""Distributed shuffle: an external merge sort of the samples of all ranks by pseudo-random key.

    every rank:   sample, key  ->  buffer  ->  sorted runs on disk                              (`RunWriter`)
    any rank:     a bucket = an equal range of keys = one slice of every run  ->  sorted        (`MergedRuns`)
    buckets in order = all samples in the order of their keys  ->  any range of positions

A key is a pure function of the seed, unit and number of the sample, so the order does not depend on ranks, runs or
buckets. Memory: `BUFFER_BYTES` twice while writing, about twice a bucket while reading. The ranks share the folder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pmlm_dist.corpus.shards import TokenDtype
from pmlm_dist.files import open_atomically, write_atomically

BUFFER_BYTES = 32 << 20
BUCKET_BYTES = 32 << 20
INDEX_DTYPE = np.dtype([("key", "<u8"), ("start", "<u8"), ("unit", "<u4"), ("number", "<u4"), ("length", "<u4")])
_SortKey = tuple[int, int, int]
"""(key, unit, number): the last two decide the order of equal keys."""


@dataclass(frozen=True)
class SortedRun:
    """Samples of one split, sorted by key, in two files."""

    folder: Path
    name: str
    dtype: TokenDtype

    @property
    def index_path(self) -> Path:
        """File of the records (`INDEX_DTYPE`); `start` counts tokens."""
        return self.folder / f"{self.name}.index"

    @property
    def tokens_path(self) -> Path:
        """File of the ids, little-endian."""
        return self.folder / f"{self.name}.tokens"

    @property
    def stored_dtype(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    def write(self, samples: Sequence[np.ndarray], sort_keys: Sequence[_SortKey]) -> None:
        """Sort the samples by their (key, unit, number) and write them."""
        keys, units, numbers = np.array(sort_keys, np.uint64).T
        order = np.lexsort((numbers, units, keys))
        index = np.empty(len(samples), INDEX_DTYPE)
        index["key"], index["unit"], index["number"] = keys[order], units[order], numbers[order]
        index["length"] = [len(samples[position]) for position in order]
        index["start"] = np.cumsum(index["length"], dtype=np.uint64) - index["length"]
        with open_atomically(self.tokens_path) as out:
            for position in order:
                out.write(samples[position].astype(self.stored_dtype, copy=False).data)
        write_atomically(self.index_path, index.tobytes())

    def index(self) -> np.ndarray:
        """Return the records, memory-mapped."""
        return np.memmap(self.index_path, INDEX_DTYPE, mode="r")

    def read(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Return records and tokens of the samples with keys in [low, high); `start` counts from the first token."""
        index = self.index()
        first, stop = _lower_bounds(index, [low, high])
        records = np.array(index[first:stop])
        if not len(records):
            return records, np.empty(0, self.stored_dtype)
        begin = int(records["start"][0])
        count = int(records["start"][-1]) + int(records["length"][-1]) - begin
        records["start"] -= np.uint64(begin)
        offset = begin * self.stored_dtype.itemsize
        return records, np.fromfile(self.tokens_path, self.stored_dtype, count, offset=offset)


class RunWriter:
    """Buffer of one rank and one split: takes samples in any order, writes sorted runs."""

    def __init__(self, folder: Path, split: str, dtype: TokenDtype):
        self.buffered_bytes = 0
        self._folder, self._split = folder, split
        self._dtype: TokenDtype = dtype
        self._samples: list[np.ndarray] = []
        self._sort_keys: list[_SortKey] = []

    def add(self, ids: np.ndarray, *, key: int, unit: int, number: int) -> None:
        """Buffer one sample; (unit, number) decides the order of equal keys."""
        self._samples.append(ids.astype(self._dtype))
        self._sort_keys.append((key, unit, number))
        self.buffered_bytes += self._samples[-1].nbytes

    def flush(self, name: str) -> list[str]:
        """Write the buffer as the run `name` of this split; return the names of the runs written: one or none."""
        if not self._samples:
            return []
        run = SortedRun(self._folder, f"{name}-{self._split}", self._dtype)
        run.write(self._samples, self._sort_keys)
        self._samples, self._sort_keys, self.buffered_bytes = [], [], 0
        return [run.name]


@dataclass
class MergedRuns:
    """All samples of one split in the order of their keys."""

    runs: Sequence[SortedRun]
    bucket_counts: Sequence[int]
    """Samples in each of the equal ranges of the keys 0 .. 2**64 - 1."""
    _bucket: int = -1

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the samples at positions [start, stop)."""
        before = 0
        for bucket, count in enumerate(self.bucket_counts):
            first, last = max(start - before, 0), min(stop - before, count)
            before += count
            if first >= last:
                continue
            if bucket != self._bucket:  # consecutive shards often share a bucket
                self._load(bucket)
                self._bucket = bucket
            for position in self._order[first:last]:
                begin = int(self._starts[position])
                yield self._tokens[begin : begin + int(self._index["length"][position])]

    def _load(self, bucket: int) -> None:
        self._tokens = np.empty(0)  # release the previous bucket before the next is read
        low, high = bucket_edges(len(self.bucket_counts))[bucket : bucket + 2]
        slices = [run.read(low, high) for run in self.runs]
        self._index = np.concatenate([index for index, _ in slices])
        begins = np.cumsum([0, *(len(tokens) for _, tokens in slices)])
        shift = np.repeat(begins[:-1], [len(index) for index, _ in slices])
        self._starts = self._index["start"].astype(np.int64) + shift
        self._tokens = np.concatenate([tokens for _, tokens in slices])
        self._order = np.lexsort((self._index["number"], self._index["unit"], self._index["key"]))


def bucket_edges(count: int) -> list[int]:
    """Return the first key of each of `count` equal ranges of the keys 0 .. 2**64 - 1, and 2**64."""
    return [-(-(bucket << 64) // count) for bucket in range(count + 1)]


def count_per_bucket(run: SortedRun, count: int) -> np.ndarray:
    """Return the number of samples of a run in each of `count` buckets."""
    return np.diff(_lower_bounds(run.index(), bucket_edges(count)))


def _lower_bounds(index: np.ndarray, keys: Sequence[int]) -> list[int]:
    """Position of the first record with at least each of `keys`. 2**64, which no uint64 holds, is after the last."""
    clipped = np.array([min(key, (1 << 64) - 1) for key in keys], np.uint64)
    positions = np.searchsorted(index["key"], clipped)
    return [len(index) if key >> 64 else int(position) for key, position in zip(keys, positions, strict=True)]
