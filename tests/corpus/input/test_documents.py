import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.input import documents
from pmlm_dist.corpus.input.documents import Skips, list_units, read_unit
from pmlm_dist.corpus.input.sources import local_file


def read(*paths: Path, unit_bytes: int = 1 << 20, text_field: str = "text", skips: Skips | None = None) -> list[str]:
    skips = Skips() if skips is None else skips
    units = list_units([local_file(path) for path in paths], unit_bytes=unit_bytes)
    return [d.text for unit in units for d in read_unit(unit, text_field=text_field, skips=skips)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@given(st.text("ab \n\r", max_size=80), st.integers(1, 30))
def test_units_of_any_size_give_the_same_text_documents(tmp_path_factory, content, unit_bytes):
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_bytes(content.encode())
    # The longhand reading: runs of lines with something on them.
    expected, run = [], []
    for line in [*content.encode().split(b"\n"), b""]:
        if line.strip():
            run.append(line)
        elif run:
            expected.append(b"\n".join(run).decode().replace("\r\n", "\n").strip())
            run = []
    assert read(path, unit_bytes=unit_bytes) == expected


@given(st.lists(st.text(min_size=1, max_size=30).filter(str.strip), max_size=8), st.integers(1, 60))
def test_units_of_any_size_give_the_same_json_documents(tmp_path_factory, texts, unit_bytes):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_bytes(jsonl(texts))
    assert read(path, unit_bytes=unit_bytes) == [text.replace("\r\n", "\n").strip() for text in texts]


def test_identities_are_unit_and_record_number(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\nbroken\n{"text": "two"}\n')
    found = [d for unit in list_units([local_file(path)]) for d in read_unit(unit, skips=Skips())]
    assert [(d.unit, d.number, d.text) for d in found] == [(0, 0, "one"), (0, 2, "two")]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_compressed_files_equal_plain_ones(tmp_path: Path, kind: str):
    texts = [f"document {number}\nwith two lines" for number in range(500)]
    plain = "\n\n".join(texts).encode() if kind == "txt" else jsonl(texts)
    for name, data in {
        f"p.{kind}": plain,
        f"g.{kind}.gz": gzip.compress(plain),
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
    skips = Skips()
    assert len(list_units([local_file(path)])) == 4
    assert read(path, text_field="body", skips=skips) == texts
    assert skips.counts == {"no text field": 1, "empty": 1}
    with pytest.raises(ConfigError, match=r"no column 'text': set --text-field to one of \['body'\]"):
        read(path)


def test_unusable_records_are_counted_with_the_first_place(tmp_path: Path):
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
    skips = Skips()
    assert read(path, skips=skips) == ["good", "also\0good"]
    assert skips.counts == {"broken JSON": 2, "not UTF-8": 2, "empty": 1, "no text field": 3}
    assert skips.first["broken JSON"][1].startswith(f"{path}, byte 17: ")
    assert "['body']" in skips.first["no text field"][1]


def test_text_that_is_not_utf8_is_counted(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffgood\r\nline\r\n\r\n".encode() + b"bad \xe9\r\n\r\n" + "schön".encode())
    skips = Skips()
    assert read(path, skips=skips) == ["good\nline", "schön"]
    assert skips.counts == {"not UTF-8": 1}


def test_merged_skips_keep_the_earlier_offender():
    early, late = Skips(), Skips()
    late.add("empty", unit=5, place="late")
    early.add("empty", unit=2, place="early")
    late.merge(early)
    assert (late.counts["empty"], late.first["empty"]) == (2, (2, "early"))


def test_a_long_line_is_read_once_and_whole(tmp_path: Path):
    path, long = tmp_path / "a.jsonl", "word " * 1_000_000
    path.write_bytes(jsonl(["before", long, "after"]))
    assert read(path, unit_bytes=100_000) == ["before", long.strip(), "after"]


def test_empty_files_have_no_units(tmp_path: Path):
    (tmp_path / "a.txt").touch()
    assert list_units([local_file(tmp_path / "a.txt")]) == []


@pytest.mark.parametrize("suffix", ["gz", "zst", "parquet"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str):
    plain = jsonl([f"text {number}" for number in range(1000)])
    path = tmp_path / ("a.parquet" if suffix == "parquet" else f"a.jsonl.{suffix}")
    path.write_bytes({"gz": gzip.compress(plain)[:-20], "zst": zstandard.compress(plain)[:-9]}.get(suffix, b"PAR1 no"))
    with pytest.raises(ConfigError, match=f"source {path} is damaged"):
        read(path)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_document_longer_than_a_part_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    """Cut between words and never within a character; together the parts are the document."""
    monkeypatch.setattr(documents, "PART_BYTES", 1000)
    monkeypatch.setattr(documents, "_SKIP_CHUNK", 100)
    words, unbroken = " ".join(f"wörd{number}" for number in range(2000)), "日本語" * 2000
    texts = ["short before", words, unbroken, "short after"]
    path = tmp_path / f"a.{kind}"
    path.write_bytes("\n\n".join(texts).encode() if kind == "txt" else jsonl(texts))
    for unit_bytes in (1 << 20, 700):
        skips = Skips()
        found = read(path, unit_bytes=unit_bytes, skips=skips)
        assert len(found) == skips.records > 12
        assert max(map(len, found)) <= 1100
        assert [found[0], found[-1]] == [texts[0], texts[-1]]
        assert "".join(found).replace(" ", "") == "".join(texts).replace(" ", "")
        assert not skips.counts
        assert {word for part in found for word in part.split()} >= set(words.split())


def test_a_line_that_is_too_long_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "PART_BYTES", 64)
    monkeypatch.setattr(documents, "LONGEST_LINE", 500)
    path, skips = tmp_path / "a.jsonl", Skips()
    path.write_bytes(jsonl(["before", "x" * 600, "after"]))
    assert read(path, skips=skips) == ["before", "after"]
    assert dict(skips.counts) == {documents.TOO_LONG: 1}
    assert "byte 19: 613 bytes" in skips.first[documents.TOO_LONG][1]
