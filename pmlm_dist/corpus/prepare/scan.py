"""The first phases of a preparation: every document looked at once, duplicates found. See prepare.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pmlm_dist.corpus.filters import duplicates
from pmlm_dist.corpus.filters.cleaning import Cleaner, language_filter
from pmlm_dist.corpus.filters.contamination import HeldOut, read_held_out
from pmlm_dist.corpus.filters.duplicates import NearDuplicates, Parts
from pmlm_dist.corpus.input.documents import Unit, label, read_unit
from pmlm_dist.corpus.prepare.counts import UnitCounts, merged
from pmlm_dist.corpus.prepare.journal import DROPPED, PARTS, SCAN, Journal
from pmlm_dist.corpus.prepare.mpi import barrier, broadcast_from_root, track
from pmlm_dist.corpus.prepare.sampling import SCANNED, scanned
from pmlm_dist.corpus.prepare.settings import PrepareConfig

if TYPE_CHECKING:
    from pmlm_dist.corpus.prepare.mpi import Intracomm

EQUAL, NEAR = "equal", "near"
_COMPARED_AT_ONCE = 1 << 14


class Scan:
    """What is known of the documents, unit by unit, on disk; the ranks work on it together."""

    def __init__(self, config: PrepareConfig, comm: Intracomm, work: Journal):
        self.config = config
        self.comm = comm
        self.work = work
        self.near = None if config.near_duplicates is None else NearDuplicates(config.near_duplicates)

    def own(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """This rank's share."""
        return units[self.comm.rank :: self.comm.size]

    def run(self, units: Sequence[Unit]) -> UnitCounts:
        """Scan what is not scanned; the counts of all units."""
        done = broadcast_from_root(self.comm, set(self.work.done(SCAN)) if self.comm.rank == 0 else set())
        missing = [unit for unit in units if unit.label not in done]
        for unit in track(self.comm, self.own(missing), label="scan"):
            self._scan_unit(unit)
        barrier(self.comm)
        tallies = (
            [UnitCounts.from_json(tally) for tally in self.work.done(SCAN).values()] if self.comm.rank == 0 else []
        )
        return broadcast_from_root(self.comm, merged(tallies))

    def _scan_unit(self, unit: Unit) -> None:
        cleaner = self._cleaner()
        rows, signatures = [], []
        documents = read_unit(unit, text_field=self.config.text_field, skips=cleaner.skips)
        for document in cleaner.clean(documents):
            rows.append(scanned(document))
            if self.near is not None:
                signatures.append(self.near.signature(document.text))
        name = unit.label
        np.save(self.work.path(SCAN, f"{name}.npy"), np.array(rows, SCANNED))
        if self.near is not None:
            table = np.array(signatures, np.uint32).reshape(-1, duplicates.SIGNATURE)
            np.save(self.work.path(SCAN, f"{name}.minhash.npy"), table)
        self.work.finish(SCAN, name, UnitCounts(changed=cleaner.changed, skips=cleaner.skips).as_json())

    def rows(self, unit: Unit) -> np.ndarray:
        """What the scan noted of a unit."""
        return np.load(self.work.path(SCAN, f"{unit.label}.npy"))

    def _signatures(self, unit: int) -> np.ndarray:
        return np.load(self.work.path(SCAN, f"{label(unit)}.minhash.npy"), mmap_mode="r")

    def find_duplicates(self, units: Sequence[Unit]) -> None:
        """Write down which documents `dropped` names: equal ones, near ones, as the settings want."""
        documents = self.comm.allreduce(sum(len(self.rows(unit)) for unit in self.own(units)))
        if self.config.deduplicate:
            self._judge(EQUAL, (self._equal_rows(unit) for unit in self.own(units)), rows=documents)
        if self.near is not None:
            tables = (self._near_rows(unit, near=self.near) for unit in self.own(units))
            self._judge(NEAR, tables, rows=documents * self.near.bands.count)

    def _judge(self, kind: str, tables: Iterator[np.ndarray], *, rows: int) -> None:
        """Deal rows to parts and judge these; done anew from the start by a run that goes on."""
        count = math.ceil(rows / duplicates.PART_ROWS)
        if broadcast_from_root(self.comm, kind in self.work.done(DROPPED) if self.comm.rank == 0 else False):
            return
        if self.comm.rank == 0:
            for leftover in self.work.path(PARTS, "").glob(f"{kind}-*"):
                leftover.unlink()
        barrier(self.comm)
        parts = Parts(self.work.path(PARTS, ""), self.work.path(DROPPED, ""), kind, count)
        parts.deal(tables, rank=self.comm.rank)
        barrier(self.comm)
        for part in range(self.comm.rank, count, self.comm.size):
            parts.judge(part, near=self._are_near if kind == NEAR else None)
        barrier(self.comm)
        if self.comm.rank == 0:
            self.work.finish(DROPPED, kind, {"parts": count})

    def _equal_rows(self, unit: Unit) -> np.ndarray:
        rows = self.rows(unit)
        table = np.empty(len(rows), duplicates.ROW)
        table["digest"], table["unit"], table["number"] = rows["digest"], unit.number, rows["number"]
        return table

    def _near_rows(self, unit: Unit, *, near: NearDuplicates) -> np.ndarray:
        return near.rows(self._signatures(unit.number), unit=unit.number, numbers=self.rows(unit)["number"])

    def _are_near(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        assert self.near is not None
        answers = [np.empty(0, bool)]
        for start in range(0, len(rows), _COMPARED_AT_ONCE):
            part = slice(start, start + _COMPARED_AT_ONCE)
            answers.append(self.near.near(self._signatures_of(rows[part]), self._signatures_of(others[part])))
        return np.concatenate(answers)

    def _signatures_of(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), duplicates.SIGNATURE), np.uint32)
        for unit in np.unique(rows["unit"]).tolist():
            here = rows["unit"] == unit
            numbers = np.load(self.work.path(SCAN, f"{label(unit)}.npy"))["number"]
            found[here] = self._signatures(unit)[np.searchsorted(numbers, rows["number"][here])]
        return found

    def kept(self, unit: Unit) -> np.ndarray:
        """The rows of a unit's documents that are no duplicates."""
        rows = self.rows(unit)
        gone = self.dropped(unit, EQUAL) | self.dropped(unit, NEAR)
        return rows[~np.isin(rows["number"], list(gone))] if gone else rows

    def dropped(self, unit: Unit, kind: str) -> set[int]:
        """Numbers of the documents of a unit that `find_duplicates` dropped, by kind."""
        return duplicates.dropped(self.work.path(DROPPED, ""), kind, unit.number)

    def _cleaner(self) -> Cleaner:
        address = self.config.language_filter
        keeps = None if address is None else language_filter(address).keeps
        return Cleaner(self.config.unicode, self.config.min_characters, keeps, self._held_out)

    @cached_property
    def _held_out(self) -> HeldOut | None:
        files = self.config.decontaminate
        return read_held_out(files, words=self.config.decontaminate_words) if files else None
