"""The lock of a folder: acquisition, take-over, and the fence for older attempts."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pmlm_dist import folder_lock
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.config import ConfigError
from pmlm_dist.folder_lock import LOCK, FolderInUse, FolderLock, LockOwner, LockTimes, Superseded, read_owner


def write_lock(folder: Path, **changes: object) -> LockOwner:
    """Write a lock of this test's parent process, with some fields changed."""
    owner = replace(LockOwner.current({}), pid=os.getppid(), started=folder_lock._start_ticks(os.getppid()) or 0)
    owner = replace(owner, **changes)  # pyright: ignore[reportArgumentType]
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(owner)))
    return owner


def test_released_lock_leaves_no_file_and_no_empty_folder(tmp_path: Path):
    lock = FolderLock.acquire(tmp_path / "run")
    lock.check()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    lock.release()
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("F33")
def test_lock_of_a_live_owner_on_this_host_is_kept_and_owner_named(tmp_path: Path):
    owner = write_lock(tmp_path / "run", job="12")
    with pytest.raises(FolderInUse, match=rf"in use by process {owner.pid} on .*, SLURM job 12: wait for its end"):
        FolderLock.acquire(tmp_path / "run", {"SLURM_JOB_ID": "13"})
    assert read_owner(tmp_path / "run" / LOCK) == owner
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


@pytest.mark.fault("F33")
def test_lock_of_a_dead_owner_is_taken_over_despite_reused_pid(tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for changes in ({"pid": dead.pid}, {"started": 1}):
        write_lock(tmp_path / "run", **changes)
        lock = FolderLock.acquire(tmp_path / "run")
        lock.check()
        lock.release()


@pytest.mark.fault("F34")
def test_lock_of_an_earlier_attempt_of_the_same_job_is_taken_over(tmp_path: Path):
    write_lock(tmp_path / "run", job="12", restart=0)
    lock = FolderLock.acquire(tmp_path / "run", {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"})
    lock.check()
    assert lock.attempt.startswith("12.1-")
    lock.release()


@pytest.mark.fault("F33")
def test_lock_of_an_owner_on_another_host_is_kept_while_it_is_touched(tmp_path: Path):
    times = LockTimes(touch_s=0.1, stale_s=1.0, settle_s=0.05, poll_s=0.1)
    lock = FolderLock.acquire(tmp_path / "run", times=times)
    path = tmp_path / "run" / LOCK
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid_namespace": "elsewhere", "host": "n7"}))
    with pytest.raises(FolderInUse, match="on n7"):
        FolderLock.acquire(tmp_path / "run", times=times)
    lock._released.set()
    time.sleep(0.2)  # a touch may be in progress
    FolderLock.acquire(tmp_path / "run", times=times).release()


@pytest.mark.fault("F34")
def test_superseded_attempt_commits_nothing(tmp_path: Path):
    lock = FolderLock.acquire(tmp_path / "run")
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints", keep=2, fence=lock.check)
    temporary = folder.temporary(5, attempt=lock.attempt)
    temporary.mkdir(parents=True)
    (temporary / "state.json").write_text("{}")
    write_lock(tmp_path / "run", attempt="other")
    with pytest.raises(Superseded, match="has taken over"):
        lock.check()
    with pytest.raises(Superseded):
        folder.fence()
    CheckpointFolder(folder.root, keep=2).remove_temporary()
    assert not list(folder.root.iterdir())
    lock.release()
    assert (tmp_path / "run" / LOCK).exists(), "the lock of another attempt was removed"


def test_one_of_several_concurrent_attempts_acquires_the_lock(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from pmlm_dist.folder_lock import *\n"
        "try: FolderLock.acquire(Path(sys.argv[1]))\nexcept FolderInUse: sys.exit(83)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(5)]
    deadline = time.monotonic() + 60
    while sum(process.poll() is None for process in processes) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in processes:
        process.communicate(timeout=20)  # closes the input of the owner, which ends
    assert sorted(process.returncode for process in processes) == [0, 83, 83, 83, 83]


def without_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process see a file system such as exFAT."""

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)


def test_lock_needs_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_hard_links(monkeypatch)
    write_lock(tmp_path / "run", started=1)  # of a dead process
    for _ in range(2):
        with FolderLock.acquire(tmp_path / "run") as lock:
            lock.check()
            assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
        assert not list((tmp_path / "run").iterdir())


@pytest.mark.fault("F33")
def test_dead_owner_is_replaced_by_one_of_two_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second attempt found the dead owner, too, and was suspended until the first had taken over."""
    write_lock(tmp_path / "run", started=1)
    check_alive, first = folder_lock._is_alive, []

    def suspended(*arguments: Any, **options: Any) -> bool:
        alive = check_alive(*arguments, **options)
        if not first:
            first.append(None)
            first[0] = FolderLock.acquire(tmp_path / "run")
            (tmp_path / "run" / LOCK).write_text(
                json.dumps(
                    {**asdict(first[0]._owner), "pid": os.getppid(), "started": folder_lock._start_ticks(os.getppid())}
                )
            )
        return alive

    monkeypatch.setattr(folder_lock, "_is_alive", suspended)
    with pytest.raises(FolderInUse):
        FolderLock.acquire(tmp_path / "run")
    first[0].check()


def test_lock_being_written_is_kept_and_an_abandoned_one_is_taken_over(tmp_path: Path):
    times = LockTimes(stale_s=0.6, settle_s=0.0, poll_s=0.05)
    owner = write_lock(tmp_path)
    content = (tmp_path / LOCK).read_text()
    (tmp_path / LOCK).write_text("")
    writer = threading.Timer(0.2, (tmp_path / LOCK).write_text, [content])
    writer.start()
    with pytest.raises(FolderInUse):
        FolderLock.acquire(tmp_path, times=times)
    writer.join()
    assert read_owner(tmp_path / LOCK) == owner
    (tmp_path / LOCK).write_text("")
    (tmp_path / f"{LOCK}-takeover").touch()  # of a process that was killed during a take-over
    FolderLock.acquire(tmp_path, times=times).release()
    assert not list(tmp_path.iterdir())


def test_lock_beside_an_output_leaves_the_output_alone(tmp_path: Path):
    with FolderLock.acquire(tmp_path / "model", beside=True):
        assert [path.name for path in tmp_path.iterdir()] == [f"model{LOCK}"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["notes of a user", "[1]", "[" * 100_000])
def test_foreign_file_with_the_name_of_a_lock_is_kept(tmp_path: Path, text: str):
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(FolderInUse, match="is no lock of this program: move it"):
        FolderLock.acquire(tmp_path)
    assert (tmp_path / LOCK).read_text() == text


def test_foreign_folder_with_the_name_of_a_lock_is_kept(tmp_path: Path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(FolderInUse, match="is no lock of this program: move it"):
        FolderLock.acquire(tmp_path)
    assert (tmp_path / LOCK).is_dir()


def test_output_that_is_no_folder_is_one_message(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    for output, beside in (("file", False), ("link", False), ("file/model", False), ("file/model", True)):
        with pytest.raises(ConfigError, match="is no folder, or not within one: give another"):
            FolderLock.acquire(tmp_path / output, beside=beside)
