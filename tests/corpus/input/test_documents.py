import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.input import lines, records
from pmlm_dist.corpus.input.documents import read_unit
from pmlm_dist.corpus.input.records import SkippedRecords
from pmlm_dist.corpus.input.sources import local_file
from pmlm_dist.corpus.input.units import list_units


def read(
    *paths: Path, unit_bytes: int = 1 << 20, text_field: str = "text", skipped: SkippedRecords | None = None
) -> list[str]:
    skipped = SkippedRecords() if skipped is None else skipped
    units = list_units([local_file(path) for path in paths], unit_bytes=unit_bytes)
    return [d.text for unit in units for d in read_unit(unit, text_field=text_field, skipped=skipped)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@given(st.text("ab \n\r", max_size=80), st.integers(1, 30))
def test_text_documents_are_independent_of_unit_size(tmp_path_factory, content, unit_bytes):
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_bytes(content.encode())
    # Reference: sequences of lines that are not blank.
    expected, paragraph = [], []
    for line in [*content.encode().split(b"\n"), b""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            expected.append(b"\n".join(paragraph).decode().replace("\r\n", "\n").strip())
            paragraph = []
    assert read(path, unit_bytes=unit_bytes) == expected


@given(st.lists(st.text(min_size=1, max_size=30).filter(str.strip), max_size=8), st.integers(1, 60))
def test_json_documents_are_independent_of_unit_size(tmp_path_factory, texts, unit_bytes):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_bytes(jsonl(texts))
    assert read(path, unit_bytes=unit_bytes) == [text.replace("\r\n", "\n").strip() for text in texts]


def test_documents_are_identified_by_unit_and_record_number(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\nbroken\n{"text": "two"}\n')
    found = [d for unit in list_units([local_file(path)]) for d in read_unit(unit, skipped=SkippedRecords())]
    assert [(d.unit, d.number, d.text) for d in found] == [(0, 0, "one"), (0, 2, "two")]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_compressed_files_equal_plain_ones(tmp_path: Path, kind: str):
    texts = [f"document {number}\nwith two lines" for number in range(500)]
    plain = "\n\n".join(texts).encode() if kind == "txt" else jsonl(texts)
    for name, data in {
        f"p.{kind}": plain,
        f"g.{kind}.gz": gzip.compress(plain),
        f"b.{kind}.bz2": bz2.compress(plain),
        f"x.{kind}.xz": lzma.compress(plain),
        f"streams.{kind}.xz": lzma.compress(plain[:1234]) + lzma.compress(plain[1234:]),
        f"z.{kind}.zst": zstandard.compress(plain),
        f"frames.{kind}.zst": zstandard.compress(plain[:1234]) + zstandard.compress(plain[1234:]),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name, unit_bytes=100) == texts


def test_parquet_row_groups_are_units(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path, texts = tmp_path / "a.parquet", [f"text {number}" for number in range(100)]
    parquet.write_table(pyarrow.table({"body": [*texts, None, ""]}), path, row_group_size=30)
    skipped = SkippedRecords()
    assert len(list_units([local_file(path)])) == 4
    assert read(path, text_field="body", skipped=skipped) == texts
    assert skipped.counts == {"no text field": 1, "empty": 1}
    with pytest.raises(ConfigError, match=r"no column 'text': set --text-field to one of \['body'\]"):
        read(path)


def test_unusable_records_are_counted_with_the_first_location(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b'{"text": "\xff\xfe"}',
        b'{"text": "\\ud800"}',
        b'{"text": "  "}',
        b'{"body": "elsewhere"}',
        b'{"text": 3}',
        b"[1]",
        b"[" * 100_000,
        b'{"text": "also\\u0000good"}',
    ]
    path.write_bytes(b"\n".join(lines))
    skipped = SkippedRecords()
    assert read(path, skipped=skipped) == ["good", "also\0good"]
    assert skipped.counts == {"invalid JSON": 2, "not UTF-8": 2, "empty": 1, "no text field": 3}
    assert skipped.first["invalid JSON"][1].startswith(f"{path}, byte 17: ")
    assert "['body']" in skipped.first["no text field"][1]


def test_text_that_is_not_utf8_is_counted(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffgood\r\nline\r\n\r\n".encode() + b"bad \xe9\r\n\r\n" + "schön".encode())
    skipped = SkippedRecords()
    assert read(path, skipped=skipped) == ["good\nline", "schön"]
    assert skipped.counts == {"not UTF-8": 1}


def test_merged_counts_keep_the_earlier_location():
    early, late = SkippedRecords(), SkippedRecords()
    late.add("empty", unit=5, location="late")
    early.add("empty", unit=2, location="early")
    late.merge(early)
    assert (late.counts["empty"], late.first["empty"]) == (2, (2, "early"))


def test_long_line_is_read_once(tmp_path: Path):
    path, long = tmp_path / "a.jsonl", "word " * 1_000_000
    path.write_bytes(jsonl(["before", long, "after"]))
    assert read(path, unit_bytes=100_000) == ["before", long.strip(), "after"]


def test_empty_files_have_no_units(tmp_path: Path):
    (tmp_path / "a.txt").touch()
    assert list_units([local_file(tmp_path / "a.txt")]) == []


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst", "parquet"])
def test_corrupt_files_are_named(tmp_path: Path, suffix: str):
    plain = jsonl([f"text {number}" for number in range(1000)])
    path = tmp_path / ("a.parquet" if suffix == "parquet" else f"a.jsonl.{suffix}")
    library = {"gz": gzip, "bz2": bz2, "xz": lzma, "zst": zstandard}.get(suffix)
    whole = library.compress(plain) if library else b"PAR1 not a table"
    for data in (whole[:-9], b"BZh9 neither" + whole[12:]):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=f"source {path} is corrupt"):
            read(path)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_long_document_is_cut_into_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    """Cuts are between words, never within a character; the parts together are the document."""
    monkeypatch.setattr(records, "PART_BYTES", 1000)
    monkeypatch.setattr(lines, "SEARCH_BYTES", 100)
    words, unbroken = " ".join(f"wörd{number}" for number in range(2000)), "日本語" * 2000
    texts = ["short before", words, unbroken, "short after"]
    path = tmp_path / f"a.{kind}"
    path.write_bytes("\n\n".join(texts).encode() if kind == "txt" else jsonl(texts))
    for unit_bytes in (1 << 20, 700):
        skipped = SkippedRecords()
        found = read(path, unit_bytes=unit_bytes, skipped=skipped)
        assert len(found) == skipped.records_read > 12
        assert max(map(len, found)) <= 1100
        assert [found[0], found[-1]] == [texts[0], texts[-1]]
        assert "".join(found).replace(" ", "") == "".join(texts).replace(" ", "")
        assert not skipped.counts
        assert {word for part in found for word in part.split()} >= set(words.split())


def test_too_long_line_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "PART_BYTES", 64)
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 500)
    path, skipped = tmp_path / "a.jsonl", SkippedRecords()
    path.write_bytes(jsonl(["before", "x" * 600, "after"]))
    assert read(path, skipped=skipped) == ["before", "after"]
    assert dict(skipped.counts) == {records.TOO_LONG: 1}
    assert "byte 19: 613 bytes" in skipped.first[records.TOO_LONG][1]
