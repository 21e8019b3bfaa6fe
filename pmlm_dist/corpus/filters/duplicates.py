"""Exact duplicates by digest and near duplicates by MinHash, in bounded memory, through files.

    every rank:          rows (digest, unit, number) of its units  ->  partitions by digest
    a rank a partition:  groups of equal digest  ->  duplicates: all but the first of a group

The digest of an exact duplicate is that of its text. For near duplicates a document has a digest for each LSH band of
its MinHash signature (Broder 1997; banding: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4). Documents
with a common band are compared by their whole signatures; one that is near an earlier one is a duplicate. The first of
a group is that of the lowest (unit, number), so the result does not depend on the number of ranks or partitions.
"""

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.arrays import save_array
from pmlm_dist.files import name_in_errors

ROW = np.dtype([("digest", "<u8"), ("unit", "<u4"), ("number", "<u4")])
PARTITION_ROWS = 4 << 20
NUM_HASHES = 128
SHINGLE_WORDS = 5
_MAX_CHARACTERS = 1 << 20
_SHINGLE_BATCH = 1 << 12

AreNear = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Function of two arrays of rows, [N] and [N], to booleans [N]: whether the two documents are near."""


@dataclass(frozen=True)
class DigestPartitions:
    """Rows of one kind of duplicate (exact, near), hash-partitioned into files by digest."""

    folder: Path
    duplicates: Path
    """Folder of the result."""
    kind: str
    count: int

    def scatter(self, tables: Iterable[np.ndarray], *, rank: int) -> None:
        """Append the rows of this rank to its file of each partition."""
        for table in tables:
            partition = table["digest"] % self.count
            for number in np.unique(partition):
                file = self._file(int(number), f"rank{rank:05d}")
                with name_in_errors(file), file.open("ab") as out:
                    out.write(table[partition == number].tobytes())

    def find_duplicates(self, partition: int, *, are_near: AreNear | None = None) -> None:
        """Write the duplicates among the rows of all ranks in a partition, and delete its files."""
        files = sorted(self.folder.glob(self._file(partition, "rank*").name))
        table = np.concatenate([np.empty(0, ROW), *(np.fromfile(file, ROW) for file in files)])
        duplicates = np.unique(duplicate_rows(table, are_near=are_near)[["unit", "number"]])
        save_array(self.duplicates / f"{self.kind}-{partition:05d}.npy", duplicates)
        for file in files:
            file.unlink()

    def _file(self, partition: int, rank: str) -> Path:
        return self.folder / f"{self.kind}-{partition:05d}-{rank}"


def digest_rows(digests: np.ndarray, *, unit: int, numbers: np.ndarray) -> np.ndarray:
    """Return a `ROW` for each of the `digests`, shape [documents, digests of a document]."""
    rows = np.empty(digests.shape, ROW)
    rows["digest"], rows["unit"], rows["number"] = digests, unit, numbers[:, None]
    return rows.reshape(-1)


def duplicate_rows(table: np.ndarray, *, are_near: AreNear | None = None) -> np.ndarray:
    """Return the rows (`ROW`) whose digest an earlier document has, by (unit, number).

    With `are_near`, an equal digest is not sufficient. A row is then a duplicate if it is near an earlier row of the
    same digest that is not itself a duplicate.
    """
    table = table[np.lexsort((table["number"], table["unit"], table["digest"]))]
    duplicates = [table[:0]]
    while len(table) > 1:
        # Each pass compares the rows of a group with its first row. Rows that are not near it form the next pass.
        is_first = np.r_[True, table["digest"][1:] != table["digest"][:-1]]
        heads = table[np.maximum.accumulate(np.where(is_first, np.arange(len(table)), 0))]
        rest, heads = table[~is_first], heads[~is_first]
        is_duplicate = np.ones(len(rest), bool) if are_near is None else are_near(rest, heads)
        duplicates.append(rest[is_duplicate])
        table = rest[~is_duplicate]
    return np.concatenate(duplicates)


def duplicate_numbers(folder: Path, kind: str, unit: int) -> set[int]:
    """Return the numbers of the documents of `unit` that `DigestPartitions.find_duplicates` wrote."""
    numbers: set[int] = set()
    for file in sorted(folder.glob(f"{kind}-*.npy")):
        table = np.load(file, mmap_mode="r")
        start, stop = np.searchsorted(table["unit"], [unit, unit + 1])
        numbers.update(table["number"][start:stop].tolist())
    return numbers


# ---------------------------------------------------------------------------------------------------- near duplicates


@dataclass(frozen=True)
class LshBands:
    """Locality-sensitive hashing of signatures: `count` bands of `width` values each."""

    count: int
    width: int

    def digests(self, signatures: np.ndarray) -> np.ndarray:
        """[documents, NUM_HASHES] -> [documents, count]; equal values in a band give equal digests."""
        digests = np.empty((len(signatures), self.count), np.uint64)
        for band in range(self.count):
            digest = np.full(len(signatures), band + 1, np.uint64)  # equal values in two different bands differ
            for values in signatures[:, band * self.width : (band + 1) * self.width].T:
                digest = (digest ^ values.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
                digest ^= digest >> np.uint64(29)
            digests[:, band] = digest
        return digests


class NearDuplicateDetector:
    """MinHash signatures and their comparison. Raises ConfigError if datasketch is not installed."""

    def __init__(self, threshold: float):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ConfigError(
                ["near_duplicates needs datasketch: pip install 'pmlm_dist[near-duplicates]', or omit the setting"]
            ) from error
        self.threshold = threshold
        # The library's choice of bands for this threshold: least weighted sum of false positives and negatives.
        lsh: Any = MinHashLSH(threshold=threshold, num_perm=NUM_HASHES)
        self.bands = LshBands(lsh.b, lsh.r)
        self._empty = MinHash(NUM_HASHES, hashfunc=zlib.crc32)

    def signature(self, text: str) -> np.ndarray:
        """MinHash of the set of five-word shingles (all words of a shorter text), shape [NUM_HASHES], uint32.

        Case and spacing are ignored. Only the first 2**20 characters of a longer text count.
        """
        words = text[:_MAX_CHARACTERS].casefold().split()
        shingles = _shingles(words)
        sketch = self._empty.copy()
        while batch := list(itertools.islice(shingles, _SHINGLE_BATCH)):
            sketch.update_batch(batch)
        return sketch.hashvalues.astype(np.uint32)

    def are_near(self, signatures: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Compare [N, NUM_HASHES] row by row -> [N]: whether the estimated Jaccard index reaches the threshold.

        The fraction of equal values is an unbiased estimate of the Jaccard index of the shingle sets.
        """
        return (signatures == others).mean(axis=1) >= self.threshold


def _shingles(words: list[str]) -> Iterator[bytes]:
    for start in range(max(1, len(words) - SHINGLE_WORDS + 1)):
        yield " ".join(words[start : start + SHINGLE_WORDS]).encode()
