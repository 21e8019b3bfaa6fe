import json
import sys
from pathlib import Path

import pytest
from support.faulty_server import serving
from support.object_store import object_store

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.input.documents import read_unit
from pmlm_dist.corpus.input.records import SkippedRecords
from pmlm_dist.corpus.input.sources import find_files, open_dataset
from pmlm_dist.corpus.input.units import list_units

TEXTS = [f"document {number} says something of its own" for number in range(200)]


def read(pattern: str, *, unit_bytes: int = 1000, text_field: str = "text") -> tuple[int, list[str]]:
    """Return the number of units, and all texts."""
    units = list_units(find_files([pattern]), unit_bytes=unit_bytes)
    found = [d.text for unit in units for d in read_unit(unit, text_field=text_field, skipped=SkippedRecords())]
    return len(units), found


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_files_are_sorted_and_distinct(tmp_path: Path):
    for name in ("b.txt", "a.jsonl", "c [1].txt"):
        (tmp_path / name).write_text("x")
    found = find_files([f"{tmp_path}/*.txt", f"{tmp_path}/c [1].txt", f"{tmp_path}/*"])
    assert [Path(file.name).name for file in found] == ["a.jsonl", "b.txt", "c [1].txt"]


def test_unusable_sources_are_all_listed(tmp_path: Path):
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ConfigError) as caught:
        find_files([f"{tmp_path}/*.txt", f"{tmp_path}/a.pdf"])
    assert "matches no file" in caught.value.problems[0]
    assert "unknown kind of file: use .txt, .jsonl" in caught.value.problems[1]


# ------------------------------------------------------------------------------------------------------------- fsspec


def test_fsspec_files_are_read_like_local_ones(tmp_path: Path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    memory.pipe({"/sources/a.jsonl": jsonl(TEXTS[:100]), "/sources/b.jsonl": jsonl(TEXTS[100:]), "/sources/c.md": b"x"})
    try:
        units, found = read("memory://sources/*.jsonl")
        assert found == read(f"{tmp_path}/a.jsonl")[1] == TEXTS
        assert units > 10
        with pytest.raises(ConfigError, match=r"c\.md: unknown kind of file"):
            find_files(["memory://sources/*"])
        with pytest.raises(ConfigError, match="matches no file"):
            find_files(["memory://sources/missing.txt"])
    finally:
        memory.rm("/sources", recursive=True)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_object_store_files_are_read_through_its_protocol(scheme: str):
    with object_store(scheme) as store:
        store.pipe({"/bucket/a.jsonl": jsonl(TEXTS[:100]), "/bucket/b.jsonl": jsonl(TEXTS[100:])})
        assert [file.name for file in find_files([f"{scheme}://bucket/*"])] == [
            f"{scheme}://bucket/{name}.jsonl" for name in "ab"
        ]
        units, found = read(f"{scheme}://bucket/*.jsonl")
    assert found == TEXTS
    assert units > 10


def test_pipe_sources_raise_and_run_no_program(tmp_path: Path):
    witness = tmp_path / "witness"
    for pattern in (f"pipe:touch {witness}", f"pipe:touch {witness} s3://bucket/a.txt", f"pipe://touch {witness}"):
        with pytest.raises(ConfigError, match="a source cannot be a program: write its output to a file"):
            find_files([pattern])
    assert not witness.exists()


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "whole files"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_web_server_files_are_read_with_and_without_ranges(tmp_path: Path, ranges: bool, kind: str):
    """With range requests a file is cut into units; without them it is one unit."""
    (tmp_path / f"a.{kind}").write_bytes(jsonl(TEXTS) if kind == "jsonl" else "\n\n".join(TEXTS).encode())
    with serving(tmp_path) as server:
        server.ranges = ranges
        units, found = read(f"{server.address}/a.{kind}")
    assert found == TEXTS
    assert (units > 5) if ranges else (units == 1)


def test_web_server_failures_name_the_source(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    with serving(tmp_path) as server:
        with pytest.raises(ConfigError, match=r"b\.jsonl' matches no file"):
            find_files([f"{server.address}/b.jsonl"])
        (unit,) = list_units(find_files([f"{server.address}/a.jsonl"]))
        server.suffix, server.faults = ".jsonl", ["cut"]
        with pytest.raises(ConfigError, match=r"a\.jsonl cannot be read .*run again"):
            list(read_unit(unit, skipped=SkippedRecords()))


def test_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=rf"{scheme}:// needs more: pip install 'pmlm_dist\[{scheme}\]'"):
            find_files([f"{scheme}://bucket/a.txt"])
    with pytest.raises(ConfigError, match=r"source nowhere://a.txt: .*use http, https, s3, gs"):
        find_files(["nowhere://a.txt"])


# ----------------------------------------------------------------------------------------------------------- datasets


def test_data_set_is_read_from_saved_and_plain_folders(tmp_path: Path):
    """Local folders take the place of a name on the hub."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"body": [*TEXTS, None, "  "], "number": list(range(202))})
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=data).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/part.jsonl").write_bytes(jsonl(TEXTS))
    units, found = read(f"datasets://{tmp_path}/saved", text_field="body")
    assert found == TEXTS
    assert units > 5
    assert read(f"datasets://{tmp_path}/splits?split=test", text_field="body")[1] == TEXTS
    assert read(f"datasets://{tmp_path}/files?split=train")[1] == TEXTS
    with pytest.raises(ConfigError, match=r"no column 'text': set --text-field to one of \['body', 'number'\]"):
        read(f"datasets://{tmp_path}/saved")
    with pytest.raises(ConfigError, match="column 'number' holds int64, not strings"):
        read(f"datasets://{tmp_path}/saved", text_field="number")


def test_unusable_data_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"source datasets://.*/empty: .*check name, config, split"):
        find_files([f"datasets://{tmp_path}/empty"])
    with pytest.raises(ConfigError, match="unknown option 'spilt': use config, split, revision"):
        find_files(["datasets://some/name?spilt=train"])
    open_dataset.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'pmlm_dist\[datasets\]'"):
        find_files(["datasets://some/name"])
