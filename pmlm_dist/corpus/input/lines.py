"""Raw records of .jsonl and .txt files, for any byte range of a file.

    byte range [start, stop) -> lines -> JSON objects (a line each) | paragraphs (text between blank lines)

A range owns the records that begin in it and reads its last record to the end. Memory is bounded for any length of a
record: a long paragraph is cut into parts, and a long JSON line is rejected.
"""

from collections.abc import Iterator
from typing import BinaryIO

from pmlm_dist.corpus.input import records
from pmlm_dist.corpus.input.records import TOO_LONG, Record, RejectedRecord

SEARCH_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def json_lines(file: BinaryIO, *, start: int, stop: int | None) -> Iterator[tuple[str, Record]]:
    """Yield (location, line) of the lines that begin in [start, stop), without blank ones."""
    pieces: list[bytes] = []
    begin, length = 0, 0
    for offset, piece in _line_pieces(file, start=start, stop=stop):
        if not length and stop is not None and offset >= stop:
            return
        begin, length = offset if not length else begin, length + len(piece)
        if length <= records.MAX_LINE_BYTES:
            pieces.append(piece)
        if piece.endswith(b"\n"):
            yield from _json_line(pieces, begin=begin, length=length)
            pieces, length = [], 0
    yield from _json_line(pieces, begin=begin, length=length)


def _json_line(pieces: list[bytes], *, begin: int, length: int) -> Iterator[tuple[str, Record]]:
    if length > records.MAX_LINE_BYTES:
        yield f"byte {begin}", RejectedRecord(TOO_LONG, f": {length} bytes")
        return
    line = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if line.strip():
        yield f"byte {begin}", line


def paragraphs(file: BinaryIO, *, start: int, stop: int | None) -> Iterator[tuple[str, bytes]]:
    """Yield (location, text) of the paragraphs of [start, stop).

    The range that holds the blank line before a paragraph owns it: the first line alone does not say whether the line
    before it, in another range, was blank.
    """
    lines: list[bytes] = []
    begin, length, owns_next, at_line_start = 0, 0, start == 0, True
    for offset, line in _line_pieces(file, start=start, stop=stop):
        is_inside = stop is None or offset < stop
        is_blank = at_line_start and not line.strip()  # the last piece of a long line may be blank
        at_line_start = line.endswith(b"\n")
        if lines and not is_blank:
            lines.append(line)
            length += len(line)
            if length >= records.PART_BYTES:
                part, rest = _split_part(b"".join(lines))
                yield f"byte {begin}", part
                lines, begin, length = [rest], begin + len(part), len(rest)
            continue
        if lines:
            yield f"byte {begin}", b"".join(lines)
            lines = []
        if is_blank:
            owns_next = is_inside
        elif owns_next:
            lines, begin, length, owns_next = [line], offset, len(line), False
        if not is_inside and not lines:
            return
    if lines:
        yield f"byte {begin}", b"".join(lines)


def _line_pieces(file: BinaryIO, *, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) from the first line that begins at `start` or later, to the end of the file.

    A line of more than `PART_BYTES` comes in pieces; only its last piece ends with a line feed. The caller stops.
    """
    offset = 0
    if start:
        assert stop is not None
        file.seek(start - 1)  # one byte earlier: a line that begins exactly at `start` is not skipped
        offset = start - 1 + _skip_line(file, limit=stop - start + 1)
        if offset >= stop:
            return
    while line := file.readline(records.PART_BYTES):
        yield offset, line.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else line
        offset += len(line)


def _skip_line(file: BinaryIO, *, limit: int) -> int:
    """Skip the rest of a line; return the number of bytes skipped, about `limit` for a longer line."""
    skipped = 0
    while skipped < limit:
        chunk = file.readline(SEARCH_BYTES)
        skipped += len(chunk)
        if not chunk or chunk.endswith(b"\n"):
            break
    return skipped


def _split_part(text: bytes) -> tuple[bytes, bytes]:
    """Cut a long text before its last space; without a space in its last MiB, between two characters."""
    cut = max(text.rfind(space, len(text) - SEARCH_BYTES) for space in (b" ", b"\n"))
    if cut <= 0:
        cut = len(text) - 1
        while text[cut] & 0xC0 == 0x80 and cut > len(text) - 4:  # continuation byte of a UTF-8 character
            cut -= 1
    return text[:cut], text[cut:]
