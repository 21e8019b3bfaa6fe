"""Atomic writes: a reader sees the old contents or the new, and an error leaves no temporary file."""

import json
import os
import stat
from pathlib import Path

import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.files import json_line, open_atomically, raise_if_foreign, write_atomically


@pytest.fixture
def fsynced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths passed to fsync, in order."""
    paths: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: paths.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    return paths


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("data", "expected"), [("Füße → ½\n", "Füße → ½\n".encode()), (b"\xff\x00", b"\xff\x00")])
def test_write_atomically_replaces_contents(tmp_path: Path, data: str | bytes, expected: bytes):
    for old in (None, b"something longer than the new contents"):
        if old:
            (tmp_path / "file").write_bytes(old)
        write_atomically(tmp_path / "file", data, durable=False)
        assert (tmp_path / "file").read_bytes() == expected
        assert names_in(tmp_path) == ["file"]


def test_open_atomically_hides_new_contents_until_the_end(tmp_path: Path):
    write_atomically(tmp_path / "file", "old", durable=False)
    with open_atomically(tmp_path / "file", durable=False) as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"


def fail_midway(path: Path, error: type[BaseException]) -> None:
    with open_atomically(path) as file:
        file.write(b"half of the new")
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_open_atomically_on_error_keeps_old_contents(tmp_path: Path, exists: bool, error: type[BaseException]):
    if exists:
        (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        fail_midway(tmp_path / "file", error)
    assert names_in(tmp_path) == ["file"] * exists
    assert not exists or (tmp_path / "file").read_text() == "old"


def test_write_atomically_when_rename_fails_keeps_old_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", "new")
    assert names_in(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_concurrent_writers_do_not_share_a_temporary_file(tmp_path: Path):
    with open_atomically(tmp_path / "file") as first, open_atomically(tmp_path / "file") as second:
        first.write(b"first")
        second.write(b"second")
        assert len(names_in(tmp_path)) == 2
    assert (tmp_path / "file").read_text() == "first"  # the last to end
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_of_a_new_file_follows_the_umask(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", "", durable=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_durable_write_syncs_the_file_before_the_rename_and_the_folder_after(
    tmp_path: Path, fsynced: list[str], monkeypatch: pytest.MonkeyPatch
):
    replace = os.replace

    def logged(source: Path, target: Path) -> None:
        fsynced.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "replace", logged)
    write_atomically(tmp_path / "file", "text")
    file, rename, folder = fsynced
    assert file.startswith(f"{tmp_path}/file.tmp-")
    assert (rename, folder) == ("rename", str(tmp_path))


def test_write_that_is_not_durable_never_syncs(tmp_path: Path, fsynced: list[str]):
    write_atomically(tmp_path / "file", "text", durable=False)
    assert fsynced == []


def test_file_that_is_not_replaced_needs_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "link")
    write_atomically(tmp_path / "file", "first", replace=False)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", "second", replace=False)
    assert (tmp_path / "file").read_text() == "first"
    assert names_in(tmp_path) == ["file"]


def test_result_replaces_only_a_file_of_the_same_command(tmp_path: Path):
    raise_if_foreign(tmp_path / "new.json", mark=b'{"a"')
    (tmp_path / "own.json").write_bytes(b'{"a": 1}')
    raise_if_foreign(tmp_path / "own.json", mark=b'{"a"')
    (tmp_path / "foreign.json").write_bytes(b'{"b": 1}')
    for path in (tmp_path / "foreign.json", tmp_path):
        with pytest.raises(ConfigError, match="exists, and this command has not written it: name another"):
            raise_if_foreign(path, mark=b'{"a"')


@pytest.mark.parametrize(
    "value", ["Füße → ½\u2028", "half \ud83d of \udc00 pairs", {"\ud800": [1, None, "😀"]}, 10**400]
)
def test_json_line_is_one_line_that_reads_back(value: object):
    line = json_line(value)
    assert line.count(b"\n") == 1
    assert json.loads(line) == value


def test_json_line_escapes_surrogates_alone():
    assert json_line("ü\ud800") == '"ü\\ud800"\n'.encode()
    with pytest.raises(TypeError):
        json_line({"id": b"bytes"})
