"""Checkpoints on disk: whatever is damaged or interrupted, the newest whole one is found, and never a broken one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import run_world

from pmlm_dist.config import ConfigError
from pmlm_dist.training.checkpoint import CheckpointFolder, differences, faults_of, find_checkpoint

FILES = ("state.json", "mp_rank_00_model_states.pt", "shards/zero_pp_rank_0.pt")


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


def content(step: int, name: str) -> bytes:
    """What the file `name` of the checkpoint of `step` holds."""
    return hashlib.sha256(f"{step} {name}".encode()).digest() * 8


def write(folder: CheckpointFolder, step: int) -> Path:
    """A whole checkpoint, as rank 0 writes it."""
    temporary = folder.begin(step)
    for name in FILES:
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_bytes(content(step, name))
    return folder.commit(step)


def three(root: Path, *, keep: int = 3) -> CheckpointFolder:
    """Whole checkpoints of steps 10, 20 and 30."""
    folder = CheckpointFolder(root, keep=keep)
    for step in (10, 20, 30):
        write(folder, step)
    return folder


def steps_of(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("step-*") if path.name[5:].isdigit())


def is_intact(path: Path) -> bool:
    """Whether a checkpoint holds exactly what was written, found out without its manifest."""
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    found.pop("manifest.json")
    return found == {name: content(int(path.name[5:]), name) for name in FILES}


def test_what_was_written_is_found_whole(tmp_path: Path):
    folder = three(tmp_path)
    assert folder.newest_whole() == (tmp_path / "step-00000030", [])
    assert all(is_intact(tmp_path / f"step-000000{step}") for step in (10, 20, 30))
    assert json.loads((tmp_path / "latest").read_text()) == {"checkpoint": "step-00000030"}
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("root", ["", "never/made"])
def test_without_checkpoints_there_is_none_and_no_complaint(tmp_path: Path, root: str):
    assert CheckpointFolder(tmp_path / root, keep=1).newest_whole() == (None, [])


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def cut(path: Path, *, by: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-by])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file cut by a byte": (lambda path: cut(path / FILES[2]), "zero_pp_rank_0.pt has 255 bytes, expected 256"),
    "an empty file": (lambda path: (path / FILES[1]).write_bytes(b""), "model_states.pt has 0 bytes, expected 256"),
    "a missing file": (lambda path: (path / FILES[0]).unlink(), "state.json is missing"),
    "a missing folder": (lambda path: shutil.rmtree(path / "shards"), "zero_pp_rank_0.pt is missing"),
    "a file too many": (lambda path: (path / "shards/evil.pt").touch(), "shards/evil.pt is not in the manifest"),
    "a folder in a file's place": (
        lambda path: ((path / FILES[1]).unlink(), (path / FILES[1]).mkdir()),
        "mp_rank_00_model_states.pt is missing",
    ),
    "another step's file": (lambda path: (path / FILES[1]).write_bytes(content(20, FILES[1])), "another checksum"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "an empty manifest": (lambda path: (path / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "half a manifest": (lambda path: cut(path / "manifest.json", by=300), "manifest.json cannot be read"),
    "a manifest of nothing": (lambda path: edit_manifest(path, lambda m: m.update(files={})), "manifest.json"),
    "a manifest of bytes": (lambda path: (path / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json"),
    "a manifest that is a list": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json"),
    "a manifest without files": (lambda path: edit_manifest(path, lambda m: m.pop("files")), "manifest.json"),
    "a manifest with a list of files": (
        lambda path: edit_manifest(path, lambda m: m.update(files=[])),
        "manifest.json",
    ),
    "an entry without checksum": (
        lambda path: edit_manifest(path, lambda m: m["files"][FILES[0]].pop("sha256")),
        "manifest.json",
    ),
    "an entry that is a number": (
        lambda path: edit_manifest(path, lambda m: m["files"].update({FILES[0]: 3})),
        "manifest.json",
    ),
    "no files at all": (lambda path: [file.unlink() for file in path.rglob("*") if file.is_file()], "manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_the_damage_named(tmp_path: Path, damage: str):
    folder = three(tmp_path)
    inflict, complaint = DAMAGES[damage]
    inflict(tmp_path / "step-00000030")
    newest, complaints = folder.newest_whole()
    assert newest == tmp_path / "step-00000020"
    assert len(complaints) >= 1
    assert all(str(tmp_path / "step-00000030") in line for line in complaints)
    assert any(complaint in line for line in complaints), complaints


def test_several_damaged_ones_are_all_named(tmp_path: Path):
    folder = three(tmp_path)
    cut(tmp_path / "step-00000030" / FILES[1])
    (tmp_path / "step-00000020" / FILES[0]).unlink()
    newest, complaints = folder.newest_whole()
    assert newest == tmp_path / "step-00000010"
    assert [re.findall(r"step-0*(\d+)", line) for line in complaints] == [["30"], ["20"]]


def test_an_unreadable_file_counts_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that answers with an error, for instance."""
    folder = three(tmp_path)
    digest = hashlib.file_digest

    def broken(file: Any, algorithm: str) -> Any:
        if file.name.endswith(f"step-00000030/{FILES[1]}"):
            raise OSError(5, "Input/output error")
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", broken)
    newest, complaints = folder.newest_whole()
    assert newest == tmp_path / "step-00000020"
    assert "Input/output error" in complaints[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    """Whole checkpoints of steps 10 and 20, to be left as they are."""
    folder = CheckpointFolder(tmp_path_factory.mktemp("two"), keep=2)
    for step in (10, 20):
        write(folder, step)
    return folder


@contextlib.contextmanager
def flipped(path: Path, where: float, mask: int) -> Iterator[None]:
    """Change the byte at the share `where` of a file for a while."""
    whole = path.read_bytes()
    at = int(where * len(whole))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
    try:
        yield
    finally:
        path.write_bytes(whole)


POSITION, MASK = st.floats(0, 1, exclude_max=True), st.integers(1, 255)


@given(where=POSITION, mask=MASK, name=st.sampled_from(FILES))
@settings(max_examples=300, deadline=None)
def test_a_changed_byte_anywhere_is_noticed(two: CheckpointFolder, where: float, mask: int, name: str):
    with flipped(two.folder(20) / name, where, mask):
        newest, (complaint,) = two.newest_whole()
    assert newest == two.folder(10)
    assert f"{name} has another checksum" in complaint


@given(where=POSITION, mask=MASK)
@settings(max_examples=500, deadline=None)
def test_a_changed_byte_in_the_manifest_never_ends_the_search(two: CheckpointFolder, where: float, mask: int):
    """A blank that became another blank means nothing; any other change passes this checkpoint over."""
    manifest = two.folder(20) / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    with flipped(manifest, where, mask):
        newest, complaints = two.newest_whole()
        if newest == two.folder(20):
            assert json.loads(manifest.read_text())["files"] == files
        else:
            assert newest == two.folder(10)
            assert complaints


@pytest.mark.parametrize(
    "pointer", [None, "", "{", '{"checkpoint": "step-00000099"}', '{"checkpoint": "step-00000010"}']
)
def test_the_pointer_does_not_decide(tmp_path: Path, pointer: str | None):
    folder = three(tmp_path)
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_text(pointer)
    assert folder.newest_whole() == (tmp_path / "step-00000030", [])


def test_a_folder_that_was_never_committed_does_not_count(tmp_path: Path):
    folder = three(tmp_path)
    shutil.copytree(tmp_path / "step-00000030", tmp_path / "step-00000040.tmp")
    assert folder.newest_whole() == (tmp_path / "step-00000030", [])
    begun = folder.begin(40)
    assert not list(begun.iterdir())  # what an earlier life left in it is gone


def test_steps_are_ordered_as_numbers(tmp_path: Path):
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (99_999_999, 100_000_000):
        write(folder, step)
    assert folder.newest_whole() == (tmp_path / "step-100000000", [])


def test_when_none_is_whole_all_are_named_and_nothing_starts_anew(tmp_path: Path):
    folder = three(tmp_path)
    for step in (10, 20, 30):
        cut(tmp_path / f"step-000000{step}" / FILES[1])
    with pytest.raises(ConfigError) as caught:
        folder.newest_whole()
    for step in (10, 20, 30):
        assert sum(str(tmp_path / f"step-000000{step}") in problem for problem in caught.value.problems) == 1
    assert f"remove {tmp_path} to start anew" in caught.value.problems[-1]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int):
    folder = CheckpointFolder(tmp_path, keep=keep)
    for step in range(1, 8):
        write(folder, step)
        assert steps_of(tmp_path) == list(range(max(1, step - keep + 1), step + 1))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_retention_never_trades_the_checkpoint_just_written_for_a_broken_one(tmp_path: Path, keep: int):
    """A run falls back behind broken checkpoints, and then saves at a step before theirs."""
    folder = three(tmp_path)
    cut(tmp_path / "step-00000020" / FILES[1])
    cut(tmp_path / "step-00000030" / FILES[1])
    again = CheckpointFolder(tmp_path, keep=keep)
    assert again.newest_whole()[0] == tmp_path / "step-00000010"
    write(again, 15)
    assert folder.newest_whole()[0] == tmp_path / "step-00000015"


def test_a_broken_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    folder = three(tmp_path)
    broken = tmp_path / "step-00000030"
    cut(broken / FILES[1])
    (broken / "left over").touch()
    assert write(folder, 30) == broken
    assert is_intact(broken)
    assert folder.newest_whole() == (broken, [])


class Killed(BaseException):
    """The process ended here."""


class Killer:
    """Counts operations that change the disk and ends the process before number `at`, or within it if it is a write."""

    OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at: int | None):
        self.count, self.at, self.log = 0, at, []
        for name in self.OPERATIONS:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        write_text = Path.write_text

        def half(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
            try:
                self._strike("write", path)
            except Killed:
                write_text(path, text[: len(text) // 2], *args, **kwargs)
                raise
            return write_text(path, text, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", half)

    def _watched(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def watched(target: Any, *args: Any, **kwargs: Any) -> Any:
            self._strike(name, os.readlink(f"/proc/self/fd/{target}") if name == "fsync" else target)
            return operation(target, *args, **kwargs)

        return watched

    def _strike(self, name: str, target: Any) -> None:
        if self.count == self.at:
            raise Killed
        self.count += 1
        self.log.append((name, str(target)))


def commit_over_a_broken_one(root: Path, monkeypatch: pytest.MonkeyPatch, *, at: int | None) -> Killer:
    """With steps 10, 20 and a broken 30 there, write 30 again, keeping two; the process ends at operation `at`."""
    folder = three(root)
    folder.keep = 2
    cut(root / "step-00000030" / FILES[1])
    temporary = folder.begin(30)
    for name in FILES:
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_bytes(content(30, name))
    with monkeypatch.context() as patch:
        killer = Killer(patch, at=at)
        with contextlib.suppress(Killed):
            folder.commit(30)
    return killer


def test_an_end_between_any_two_operations_of_a_commit_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    operations = commit_over_a_broken_one(tmp_path / "dry", monkeypatch, at=None).count
    assert operations > 15
    seen = set()
    for at in range(operations):
        root = tmp_path / str(at)
        assert commit_over_a_broken_one(root, monkeypatch, at=at).count == at
        folder = CheckpointFolder(root, keep=2)
        newest, _ = folder.newest_whole()
        assert newest is not None
        assert is_intact(newest), f"killed before operation {at}"
        seen.add(newest.name)
        write(folder, 30)  # the next life gets there again
        assert folder.newest_whole() == (root / "step-00000030", [])
        assert steps_of(root) == [20, 30]
    assert seen == {"step-00000020", "step-00000030"}


def test_every_byte_is_on_the_disk_before_a_checkpoint_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = commit_over_a_broken_one(tmp_path, monkeypatch, at=None).log
    temporary = tmp_path / "step-00000030.tmp"
    named = log.index(("rename", str(temporary)))
    flushed = {target for name, target in log[:named] if name == "fsync"}
    assert flushed >= {str(temporary), *(str(temporary / name) for name in (*FILES, "manifest.json", "shards"))}
    pointed = next(index for index, (name, target) in enumerate(log) if name == "replace" and "latest" in target)
    assert named < log.index(("fsync", str(tmp_path))) < pointed
    removed = [index for index, (name, target) in enumerate(log) if "step-00000010" in target and name == "rmdir"]
    assert removed
    assert min(removed) > pointed


def found_by_ranks(root: Path) -> tuple[str, list[str]]:
    """What a rank of a world gets: the checkpoint or the problems, and the warnings."""
    import warnings

    from pmlm_dist.parallel import groups

    topology = groups.start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = str(find_checkpoint(CheckpointFolder(root, keep=3), topology))
        except ConfigError as error:
            found = str(error)
    return found, [str(warning.message) for warning in caught if "checkpoint" in str(warning.message)]


@pytest.mark.distributed
def test_all_ranks_go_on_from_the_same_checkpoint_and_one_warns(tmp_path: Path):
    three(tmp_path)
    cut(tmp_path / "step-00000030" / FILES[1])
    (first, warned), (second, silent) = run_world(found_by_ranks, 2, tmp_path)
    assert first == second == str(tmp_path / "step-00000020")
    assert len(warned) == 1
    assert f"{tmp_path / 'step-00000030'} is not whole" in warned[0]
    assert f"going on from {tmp_path / 'step-00000020'}" in warned[0]
    assert silent == []


@pytest.mark.distributed
def test_no_whole_checkpoint_ends_every_rank_alike(tmp_path: Path):
    write(CheckpointFolder(tmp_path, keep=1), 10)
    (tmp_path / "step-00000010" / "manifest.json").write_text("[]")
    (first, _), (second, _) = run_world(found_by_ranks, 2, tmp_path)
    assert first == second
    assert "no whole checkpoint is left" in first


def test_faults_of_a_whole_checkpoint_are_none(tmp_path: Path):
    assert faults_of(write(CheckpointFolder(tmp_path, keep=1), 1)) == []


def test_differences_name_every_setting_that_differs_or_is_missing():
    saved, now = {"a": 1, "b": 2, "c": None}, {"a": 1, "b": 3, "d": 4}
    assert differences(saved, now) == ["b was 2, is now 3", "d was None, is now 4"]
    assert differences(saved, saved) == []
