"""Checkpoint folder: atomic commit, choice of the newest valid checkpoint, retention."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.small_checkpoints import FILES, is_intact, steps_in, truncate, write_checkpoint, write_parts, write_three
from support.worlds import run_world

from pmlm_dist.checkpoint.files import sha256_of
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.manifest import CorruptCheckpoint, rank_file
from pmlm_dist.checkpoint.resume import differences, find_checkpoint
from pmlm_dist.config import ConfigError

pytestmark = pytest.mark.usefixtures("no_fsync")


def test_committed_checkpoints_are_valid(tmp_path: Path):
    folder = write_three(tmp_path)
    assert folder.newest_valid() == (tmp_path / "step-00000030", [])
    assert all(is_intact(tmp_path / f"step-000000{step}") for step in (10, 20, 30))
    pointer = json.loads((tmp_path / "latest").read_text())
    assert pointer["checkpoint"] == "step-00000030"
    assert pointer["manifest_sha256"] == sha256_of(tmp_path / "step-00000030/manifest.json")
    assert not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize("root", ["", "never/made"])
def test_newest_valid_without_checkpoints_returns_none(tmp_path: Path, root: str):
    assert CheckpointFolder(tmp_path / root, keep=1).newest_valid() == (None, [])


@pytest.mark.parametrize(
    ("pointer", "problem"),
    [
        (None, "latest cannot be read"),
        ("", "latest cannot be read"),
        ("{", "latest cannot be read"),
        ('{"checkpoint": "step-00000099"}', "latest points to step-00000099, which is not there"),
        ("{}", "latest points to None"),
        ('{"checkpoint": "step-00000020"}', None),  # the process ended before it moved
    ],
)
@pytest.mark.fault("F22", "F23", "F24")
def test_pointer_is_not_used_for_loading_and_reported_when_wrong(
    tmp_path: Path, pointer: str | None, problem: str | None
):
    folder = write_three(tmp_path)
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_text(pointer)
    newest, problems = folder.newest_valid()
    assert newest == tmp_path / "step-00000030"
    assert problems == [] if problem is None else problem in problems[0]


def test_uncommitted_folder_is_ignored_and_removed(tmp_path: Path):
    folder = write_three(tmp_path)
    shutil.copytree(tmp_path / "step-00000030", folder.temporary(40, attempt="b"))
    assert folder.newest_valid() == (tmp_path / "step-00000030", [])
    folder.remove_temporary()
    assert steps_in(tmp_path) == [10, 20, 30]
    assert not folder.temporary(40, attempt="b").exists()


def test_commit_without_a_rank_file_raises(tmp_path: Path):
    folder = write_three(tmp_path)
    temporary, files = write_parts(folder, 40)
    (temporary / rank_file(1)).unlink()
    files.pop(rank_file(1))
    with pytest.raises(CorruptCheckpoint, match="do not hold each of its elements exactly once"):
        folder.commit(40, temporary, files)
    assert folder.newest_valid() == (tmp_path / "step-00000030", [])


def test_steps_are_ordered_numerically(tmp_path: Path):
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (99_999_999, 100_000_000):
        write_checkpoint(folder, step)
    assert folder.newest_valid() == (tmp_path / "step-100000000", [])


@pytest.mark.fault("F24")
def test_newest_valid_when_all_are_corrupt_raises_and_reports_all(tmp_path: Path):
    folder = write_three(tmp_path)
    for step in (10, 20, 30):
        truncate(tmp_path / f"step-000000{step}" / FILES[1])
    with pytest.raises(ConfigError) as caught:
        folder.newest_valid()
    for step in (10, 20, 30):
        assert sum(str(tmp_path / f"step-000000{step}") in problem for problem in caught.value.problems) == 1
    assert f"remove {tmp_path} to restart from step 0" in caught.value.problems[-1]


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.fault("F32")
def test_retention_keeps_the_newest(tmp_path: Path, keep: int):
    folder = CheckpointFolder(tmp_path, keep=keep)
    for step in range(1, 8):
        write_checkpoint(folder, step)
        assert steps_in(tmp_path) == list(range(max(1, step - keep + 1), step + 1))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_retention_keeps_the_checkpoint_just_written_before_corrupt_later_ones(tmp_path: Path, keep: int):
    """A run that fell back behind corrupt checkpoints saves at a step before theirs."""
    folder = write_three(tmp_path)
    truncate(tmp_path / "step-00000020" / FILES[1])
    truncate(tmp_path / "step-00000030" / FILES[1])
    resumed = CheckpointFolder(tmp_path, keep=keep)
    assert resumed.newest_valid()[0] == tmp_path / "step-00000010"
    write_checkpoint(resumed, 15)
    assert folder.newest_valid()[0] == tmp_path / "step-00000015"


def test_retention_keeps_every_kth_step(tmp_path: Path):
    folder = CheckpointFolder(tmp_path, keep=2, keeps=lambda step: step % 4 == 0)
    for step in range(1, 12):
        write_checkpoint(folder, step)
    assert steps_in(tmp_path) == [4, 8, 10, 11]


def test_retention_does_not_count_corrupt_checkpoints(tmp_path: Path):
    folder = write_three(tmp_path, keep=3)
    truncate(tmp_path / "step-00000030" / FILES[1])
    write_checkpoint(CheckpointFolder(tmp_path, keep=2), 40)
    assert steps_in(tmp_path) == [20, 30, 40]
    write_checkpoint(CheckpointFolder(tmp_path, keep=2), 50)
    assert steps_in(tmp_path) == [40, 50]
    assert folder.newest_valid()[0] == tmp_path / "step-00000050"


def test_commit_replaces_a_corrupt_checkpoint_of_the_same_step(tmp_path: Path):
    folder = write_three(tmp_path)
    corrupt = tmp_path / "step-00000030"
    truncate(corrupt / FILES[1])
    (corrupt / "leftover").touch()
    assert write_checkpoint(folder, 30) == corrupt
    assert is_intact(corrupt)
    assert folder.newest_valid() == (corrupt, [])


@pytest.mark.fault("F43")
def test_retention_keeps_what_others_have_put_into_the_folder(tmp_path: Path):
    """A file in an old checkpoint, checkpoints of another program, and its temporary folder."""
    folder = write_three(tmp_path)
    foreign = [tmp_path / name / "notes.txt" for name in ("step-00000010", "step-5", "step-00000007.tmp-a", "step-x")]
    for file in foreign:
        file.parent.mkdir(exist_ok=True)
        file.write_text("foreign")
    assert [path.name for path in folder.steps()] == ["step-00000010", "step-00000020", "step-00000030"]
    folder.remove_temporary()
    folder.remove_old(folder.folder(30))
    folder.keep_only(30)
    assert all(file.read_text() == "foreign" for file in foreign)
    assert not folder.folder(20).exists()
    write_checkpoint(folder, 10)
    (kept,) = tmp_path.glob("step-00000010.kept-*")
    assert (kept / "notes.txt").read_text() == "foreign"


class Killed(BaseException):
    """Simulated end of the process."""


class Killer:
    """Counts operations that change the disk; simulates a kill before number `at`, or midway if it is a write."""

    OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at: int | None):
        self.count, self.at, self.log = 0, at, []
        for name in self.OPERATIONS:
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))
        opened = Path.open

        def open_counted(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file: Any = opened(path, mode, *args, **kwargs)
            if mode == "xb":  # of an atomic write
                file.write = lambda data, write=file.write: self._write(write, data, path)
            return file

        monkeypatch.setattr(Path, "open", open_counted)

    def _counted(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(target: Any, *args: Any, **kwargs: Any) -> Any:
            self._count(name, os.readlink(f"/proc/self/fd/{target}") if name == "fsync" else target)
            return operation(target, *args, **kwargs)

        return counted

    def _write(self, write: Callable[[bytes], int], data: bytes, path: Path) -> int:
        try:
            self._count("write", path)
        except Killed:
            write(data[: len(data) // 2])
            raise
        return write(data)

    def _count(self, name: str, target: Any) -> None:
        if self.count == self.at:
            raise Killed
        self.count += 1
        self.log.append((name, str(target)))


def commit_over_a_corrupt_one(root: Path, monkeypatch: pytest.MonkeyPatch, *, at: int | None) -> Killer:
    """After steps 10, 20 and a corrupt 30, write 30 again, keeping two; kill at operation `at`."""
    write_three(root)
    folder = CheckpointFolder(root, keep=2)
    truncate(root / "step-00000030" / FILES[1])
    with monkeypatch.context() as patch:
        killer = Killer(patch, at=at)
        with contextlib.suppress(Killed):
            write_checkpoint(folder, 30)
    return killer


@pytest.mark.fault("F21", "F32")
def test_kill_between_any_two_operations_of_a_commit_leaves_a_valid_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    operations = commit_over_a_corrupt_one(tmp_path / "dry", monkeypatch, at=None).count
    assert operations > 15
    seen = set()
    for at in range(operations):
        root = tmp_path / str(at)
        assert commit_over_a_corrupt_one(root, monkeypatch, at=at).count == at
        folder = CheckpointFolder(root, keep=2)
        newest, _ = folder.newest_valid()
        assert newest is not None
        assert is_intact(newest), f"killed before operation {at}"
        seen.add(newest.name)
        folder.remove_temporary()
        assert not list(root.glob("*.tmp-*"))
        write_checkpoint(folder, 30)  # the next attempt
        assert folder.newest_valid() == (root / "step-00000030", [])
        assert steps_in(root) == [20, 30]
    assert seen == {"step-00000020", "step-00000030"}


def test_commit_syncs_every_file_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = commit_over_a_corrupt_one(tmp_path, monkeypatch, at=None).log
    temporary = CheckpointFolder(tmp_path, keep=2).temporary(30, attempt="a")
    committed = log.index(("rename", str(temporary)))
    synced = {re.sub(r"\.json\.tmp-\w+$", ".json", target) for name, target in log[:committed] if name == "fsync"}
    assert synced >= {str(temporary), *(str(temporary / name) for name in (*FILES, "manifest.json"))}
    pointed = next(index for index, (name, target) in enumerate(log) if name == "replace" and "latest" in target)
    assert committed < log.index(("fsync", str(tmp_path))) < pointed
    removed = [index for index, (name, target) in enumerate(log) if "step-00000010" in target and name == "rename"]
    assert removed
    assert min(removed) > pointed


def find_on_rank(root: Path) -> tuple[str, list[str]]:
    """Return what `find_checkpoint` returns or raises on this rank, and its warnings."""
    import warnings

    from pmlm_dist.parallel import groups

    topology = groups.init_process_groups()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = str(find_checkpoint(CheckpointFolder(root, keep=3), topology))
        except ConfigError as error:
            result = str(error)
    return result, [str(warning.message) for warning in caught if "checkpoint" in str(warning.message)]


@pytest.mark.distributed
def test_find_checkpoint_returns_the_same_on_all_ranks_and_rank_0_warns(tmp_path: Path):
    write_three(tmp_path)
    truncate(tmp_path / "step-00000030" / FILES[1])
    (first, warnings), (second, none) = run_world(find_on_rank, 2, tmp_path)
    assert first == second == str(tmp_path / "step-00000020")
    assert len(warnings) == 1
    assert f"{tmp_path / 'step-00000030'} is corrupt" in warnings[0]
    assert f"resuming from {tmp_path / 'step-00000020'}" in warnings[0]
    assert none == []


def find_and_record_on_rank(root: Path) -> tuple[str, list[str]]:
    """Return what `find_checkpoint` returns on this rank, and the files of which this rank computed checksums."""
    from pmlm_dist.checkpoint import files
    from pmlm_dist.parallel import groups

    hashed, sha256 = [], files.sha256_of
    files.sha256_of = lambda path: (hashed.append(f"{path.parent.name}/{path.name}"), sha256(path))[1]
    topology = groups.init_process_groups()
    return str(find_checkpoint(CheckpointFolder(root, keep=3), topology)), hashed


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "corrupt"), [(2, FILES[1]), (2, FILES[2]), (4, FILES[0])])
def test_ranks_verify_a_share_each_and_agree_on_the_checkpoint(tmp_path: Path, ranks: int, corrupt: str):
    write_three(tmp_path)
    content = bytearray((tmp_path / "step-00000030" / corrupt).read_bytes())
    content[-3] ^= 1
    (tmp_path / "step-00000030" / corrupt).write_bytes(content)
    answers = run_world(find_and_record_on_rank, ranks, tmp_path)
    assert {path for path, _ in answers} == {str(tmp_path / "step-00000020")}
    hashed = [name for _, names in answers for name in names]
    assert sorted(hashed) == sorted(f"step-000000{step}/{name}" for step in (20, 30) for name in FILES)
    assert max(len(names) for _, names in answers) == 2 * -(-len(FILES) // ranks)


@pytest.mark.distributed
def test_find_checkpoint_without_a_valid_one_raises_on_every_rank(tmp_path: Path):
    write_checkpoint(CheckpointFolder(tmp_path, keep=1), 10)
    (tmp_path / "step-00000010" / "manifest.json").write_text("[]")
    (first, _), (second, _) = run_world(find_on_rank, 2, tmp_path)
    assert first == second
    assert "no valid checkpoint is left" in first


def test_differences_report_every_setting_that_differs_or_is_missing():
    saved, now = {"a": 1, "b": 2, "c": None}, {"a": 1, "b": 3, "d": 4}
    assert differences(saved, now) == ["b was 2, is now 3", "d was None, is now 4"]
    assert differences(saved, saved) == []
