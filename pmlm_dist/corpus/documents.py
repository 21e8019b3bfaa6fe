"""Reading documents: files are cut into units, units are read as documents.

    globs -> files, sorted -> units (byte ranges | whole compressed files | parquet row groups) -> documents

Units are the grains of the distributed program. They depend on the files and on `unit_bytes` alone, never on the number
of ranks, so neither does what is made of them. A unit owns the documents that begin in its byte range and reads its
last one to the end.

    .txt      a document ends at a blank line          .jsonl    a JSON object a line, text in one field
    .parquet  a column of strings (extra `parquet`)    .txt and .jsonl also as .gz and .zst

Records that are no usable text are counted by reason, with the place of the first, and left out.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import zstandard

from pmlm_dist.config import ConfigError, refuse

UNIT_BYTES = 8 << 20
_SKIP_CHUNK = 1 << 20
_ZSTD_CHUNK = 1 << 16
_ZSTD_WINDOW = 1 << 31
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Format = Literal["txt", "jsonl", "parquet"]
Compression = Literal["none", "gz", "zst"]

NOT_UTF8 = "not UTF-8"
EMPTY = "empty"
BROKEN_JSON = "broken JSON"
NO_TEXT = "no text field"


@dataclass(frozen=True)
class Unit:
    """A part of one file that is read on its own."""

    number: int
    """Position in the list of all units."""
    path: Path
    format: Format
    compression: Compression
    start: int
    """First byte; for parquet the row group."""
    stop: int | None
    """The byte after the last; None: the end of the file."""


@dataclass(frozen=True)
class Document:
    """One text; (unit, number) is its identity."""

    unit: int
    number: int
    """Position among all records of its unit, the skipped ones included."""
    text: str


@dataclass
class Skips:
    """Records left out, by reason; grows while units are read."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Reason -> (unit, place) of the first offender."""

    def add(self, reason: str, *, unit: int, place: str) -> None:
        """Count one record."""
        self.counts[reason] += 1
        self.first.setdefault(reason, (unit, place))

    def merge(self, other: Skips) -> None:
        """Add another rank's skips; of two first offenders the one in the earlier unit stays."""
        self.counts.update(other.counts)
        for reason, offender in other.first.items():
            self.first[reason] = min(offender, self.first.get(reason, offender))


def find_files(patterns: Iterable[str]) -> list[Path]:
    """The files that match, sorted, each once. Raises ConfigError for a pattern without a file or an unknown suffix."""
    found: dict[Path, str] = {}
    problems = []
    for pattern in patterns:
        names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        matches = [name for name in names if Path(name).is_file()]
        if not matches:
            problems.append(f"source {pattern!r} matches no file: give files or a quoted glob such as 'texts/*.jsonl'")
        for name in matches:
            found.setdefault(Path(name).resolve(), name)
    files = sorted(Path(name) for name in found.values())
    for path in files:
        if _format(path) is None:
            problems.append(f"source {path}: unknown kind of file: use .txt, .jsonl (also .gz, .zst) or .parquet")
    refuse(problems)
    return files


def list_units(files: Sequence[Path], *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut `files` into units, in order. Empty files have none."""
    units: list[Unit] = []
    for path in files:
        known = _format(path)
        assert known is not None, path
        for start, stop in _ranges(path, *known, unit_bytes=unit_bytes):
            units.append(Unit(len(units), path, *known, start, stop))
    return units


def read_unit(unit: Unit, *, text_field: str = "text", skips: Skips) -> Iterator[Document]:
    """Documents of `unit`, in order; what is no text is counted in `skips`.

    `text_field` names the JSON field or parquet column. Raises ConfigError for a damaged file.
    """
    for number, (place, record) in enumerate(_records(unit, text_field=text_field)):
        text = _text(record, unit=unit, text_field=text_field)
        if isinstance(text, _Refused):
            skips.add(text.reason, unit=unit.number, place=f"{unit.path}, {place}{text.detail}")
        else:
            yield Document(unit.number, number, text)


@dataclass(frozen=True)
class _Refused:
    reason: str
    detail: str = ""


def _format(path: Path) -> tuple[Format, Compression] | None:
    name, compression = path.name, "none"
    if path.suffix in (".gz", ".zst"):
        name, compression = path.stem, path.suffix[1:]
    kind = Path(name).suffix[1:]
    if kind in ("txt", "jsonl") or (kind == "parquet" and compression == "none"):
        return kind, compression  # pyright: ignore[reportReturnType]
    return None


def _ranges(path: Path, kind: Format, compression: Compression, *, unit_bytes: int) -> list[tuple[int, int | None]]:
    size = path.stat().st_size
    if size == 0:
        return []
    if kind == "parquet":
        with _damage_named(path):
            return [(group, None) for group in range(_parquet(path).num_row_groups)]
    if compression != "none":
        return [(0, None)]
    return [(start, min(start + unit_bytes, size)) for start in range(0, size, unit_bytes)]


def _records(unit: Unit, *, text_field: str) -> Iterator[tuple[str, bytes | None]]:
    """(place, raw record) of every record that `unit` owns; None is a parquet row without a value."""
    with _damage_named(unit.path):
        if unit.format == "parquet":
            yield from _rows(unit, column=text_field)
            return
        with _open(unit) as file:
            lines = _lines(file, unit)
            yield from _objects(lines, unit) if unit.format == "jsonl" else _paragraphs(lines, unit)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn the decompressors' errors into one that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ConfigError([f"source {path} is damaged: {error}; replace the file or leave it out"]) from error


def _open(unit: Unit) -> BinaryIO:
    if unit.compression == "gz":
        return cast(BinaryIO, gzip.open(unit.path, "rb"))
    if unit.compression == "zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(unit.path), _SKIP_CHUNK))
    return unit.path.open("rb")


class _ZstdFile(io.RawIOBase):
    """All frames of a .zst file. (The library's own reader stops after the first and takes a cut file for whole.)"""

    def __init__(self, path: Path):
        self._file = path.open("rb")
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
    """(offset, line) from the first line that begins in the unit on, to the end of the file: the caller stops."""
    offset = 0
    if unit.start:
        assert unit.stop is not None
        file.seek(unit.start - 1)
        offset = unit.start - 1 + _skip_line(file, at_most=unit.stop - unit.start + 1)
        if offset >= unit.stop:
            return
    for line in file:
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


def _objects(lines: Iterator[tuple[int, bytes]], unit: Unit) -> Iterator[tuple[str, bytes]]:
    """JSONL: the lines that begin in the unit; blank ones are nothing."""
    for offset, line in lines:
        if unit.stop is not None and offset >= unit.stop:
            return
        if line.strip():
            yield f"byte {offset}", line


def _paragraphs(lines: Iterator[tuple[int, bytes]], unit: Unit) -> Iterator[tuple[str, bytes]]:
    """Text: what lies between blank lines. The unit in which the blank line before a document begins owns it."""
    document: list[bytes] = []
    begin, owned = 0, unit.start == 0
    for offset, line in lines:
        inside = unit.stop is None or offset < unit.stop
        if document and line.strip():
            document.append(line)
            continue
        if document:
            yield f"byte {begin}", b"".join(document)
            document = []
        if not line.strip():
            owned = inside
        elif owned:
            document, begin, owned = [line], offset, False
        if not inside and not document:
            return
    if document:
        yield f"byte {begin}", b"".join(document)


def _text(record: bytes | None, *, unit: Unit, text_field: str) -> str | _Refused:
    if record is None:
        return _Refused(NO_TEXT, f": no value in {text_field!r}")
    try:
        text = record.decode("utf-8")
        if unit.format == "jsonl":
            text = _json_text(text, text_field=text_field)
            if isinstance(text, _Refused):
                return text
            text.encode("utf-8")  # JSON can spell half a surrogate pair
    except UnicodeError as error:
        return _Refused(NOT_UTF8, f": {getattr(error, 'reason', error)}")
    text = text.replace("\r\n", "\n").strip()
    return text or _Refused(EMPTY)


def _json_text(line: str, *, text_field: str) -> str | _Refused:
    try:
        record: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return _Refused(BROKEN_JSON, f": {error}")
    if not isinstance(record, dict):
        return _Refused(NO_TEXT, ": not a JSON object")
    value = record.get(text_field)
    if not isinstance(value, str):
        return _Refused(NO_TEXT, f": no string {text_field!r} among the fields {sorted(record)[:10]}")
    return value


# ------------------------------------------------------------------------------------------------------------ parquet


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError([f"source {path}: parquet needs pyarrow: pip install 'pmlm_dist[parquet]'"]) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError([f"source {path} is damaged: {error}; replace the file or leave it out"]) from error


def _rows(unit: Unit, *, column: str) -> Iterator[tuple[str, bytes | None]]:
    import pyarrow

    file = _parquet(unit.path)
    names = file.schema_arrow.names
    if column not in names:
        refuse([f"source {unit.path} has no column {column!r}: set --text-field to one of {names}"])
    kind = file.schema_arrow.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        refuse([f"source {unit.path}: column {column!r} holds {kind}, not strings: set --text-field to another"])
    row = 0
    for batch in file.iter_batches(batch_size=1024, row_groups=[unit.start], columns=[column]):
        for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
            yield f"row group {unit.start}, row {row}", value
            row += 1
