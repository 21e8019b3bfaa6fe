"""Raw records of source files, reasons to reject them, and counts of the records that are skipped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

PART_BYTES = 16 << 20
MAX_LINE_BYTES = 256 << 20

NOT_UTF8 = "not UTF-8"
EMPTY = "empty"
INVALID_JSON = "invalid JSON"
NO_TEXT = "no text field"
TOO_LONG = f"line of more than {MAX_LINE_BYTES >> 20} MiB"


@dataclass(frozen=True)
class RejectedRecord:
    """A record that holds no usable text."""

    reason: str
    detail: str = ""


Record = bytes | RejectedRecord


@dataclass
class SkippedRecords:
    """Counts of records read and skipped, by reason; updated while units are read."""

    records_read: int = 0
    """All records, the skipped ones included. Each part of a long document counts."""
    counts: Counter[str] = field(default_factory=Counter)
    """Reason -> number of skipped records."""
    first: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Reason -> (unit, location) of the first skipped record."""

    def add(self, reason: str, *, unit: int, location: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, (unit, location))

    def merge(self, other: SkippedRecords) -> None:
        """Add the counts of `other`; of two first records, keep the one in the earlier unit."""
        self.records_read += other.records_read
        self.counts.update(other.counts)
        for reason, first in other.first.items():
            self.first[reason] = min(first, self.first.get(reason, first))
