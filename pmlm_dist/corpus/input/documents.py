"""Documents of the units of the input.

    unit (units.py) -> raw records (lines.py, tables.py) -> decode, cut -> documents

    .txt      a document ends at a blank line          .jsonl    a JSON object a line, text in one field
    .parquet  a column of strings (extra `parquet`)    .txt and .jsonl also as .gz, .bz2, .xz, .zst

Records without usable text are skipped and counted by reason, with the location of the first. Memory is bounded for any
length of a record: a document of more than `PART_BYTES` (characters, unless it is from a .txt file) is cut into parts,
each a document of its own. A .jsonl line of more than `MAX_LINE_BYTES` is skipped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.input import lines, records
from pmlm_dist.corpus.input.compression import convert_decoding_errors, decompress
from pmlm_dist.corpus.input.records import (
    EMPTY,
    INVALID_JSON,
    NO_TEXT,
    NOT_UTF8,
    Record,
    RejectedRecord,
    SkippedRecords,
)
from pmlm_dist.corpus.input.segmentation import split_text
from pmlm_dist.corpus.input.sources import open_dataset, open_source
from pmlm_dist.corpus.input.tables import dataset_rows, parquet_rows, parquet_values
from pmlm_dist.corpus.input.units import Unit
from pmlm_dist.json_input import InvalidJson, parse_json


@dataclass(frozen=True)
class Document:
    """One text, identified by (unit, number)."""

    unit: int
    number: int
    """Position in its unit; skipped records count."""
    text: str
    source: str = ""
    """Path or URL of the file or data set."""

    @property
    def location(self) -> str:
        return f"{self.source}, record {self.number} of unit {self.unit}"


def read_unit(unit: Unit, *, text_field: str = "text", skipped: SkippedRecords) -> Iterator[Document]:
    """Yield the documents of `unit`, in order; count records without usable text in `skipped`.

    `text_field`: name of the JSON field or parquet column. Raises ConfigError for a corrupt file.
    """
    number = 0
    for location, record in _records(unit, text_field=text_field):
        text = _decode(record, unit=unit, text_field=text_field)
        if isinstance(text, RejectedRecord):
            skipped.add(text.reason, unit=unit.number, location=f"{unit.source}, {location}{text.detail}")
            number += 1
            continue
        min_length, max_length = records.PART_BYTES - lines.SEARCH_BYTES, records.PART_BYTES
        for part in split_text(text, min_length=min_length, max_length=max_length):
            yield Document(unit.number, number, part, unit.source)
            number += 1
    skipped.records_read += number


def read_strings(unit: Unit) -> Iterator[str]:
    """Yield every string in the records of `unit`, from all fields: for held-out texts.

    Raises ConfigError for a corrupt file and for an unreadable record; no record is skipped.
    """
    if unit.format == "dataset":
        yield from _nested_strings(open_dataset(unit.source)[unit.start : unit.stop])
        return
    with convert_decoding_errors(unit.source), open_source(unit.source) as raw:
        if unit.format == "parquet":
            for columns in parquet_values(unit.source, raw, row_group=unit.start):
                yield from _nested_strings(columns)
            return
        for location, record in _text_records(unit, raw):
            yield from _nested_strings(_parse(record, unit=unit, location=location))


def _records(unit: Unit, *, text_field: str) -> Iterator[tuple[str, Record]]:
    """Yield (location, raw record) of every record that `unit` owns."""
    if unit.format == "dataset":
        assert unit.stop is not None
        yield from dataset_rows(unit.source, start=unit.start, stop=unit.stop, column=text_field)
        return
    with convert_decoding_errors(unit.source), open_source(unit.source) as raw:
        if unit.format == "parquet":
            yield from parquet_rows(unit.source, raw, row_group=unit.start, column=text_field)
        else:
            yield from _text_records(unit, raw)


def _text_records(unit: Unit, raw: BinaryIO) -> Iterator[tuple[str, Record]]:
    read = lines.json_lines if unit.format == "jsonl" else lines.paragraphs
    with decompress(raw, unit.compression) as file:
        yield from read(file, start=unit.start, stop=unit.stop)


def _decode(record: Record, *, unit: Unit, text_field: str) -> str | RejectedRecord:
    if isinstance(record, RejectedRecord):
        return record
    try:
        text = record.decode("utf-8")
        if unit.format == "jsonl":
            text = _text_of_json(text, text_field=text_field)
            if isinstance(text, RejectedRecord):
                return text
            text.encode("utf-8")  # a JSON escape can be half of a surrogate pair
    except UnicodeError as error:
        return RejectedRecord(NOT_UTF8, f": {getattr(error, 'reason', error)}")
    text = text.replace("\r\n", "\n").strip()
    return text or RejectedRecord(EMPTY)


def _text_of_json(line: str, *, text_field: str) -> str | RejectedRecord:
    try:
        record: Any = parse_json(line, any_number=True)
    except InvalidJson as error:
        return RejectedRecord(INVALID_JSON, f": {error}")
    if not isinstance(record, dict):
        return RejectedRecord(NO_TEXT, ": not a JSON object")
    value = record.get(text_field)
    if not isinstance(value, str):
        return RejectedRecord(NO_TEXT, f": no string {text_field!r} among the fields {sorted(record)[:10]}")
    return value


def _parse(record: Record, *, unit: Unit, location: str) -> Any:
    try:
        if isinstance(record, RejectedRecord):
            raise ValueError(record.reason)
        text = record.decode("utf-8")
        return parse_json(text, any_number=True) if unit.format == "jsonl" else text
    except ValueError as error:
        raise ConfigError([f"{unit.source}, {location} cannot be read: {error}; correct the record"]) from error


def _nested_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _nested_strings(part)
