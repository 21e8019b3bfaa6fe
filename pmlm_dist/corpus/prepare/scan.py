"""Scan and duplicates phases of a preparation: every document is read once, and duplicates are found. See pipeline.py.

units --clean--> rows and MinHash signatures in the journal --partition by digest--> numbers of duplicates
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from pmlm_dist.corpus.arrays import save_array
from pmlm_dist.corpus.filters import duplicates
from pmlm_dist.corpus.filters.cleaning import Cleaner, language_filter
from pmlm_dist.corpus.filters.contamination import HeldOutNgrams, read_held_out
from pmlm_dist.corpus.filters.duplicates import DigestPartitions, NearDuplicateDetector, digest_rows
from pmlm_dist.corpus.input.documents import read_unit
from pmlm_dist.corpus.input.units import Unit, unit_stem
from pmlm_dist.corpus.prepare.counts import DocumentLengths, UnitCounts, length_histogram, sum_counts
from pmlm_dist.corpus.prepare.journal import DUPLICATES, PARTITIONS, SCAN, Journal
from pmlm_dist.corpus.prepare.mpi import barrier, compute_on_rank_zero, track
from pmlm_dist.corpus.prepare.sampling import (
    HASH_BINS,
    SCAN_ROW,
    Pieces,
    ValidationSample,
    piece_size,
    scan_row,
    split_pieces,
    validation_threshold,
)
from pmlm_dist.corpus.prepare.settings import PrepareConfig

if TYPE_CHECKING:
    from pmlm_dist.corpus.prepare.mpi import Intracomm

EXACT, NEAR = "exact", "near"
_COMPARED_ROWS = 1 << 14


class Scan:
    """Rows of the documents, unit by unit, in the journal. All ranks call its methods together."""

    def __init__(self, config: PrepareConfig, comm: Intracomm, journal: Journal):
        self.config = config
        self.comm = comm
        self.journal = journal
        self.near = None if config.near_duplicates is None else NearDuplicateDetector(config.near_duplicates)

    def assigned(self, units: Sequence[Unit]) -> Sequence[Unit]:
        return units[self.comm.rank :: self.comm.size]

    def run(self, units: Sequence[Unit]) -> UnitCounts:
        """Scan the units that are not in the journal; return the counts of all units."""
        scanned = compute_on_rank_zero(self.comm, lambda: set(self.journal.committed(SCAN)))
        missing = [unit for unit in units if unit_stem(unit.number) not in scanned]
        for unit in track(self.comm, self.assigned(missing), label="scan"):
            self._scan_unit(unit)
        barrier(self.comm)
        records = self.journal.committed
        return compute_on_rank_zero(self.comm, lambda: sum_counts(map(UnitCounts.from_json, records(SCAN).values())))

    def _scan_unit(self, unit: Unit) -> None:
        cleaner = self._cleaner()
        rows, signatures = [], []
        documents = read_unit(unit, text_field=self.config.text_field, skipped=cleaner.skipped)
        for document in cleaner.clean(documents):
            rows.append(scan_row(document))
            if self.near is not None:
                signatures.append(self.near.signature(document.text))
        save_array(self.journal.path(SCAN, f"{unit_stem(unit.number)}.npy"), np.array(rows, SCAN_ROW))
        if self.near is not None:
            table = np.array(signatures, np.uint32).reshape(-1, duplicates.NUM_HASHES)
            save_array(self.journal.path(SCAN, f"{unit_stem(unit.number)}.minhash.npy"), table)
        counts = UnitCounts(changed=cleaner.changed, skipped=cleaner.skipped)
        self.journal.commit(SCAN, unit_stem(unit.number), counts.as_json())

    def rows(self, unit: int) -> np.ndarray:
        """Return the rows (`SCAN_ROW`) of a unit."""
        return np.load(self.journal.path(SCAN, f"{unit_stem(unit)}.npy"))

    def _load_signatures(self, unit: int) -> np.ndarray:
        return np.load(self.journal.path(SCAN, f"{unit_stem(unit)}.minhash.npy"), mmap_mode="r")

    def find_duplicates(self, units: Sequence[Unit]) -> None:
        """Find the duplicates, exact and near ones according to the settings, and record them in the journal."""
        own = [unit.number for unit in self.assigned(units)]
        documents = self.comm.allreduce(sum(len(self.rows(unit)) for unit in own))
        if self.config.deduplicate:
            digests = ((unit, self.rows(unit)["digest"][:, None]) for unit in own)
            self._find_duplicates(EXACT, digests, rows=documents)
        if self.near is not None:
            bands = self.near.bands
            digests = ((unit, bands.digests(self._load_signatures(unit))) for unit in own)
            self._find_duplicates(NEAR, digests, rows=documents * bands.count)

    def _find_duplicates(self, kind: str, digests: Iterator[tuple[int, np.ndarray]], *, rows: int) -> None:
        """Partition the rows and find duplicates in each partition; after an interruption, from the first row on.

        `digests`: number and digests [documents, digests of a document] of each unit.
        """
        count = math.ceil(rows / duplicates.PARTITION_ROWS)
        if compute_on_rank_zero(self.comm, lambda: kind in self.journal.committed(DUPLICATES)):
            return
        folder = self.journal.path(PARTITIONS, "")
        if self.comm.rank == 0:
            # Ranks append to partition files: rows of an interrupted run would be counted twice.
            for leftover in folder.glob(f"{kind}-*"):
                leftover.unlink()
        barrier(self.comm)
        partitions = DigestPartitions(folder, self.journal.path(DUPLICATES, ""), kind, count)
        tables = (digest_rows(each, unit=unit, numbers=self.rows(unit)["number"]) for unit, each in digests)
        partitions.scatter(tables, rank=self.comm.rank)
        barrier(self.comm)
        for partition in range(self.comm.rank, count, self.comm.size):
            partitions.find_duplicates(partition, are_near=self._are_near if kind == NEAR else None)
        barrier(self.comm)
        if self.comm.rank == 0:
            self.journal.commit(DUPLICATES, kind, {"partitions": count})

    def _are_near(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        assert self.near is not None
        results = [np.empty(0, bool)]
        for start in range(0, len(rows), _COMPARED_ROWS):  # bounded memory: a signature has 512 bytes
            part = slice(start, start + _COMPARED_ROWS)
            results.append(self.near.are_near(self._signatures_of(rows[part]), self._signatures_of(others[part])))
        return np.concatenate(results)

    def _signatures_of(self, rows: np.ndarray) -> np.ndarray:
        signatures = np.empty((len(rows), duplicates.NUM_HASHES), np.uint32)
        for unit in np.unique(rows["unit"]).tolist():
            in_unit = rows["unit"] == unit
            positions = np.searchsorted(self.rows(unit)["number"], rows["number"][in_unit])
            signatures[in_unit] = self._load_signatures(unit)[positions]
        return signatures

    def kept(self, unit: Unit) -> np.ndarray:
        """Return the rows of the documents of a unit without duplicates."""
        rows = self.rows(unit.number)
        numbers = self.duplicates(unit, EXACT) | self.duplicates(unit, NEAR)
        return rows[~np.isin(rows["number"], list(numbers))] if numbers else rows

    def duplicates(self, unit: Unit, kind: str) -> set[int]:
        """Return the numbers of the duplicates of a kind in a unit, after `find_duplicates`."""
        return duplicates.duplicate_numbers(self.journal.path(DUPLICATES, ""), kind, unit.number)

    def document_lengths(self, units: Sequence[Unit]) -> DocumentLengths:
        """Return the lengths of the documents of all units without duplicates."""
        counts, characters = length_histogram(np.empty(0, np.int64)), 0
        for unit in self.assigned(units):
            lengths = self.kept(unit)["length"]
            counts, characters = counts + length_histogram(lengths), characters + int(lengths.sum(dtype=np.int64))
        return DocumentLengths(self.comm.allreduce(counts), self.comm.allreduce(characters))

    def validation_sample(self, units: Sequence[Unit], lengths: DocumentLengths) -> ValidationSample:
        """Return which pieces of the documents are in the validation split."""
        fraction, bins, lowest = self.config.validation_fraction, np.zeros(HASH_BINS, np.int64), HASH_BINS
        size = piece_size(fraction, lengths.characters)
        for rows, pieces in self.pieces(units, partial(split_pieces, size=size)):
            pieces.add_to(bins)
            lowest = int(pieces.bins[rows["has_two_words"][pieces.documents]].min(initial=lowest))
        lowest = min(self.comm.allgather(lowest))
        below = validation_threshold(fraction, self.comm.allreduce(bins), lowest=lowest)
        return ValidationSample(self.config.seed, size, below)

    def pieces(self, units: Sequence[Unit], cut: Callable[..., Pieces]) -> Iterator[tuple[np.ndarray, Pieces]]:
        """Yield the rows of the kept documents of each unit of this rank, and their pieces."""
        for unit in self.assigned(units):
            rows = self.kept(unit)
            yield rows, cut(rows, seed=self.config.seed, unit=unit.number)

    def _cleaner(self) -> Cleaner:
        address = self.config.language_filter
        keep = None if address is None else language_filter(address).keep
        return Cleaner(self.config.unicode, self.config.min_characters, keep, self._held_out)

    @cached_property
    def _held_out(self) -> HeldOutNgrams | None:
        files = self.config.decontaminate
        return read_held_out(files, words=self.config.decontaminate_words) if files else None
