"""Documents that are there already: equal ones, and near ones by MinHash. In bounded memory, through files.

    every rank:       rows (digest, unit, number) of its units  ->  parts by digest
    one rank a part:  groups of equal digest  ->  dropped: all but the first of a group

For equal documents the digest is that of the text. For near ones a document has a digest for each band of its MinHash
signature (Broder 1997; banding: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4); those who share one
are compared by their whole signatures, and a document near an earlier one is dropped. `first` is by (unit, number), so
the outcome does not depend on the number of ranks or parts.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmlm_dist.config import ConfigError

ROW = np.dtype([("digest", "<u8"), ("unit", "<u4"), ("number", "<u4")])
PART_ROWS = 4 << 20
SIGNATURE = 128
SHINGLE = 5
_CHARACTERS = 1 << 20
_SHINGLES_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Parts:
    """Rows dealt to files by digest; one `kind` (equal, near) of them."""

    folder: Path
    dropped: Path
    """Folder of the outcome."""
    kind: str
    count: int

    def deal(self, tables: Iterable[np.ndarray], *, rank: int) -> None:
        """Append this rank's rows to its file of every part."""
        for table in tables:
            part = table["digest"] % self.count
            for number in np.unique(part):
                with self._file(int(number), f"rank{rank:05d}").open("ab") as out:
                    out.write(table[part == number].tobytes())

    def judge(self, part: int, *, near: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None) -> None:
        """Write what is to be dropped among all ranks' rows of a part; `near`: as in `repeated`."""
        files = sorted(self.folder.glob(self._file(part, "rank*").name))
        table = np.concatenate([np.empty(0, ROW), *(np.fromfile(file, ROW) for file in files)])
        found = np.unique(repeated(table, near=near)[["unit", "number"]])
        np.save(self.dropped / f"{self.kind}-{part:05d}.npy", found)
        for file in files:
            file.unlink()

    def _file(self, part: int, rank: str) -> Path:
        return self.folder / f"{self.kind}-{part:05d}-{rank}"


def repeated(table: np.ndarray, *, near: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None) -> np.ndarray:
    """The rows (`ROW`) whose digest an earlier document has, by (unit, number).

    With `near(rows, others)`, which tells row by row whether two documents are near, a shared digest alone is not
    enough: then a row is returned if it is near an earlier one of its digest that is not itself returned.
    """
    table = table[np.lexsort((table["number"], table["unit"], table["digest"]))]
    found = [table[:0]]
    while len(table) > 1:
        first = np.r_[True, table["digest"][1:] != table["digest"][:-1]]
        heads = table[np.maximum.accumulate(np.where(first, np.arange(len(table)), 0))]
        rest, heads = table[~first], heads[~first]
        dropped = np.ones(len(rest), bool) if near is None else near(rest, heads)
        found.append(rest[dropped])
        table = rest[~dropped]
    return np.concatenate(found)


def dropped(folder: Path, kind: str, unit: int) -> set[int]:
    """Numbers of the documents of `unit` that `Parts.judge` dropped."""
    numbers: set[int] = set()
    for file in sorted(folder.glob(f"{kind}-*.npy")):
        table = np.load(file, mmap_mode="r")
        start, stop = np.searchsorted(table["unit"], [unit, unit + 1])
        numbers.update(table["number"][start:stop].tolist())
    return numbers


# ---------------------------------------------------------------------------------------------------- near duplicates


@dataclass(frozen=True)
class Bands:
    """How a signature is cut for comparison: `count` bands of `width` values, chosen for a similarity."""

    count: int
    width: int

    def digests(self, signatures: np.ndarray) -> np.ndarray:
        """[documents, SIGNATURE] -> [documents, count]; equal bands of the same place give equal numbers."""
        mixed = np.empty((len(signatures), self.count), np.uint64)
        for band in range(self.count):
            digest = np.full(len(signatures), band + 1, np.uint64)
            for values in signatures[:, band * self.width : (band + 1) * self.width].T:
                digest = (digest ^ values.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
                digest ^= digest >> np.uint64(29)
            mixed[:, band] = digest
        return mixed


class NearDuplicates:
    """Signatures of documents and when two of them are near. Raises ConfigError without the library."""

    def __init__(self, threshold: float):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ConfigError(
                ["near_duplicates needs datasketch: pip install 'pmlm_dist[near-duplicates]', or leave it out"]
            ) from error
        self.threshold = threshold
        lsh: Any = MinHashLSH(threshold=threshold, num_perm=SIGNATURE)
        self.bands = Bands(lsh.b, lsh.r)
        self._empty = MinHash(SIGNATURE, hashfunc=zlib.crc32)

    def signature(self, text: str) -> np.ndarray:
        """MinHash of the sets of five consecutive words (all words of a shorter text), shape [SIGNATURE], uint32.

        Case and spacing do not matter. Of a longer text the first 2**20 characters count.
        """
        words = text[:_CHARACTERS].casefold().split()
        shingles = _shingles(words)
        sketch = self._empty.copy()
        while batch := list(itertools.islice(shingles, _SHINGLES_AT_ONCE)):
            sketch.update_batch(batch)
        return sketch.hashvalues.astype(np.uint32)

    def rows(self, signatures: np.ndarray, *, unit: int, numbers: np.ndarray) -> np.ndarray:
        """A `ROW` for each document and band."""
        rows = np.empty((len(numbers), self.bands.count), ROW)
        rows["digest"] = self.bands.digests(signatures)
        rows["unit"], rows["number"] = unit, numbers[:, None]
        return rows.reshape(-1)

    def near(self, signatures: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Row by row: whether the share of equal values, an estimate of the Jaccard index, reaches the threshold."""
        return (signatures == others).mean(axis=1) >= self.threshold


def _shingles(words: list[str]) -> Iterator[bytes]:
    for at in range(max(1, len(words) - SHINGLE + 1)):
        yield " ".join(words[at : at + SHINGLE]).encode()
