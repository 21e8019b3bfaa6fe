"""The exchange-shuffle: samples of all ranks into one pseudo-random order, with bounded memory, through files.

    every rank:   sample, key  ->  spill file of the bucket that the key falls in
    one rank a bucket:  all ranks' spill files of it  ->  sorted by key
    buckets in order = all samples in the order of their keys  ->  any range of positions

A key is a pure function of the seed and the sample's origin, so the order does not depend on ranks or buckets.
Memory: `_BUFFER_BYTES` while spilling, about twice the largest bucket while sorting. The folder is shared by the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pmlm_dist.corpus.shards import TokenDtype

_BUFFER_BYTES = 64 << 20
INDEX_DTYPE = np.dtype([("key", "<u8"), ("unit", "<u4"), ("number", "<u4"), ("length", "<u4")])


@dataclass(frozen=True)
class Buckets:
    """Where the samples of one split are spilled and sorted."""

    folder: Path
    split: str
    count: int
    """Number of equal ranges that the keys 0 .. 2**64 - 1 are cut into."""
    dtype: TokenDtype

    @property
    def stored(self) -> np.dtype:
        """Little-endian ids."""
        return np.dtype(self.dtype).newbyteorder("<")

    def bucket(self, key: int) -> int:
        """The bucket of a key."""
        return key * self.count >> 64

    def path(self, bucket: int, *, part: str, kind: str) -> Path:
        """File of one part (a rank's, or `sorted`) of a bucket; `kind` is `index` or `tokens`."""
        return self.folder / f"{self.split}-{bucket:06d}-{part}.{kind}"


class Spill:
    """One rank's side of the exchange: takes samples in any order; `counts[b]` of them went into bucket b."""

    def __init__(self, buckets: Buckets, *, rank: int):
        self.counts = np.zeros(buckets.count, np.int64)
        self._buckets = buckets
        self._part = f"rank{rank:05d}"
        self._index: dict[int, list[tuple[int, int, int, int]]] = {}
        self._tokens: dict[int, list[np.ndarray]] = {}
        self._buffered = 0

    def add(self, ids: np.ndarray, *, key: int, unit: int, number: int) -> None:
        """Take one sample; (unit, number) is its origin and settles equal keys."""
        bucket = self._buckets.bucket(key)
        self._index.setdefault(bucket, []).append((key, unit, number, len(ids)))
        self._tokens.setdefault(bucket, []).append(ids)
        self.counts[bucket] += 1
        self._buffered += ids.nbytes
        if self._buffered >= _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Append what is buffered to the files."""
        for bucket, index in self._index.items():
            with self._buckets.path(bucket, part=self._part, kind="index").open("ab") as out:
                out.write(np.array(index, INDEX_DTYPE).tobytes())
            with self._buckets.path(bucket, part=self._part, kind="tokens").open("ab") as out:
                out.write(np.concatenate(self._tokens[bucket]).astype(self._buckets.stored).tobytes())
        self._index, self._tokens, self._buffered = {}, {}, 0


def sort_bucket(buckets: Buckets, bucket: int) -> None:
    """Merge all ranks' spill files of a bucket into one that is sorted by key; the spill files are removed."""
    spilled = sorted(buckets.folder.glob(buckets.path(bucket, part="rank*", kind="index").name))
    index = np.concatenate([np.empty(0, INDEX_DTYPE), *(np.fromfile(path, INDEX_DTYPE) for path in spilled)])
    read = (np.fromfile(path.with_suffix(".tokens"), buckets.stored) for path in spilled)
    tokens = np.concatenate([np.empty(0, buckets.stored), *read])
    ends = np.cumsum(index["length"], dtype=np.int64)
    order = np.lexsort((index["number"], index["unit"], index["key"]))
    with buckets.path(bucket, part="sorted", kind="tokens").open("wb") as out:
        for position in order:
            out.write(tokens[ends[position] - index["length"][position] : ends[position]].tobytes())
    index[order].tofile(buckets.path(bucket, part="sorted", kind="index"))
    for path in spilled:
        path.unlink()
        path.with_suffix(".tokens").unlink()


def read_sorted(buckets: Buckets, counts: Sequence[int], *, start: int, stop: int) -> Iterator[np.ndarray]:
    """Samples at the positions `start` to `stop` - 1 of the shuffled order; `counts` holds every bucket's size."""
    before = 0
    for bucket, count in enumerate(counts):
        first, last = max(start - before, 0), min(stop - before, count)
        before += count
        if first < last:
            yield from _read_bucket(buckets, bucket, first=first, last=last)


def _read_bucket(buckets: Buckets, bucket: int, *, first: int, last: int) -> Iterator[np.ndarray]:
    lengths = np.fromfile(buckets.path(bucket, part="sorted", kind="index"), INDEX_DTYPE)["length"]
    with buckets.path(bucket, part="sorted", kind="tokens").open("rb") as file:
        file.seek(int(lengths[:first].sum(dtype=np.int64)) * buckets.stored.itemsize)
        for length in lengths[first:last]:
            yield np.frombuffer(file.read(int(length) * buckets.stored.itemsize), buckets.stored)
