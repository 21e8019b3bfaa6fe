"""Units: the parts of the input that ranks read independently.

    files (sources.py) -> units (byte ranges | compressed files | parquet row groups | rows of a data set)

Units depend on the files and on `unit_bytes` only, not on the number of ranks. The corpus is a function of its units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from pmlm_dist.corpus.input.compression import Compression, convert_decoding_errors
from pmlm_dist.corpus.input.sources import SourceFile, open_dataset, open_source
from pmlm_dist.corpus.input.tables import open_parquet

UNIT_BYTES = 8 << 20

Format = Literal["txt", "jsonl", "parquet", "dataset"]


@dataclass(frozen=True)
class Unit:
    """A part of one file, or of one data set."""

    number: int
    """Position in the list of all units."""
    source: str
    format: Format
    compression: Compression
    start: int
    """First byte; for parquet the row group, for a data set the first row."""
    stop: int | None
    """Byte (row) after the last; None: the end of the file."""


def unit_stem(unit: int) -> str:
    """Return the file name of a unit in the journal, without suffix."""
    return f"{unit:08d}"


def list_units(files: Sequence[SourceFile], *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut `files` into units, in order. An empty file has none."""
    units: list[Unit] = []
    for file in files:
        kind, compression = cast(tuple[Format, Compression], file.kind)
        for start, stop in _ranges(file, kind, compression, unit_bytes=unit_bytes):
            units.append(Unit(len(units), file.name, kind, compression, start, stop))
    return units


def _ranges(
    file: SourceFile, kind: Format, compression: Compression, *, unit_bytes: int
) -> list[tuple[int, int | None]]:
    if kind == "dataset":
        rows = open_dataset(file.name).num_rows
        step = max(1, rows * unit_bytes // max(1, file.size))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]
    if file.size == 0 and file.seekable:
        return []
    if kind == "parquet":
        with convert_decoding_errors(file.name), open_source(file.name) as data:
            return [(group, None) for group in range(open_parquet(file.name, data).num_row_groups)]
    if compression != "none" or not file.seekable:
        return [(0, None)]
    return [(start, min(start + unit_bytes, file.size)) for start in range(0, file.size, unit_bytes)]
