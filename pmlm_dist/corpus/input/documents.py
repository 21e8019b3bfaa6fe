"""Reading documents: files are cut into units, units are read as documents.

    files (sources.py) -> units (byte ranges | whole compressed files | row groups | rows of a data set) -> documents

Units are the grains of the distributed program. They depend on the files and on `unit_bytes` alone, never on the number
of ranks, so neither does what is made of them. A unit owns the documents that begin in its byte range and reads its
last one to the end.

    .txt      a document ends at a blank line          .jsonl    a JSON object a line, text in one field
    .parquet  a column of strings (extra `parquet`)    .txt and .jsonl also as .gz and .zst

Records that are no usable text are counted by reason, with the place of the first, and left out. Memory is bounded
whatever the length of a record: a document of more than `PART_BYTES` (characters, where it is not from a .txt file)
comes in parts, each a document of its own, and a longer line of a .jsonl file than `LONGEST_LINE` is left out.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, cast

import zstandard

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.corpus.input.sentences import cut_text
from pmlm_dist.corpus.input.sources import SourceFile, open_dataset, open_source, read_errors_named

UNIT_BYTES = 8 << 20
PART_BYTES = 16 << 20
LONGEST_LINE = 256 << 20
_SKIP_CHUNK = 1 << 20
_ZSTD_CHUNK = 1 << 16
_ZSTD_WINDOW = 1 << 31
_BATCH_ROWS = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Format = Literal["txt", "jsonl", "parquet", "dataset"]
Compression = Literal["none", "gz", "zst"]

NOT_UTF8 = "not UTF-8"
EMPTY = "empty"
BROKEN_JSON = "broken JSON"
NO_TEXT = "no text field"
TOO_LONG = f"line of more than {LONGEST_LINE >> 20} MiB"


@dataclass(frozen=True)
class Unit:
    """A part of one file that is read on its own."""

    number: int
    """Position in the list of all units."""
    name: str
    """Path or address of the file or data set."""
    format: Format
    compression: Compression
    start: int
    """First byte; for parquet the row group, for a data set the row."""
    stop: int | None
    """The byte (row) after the last; None: the end of the file."""

    @property
    def label(self) -> str:
        """Its number as a name of a file."""
        return label(self.number)


def label(unit: int) -> str:
    """The number of a unit as a name of a file."""
    return f"{unit:08d}"


@dataclass(frozen=True)
class Document:
    """One text; (unit, number) is its identity."""

    unit: int
    number: int
    """Position in its unit; records that are left out count."""
    text: str
    source: str = ""
    """Path or address of the file or data set."""

    @property
    def place(self) -> str:
        """Where it stands, for people."""
        return f"{self.source}, record {self.number} of unit {self.unit}"


@dataclass
class Skips:
    """Records read and left out, by reason; grows while units are read."""

    records: int = 0
    """All that were read; of a document in parts every part."""
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Reason -> (unit, place) of the first offender."""

    def add(self, reason: str, *, unit: int, place: str) -> None:
        """Count one record."""
        self.counts[reason] += 1
        self.first.setdefault(reason, (unit, place))

    def merge(self, other: Skips) -> None:
        """Add another's skips; of two first offenders the one in the earlier unit stays."""
        self.records += other.records
        self.counts.update(other.counts)
        for reason, offender in other.first.items():
            self.first[reason] = min(offender, self.first.get(reason, offender))


def list_units(files: Sequence[SourceFile], *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut `files` into units, in order. Empty files have none."""
    units: list[Unit] = []
    for file in files:
        kind, compression = cast(tuple[Format, Compression], file.kind)
        for start, stop in _ranges(file, kind, compression, unit_bytes=unit_bytes):
            units.append(Unit(len(units), file.name, kind, compression, start, stop))
    return units


def read_unit(unit: Unit, *, text_field: str = "text", skips: Skips) -> Iterator[Document]:
    """Documents of `unit`, in order; what is no text is counted in `skips`.

    `text_field` names the JSON field or parquet column. Raises ConfigError for a damaged file.
    """
    number = 0
    for place, record in _records(unit, text_field=text_field):
        text = _text(record, unit=unit, text_field=text_field)
        if isinstance(text, _Rejected):
            skips.add(text.reason, unit=unit.number, place=f"{unit.name}, {place}{text.detail}")
            number += 1
            continue
        for part in cut_text(text, least=PART_BYTES - _SKIP_CHUNK, most=PART_BYTES):
            yield Document(unit.number, number, part, unit.name)
            number += 1
    skips.records += number


def read_strings(unit: Unit) -> Iterator[str]:
    """Every string in the records of `unit`, of whatever field: for text that is compared, not trained on.

    Raises ConfigError for a damaged file and for a record that cannot be read: none is left out.
    """
    if unit.format == "dataset":
        yield from _strings_in(open_dataset(unit.name)[unit.start : unit.stop])
        return
    with _damage_named(unit.name), open_source(unit.name) as raw:
        if unit.format == "parquet":
            for batch in _parquet(unit.name, raw).iter_batches(batch_size=_BATCH_ROWS, row_groups=[unit.start]):
                yield from _strings_in(batch.to_pydict())
            return
        with _decompressed(unit, raw) as file:
            for place, record in _objects(file, unit) if unit.format == "jsonl" else _paragraphs(file, unit):
                yield from _strings_in(_value_of(record, unit=unit, place=place))


def _value_of(record: bytes | _Rejected, *, unit: Unit, place: str) -> Any:
    try:
        if isinstance(record, _Rejected):
            raise ValueError(record.reason)
        text = record.decode("utf-8")
        return json.loads(text) if unit.format == "jsonl" else text
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{unit.name}, {place} cannot be read: {error}; mend the record"]) from error


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings_in(part)


@dataclass(frozen=True)
class _Rejected:
    reason: str
    detail: str = ""


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
        with _damage_named(file.name), open_source(file.name) as data:
            return [(group, None) for group in range(_parquet(file.name, data).num_row_groups)]
    if compression != "none" or not file.seekable:
        return [(0, None)]
    return [(start, min(start + unit_bytes, file.size)) for start in range(0, file.size, unit_bytes)]


def _records(unit: Unit, *, text_field: str) -> Iterator[tuple[str, bytes | _Rejected]]:
    """(place, raw record) of every record that `unit` owns."""
    if unit.format == "dataset":
        yield from _dataset_rows(unit, column=text_field)
        return
    with _damage_named(unit.name), open_source(unit.name) as raw:
        if unit.format == "parquet":
            yield from _rows(unit, raw, column=text_field)
            return
        with _decompressed(unit, raw) as file:
            yield from _objects(file, unit) if unit.format == "jsonl" else _paragraphs(file, unit)


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Turn the errors of decompressors, disks and networks into one that names the file."""
    try:
        with read_errors_named(name):
            try:
                yield
            except gzip.BadGzipFile as error:  # an OSError too, but no reading error
                raise EOFError(str(error)) from error
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ConfigError([f"source {name} is damaged: {error}; replace the file or leave it out"]) from error


def _decompressed(unit: Unit, raw: BinaryIO) -> BinaryIO:
    if unit.compression == "gz":
        return cast(BinaryIO, gzip.open(raw, "rb"))
    if unit.compression == "zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(raw), _SKIP_CHUNK))
    return raw


class _ZstdFile(io.RawIOBase):
    """All frames of a .zst file. (The library's own reader stops after the first and takes a cut file for whole.)"""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._library = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = self._text = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._text and self._advance():
            pass
        taken = min(len(buffer), len(self._text))
        buffer[:taken], self._text = self._text[:taken], self._text[taken:]
        return taken

    def _advance(self) -> bool:
        """Decompress a little more; False at the end of the file."""
        self._compressed = self._compressed or self._file.read(_ZSTD_CHUNK)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("it ends within a frame")
            return False
        self._frame = self._frame or self._library.decompressobj()
        self._text, self._compressed = self._frame.decompress(self._compressed), b""
        if self._frame.eof:
            self._frame, self._compressed = None, self._frame.unused_data
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _lines(file: BinaryIO, unit: Unit) -> Iterator[tuple[int, bytes]]:
    """(offset, line) from the first line that begins in the unit on, to the end of the file: the caller stops.

    A line of more than `PART_BYTES` comes in pieces, of which only the last ends with a line feed.
    """
    offset = 0
    if unit.start:
        assert unit.stop is not None
        file.seek(unit.start - 1)
        offset = unit.start - 1 + _skip_line(file, at_most=unit.stop - unit.start + 1)
        if offset >= unit.stop:
            return
    while line := file.readline(PART_BYTES):
        yield offset, line.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else line
        offset += len(line)


def _skip_line(file: BinaryIO, *, at_most: int) -> int:
    """Pass over the rest of a line; the number of bytes passed, which for a longer line is about `at_most`."""
    passed = 0
    while passed < at_most:
        chunk = file.readline(_SKIP_CHUNK)
        passed += len(chunk)
        if not chunk or chunk.endswith(b"\n"):
            break
    return passed


def _objects(file: BinaryIO, unit: Unit) -> Iterator[tuple[str, bytes | _Rejected]]:
    """JSONL: the lines that begin in the unit; blank ones are nothing."""
    pieces: list[bytes] = []
    begin, length = 0, 0
    for offset, piece in _lines(file, unit):
        if not length and unit.stop is not None and offset >= unit.stop:
            return
        begin, length = offset if not length else begin, length + len(piece)
        if length <= LONGEST_LINE:
            pieces.append(piece)
        if piece.endswith(b"\n"):
            yield from _object(pieces, begin=begin, length=length)
            pieces, length = [], 0
    yield from _object(pieces, begin=begin, length=length)


def _object(pieces: list[bytes], *, begin: int, length: int) -> Iterator[tuple[str, bytes | _Rejected]]:
    if length > LONGEST_LINE:
        yield f"byte {begin}", _Rejected(TOO_LONG, f": {length} bytes")
        return
    line = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if line.strip():
        yield f"byte {begin}", line


def _paragraphs(file: BinaryIO, unit: Unit) -> Iterator[tuple[str, bytes]]:
    """Text: what lies between blank lines. The unit in which the blank line before a document begins owns it."""
    document: list[bytes] = []
    begin, length, owned, whole = 0, 0, unit.start == 0, True
    for offset, line in _lines(file, unit):
        inside = unit.stop is None or offset < unit.stop
        blank = whole and not line.strip()  # the rest of a long line is no line
        whole = line.endswith(b"\n")
        if document and not blank:
            document.append(line)
            length += len(line)
            if length >= PART_BYTES:
                part, rest = _part(b"".join(document))
                yield f"byte {begin}", part
                document, begin, length = [rest], begin + len(part), len(rest)
            continue
        if document:
            yield f"byte {begin}", b"".join(document)
            document = []
        if blank:
            owned = inside
        elif owned:
            document, begin, length, owned = [line], offset, len(line), False
        if not inside and not document:
            return
    if document:
        yield f"byte {begin}", b"".join(document)


def _part(text: bytes) -> tuple[bytes, bytes]:
    """Cut a long text in two before its last space, or, where there is none for long, between two characters."""
    at = max(text.rfind(space, len(text) - _SKIP_CHUNK) for space in (b" ", b"\n"))
    if at <= 0:
        at = len(text) - 1
        while text[at] & 0xC0 == 0x80 and at > len(text) - 4:  # within a character of UTF-8
            at -= 1
    return text[:at], text[at:]


def _text(record: bytes | _Rejected, *, unit: Unit, text_field: str) -> str | _Rejected:
    if isinstance(record, _Rejected):
        return record
    try:
        text = record.decode("utf-8")
        if unit.format == "jsonl":
            text = _json_text(text, text_field=text_field)
            if isinstance(text, _Rejected):
                return text
            text.encode("utf-8")  # JSON can spell half a surrogate pair
    except UnicodeError as error:
        return _Rejected(NOT_UTF8, f": {getattr(error, 'reason', error)}")
    text = text.replace("\r\n", "\n").strip()
    return text or _Rejected(EMPTY)


def _json_text(line: str, *, text_field: str) -> str | _Rejected:
    try:
        record: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return _Rejected(BROKEN_JSON, f": {error}")
    if not isinstance(record, dict):
        return _Rejected(NO_TEXT, ": not a JSON object")
    value = record.get(text_field)
    if not isinstance(value, str):
        return _Rejected(NO_TEXT, f": no string {text_field!r} among the fields {sorted(record)[:10]}")
    return value


# ---------------------------------------------------------------------------------------------- parquet and data sets


def _parquet(name: str, file: BinaryIO) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError([f"source {name}: parquet needs pyarrow: pip install 'pmlm_dist[parquet]'"]) from error
    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError([f"source {name} is damaged: {error}; replace the file or leave it out"]) from error


def _rows(unit: Unit, raw: BinaryIO, *, column: str) -> Iterator[tuple[str, bytes | _Rejected]]:
    import pyarrow

    file = _parquet(unit.name, raw)
    names = file.schema_arrow.names
    if column not in names:
        raise_if_any([f"source {unit.name} has no column {column!r}: set --text-field to one of {names}"])
    kind = file.schema_arrow.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise_if_any([f"source {unit.name}: column {column!r} holds {kind}, not strings: set --text-field to another"])
    row = 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[unit.start], columns=[column]):
        for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
            yield f"row group {unit.start}, row {row}", _value(value, column=column)
            row += 1


def _dataset_rows(unit: Unit, *, column: str) -> Iterator[tuple[str, bytes | _Rejected]]:
    data = open_dataset(unit.name)
    if column not in data.column_names:
        raise_if_any([f"source {unit.name} has no column {column!r}: set --text-field to one of {data.column_names}"])
    kind = getattr(data.features[column], "dtype", "")
    if kind not in ("string", "large_string"):
        raise_if_any([f"source {unit.name}: column {column!r} holds {kind}, not strings: set --text-field to another"])
    assert unit.stop is not None
    texts = data.select_columns([column])
    for start in range(unit.start, unit.stop, _BATCH_ROWS):
        values = texts[start : min(start + _BATCH_ROWS, unit.stop)][column]
        for row, value in enumerate(values, start=start):
            yield f"row {row}", _value(value if value is None else value.encode(), column=column)


def _value(value: bytes | None, *, column: str) -> bytes | _Rejected:
    return _Rejected(NO_TEXT, f": no value in {column!r}") if value is None else value
