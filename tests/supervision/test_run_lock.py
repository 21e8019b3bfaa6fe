"""The lock of a run folder: acquisition, take-over, and the fence for older attempts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.supervision import run_lock
from pmlm_dist.supervision.run_lock import LOCK, FolderInUse, LockOwner, LockTimes, RunLock, Superseded, read_owner


def write_lock(folder: Path, **changes: object) -> LockOwner:
    """Write a lock of this test's parent process, with some fields changed."""
    owner = replace(LockOwner.current({}), pid=os.getppid(), started=run_lock._start_ticks(os.getppid()) or 0)
    owner = replace(owner, **changes)  # pyright: ignore[reportArgumentType]
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(owner)))
    return owner


def test_released_lock_leaves_no_file_and_no_empty_folder(tmp_path: Path):
    lock = RunLock.acquire(tmp_path / "run")
    lock.check()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    lock.release()
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("F33")
def test_lock_of_a_live_owner_on_this_host_is_kept_and_owner_named(tmp_path: Path):
    owner = write_lock(tmp_path / "run", job="12")
    with pytest.raises(FolderInUse, match=rf"in use by process {owner.pid} on .*, SLURM job 12: wait for its end"):
        RunLock.acquire(tmp_path / "run", {"SLURM_JOB_ID": "13"})
    assert read_owner(tmp_path / "run" / LOCK) == owner
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


@pytest.mark.fault("F33")
def test_lock_of_a_dead_owner_is_taken_over_despite_reused_pid(tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for changes in ({"pid": dead.pid}, {"started": 1}):
        write_lock(tmp_path / "run", **changes)
        lock = RunLock.acquire(tmp_path / "run")
        lock.check()
        lock.release()


@pytest.mark.fault("F34")
def test_lock_of_an_earlier_attempt_of_the_same_job_is_taken_over(tmp_path: Path):
    write_lock(tmp_path / "run", job="12", restart=0)
    lock = RunLock.acquire(tmp_path / "run", {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"})
    lock.check()
    assert lock.attempt.startswith("12.1-")
    lock.release()


@pytest.mark.fault("F33")
def test_lock_of_an_owner_on_another_host_is_kept_while_it_is_touched(tmp_path: Path):
    times = LockTimes(touch_s=0.1, stale_s=1.0, settle_s=0.05, poll_s=0.1)
    lock = RunLock.acquire(tmp_path / "run", times=times)
    path = tmp_path / "run" / LOCK
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid_namespace": "elsewhere", "host": "n7"}))
    with pytest.raises(FolderInUse, match="on n7"):
        RunLock.acquire(tmp_path / "run", times=times)
    lock._released.set()
    time.sleep(0.2)  # a touch may be in progress
    RunLock.acquire(tmp_path / "run", times=times).release()


@pytest.mark.fault("F34")
def test_superseded_attempt_commits_nothing(tmp_path: Path):
    lock = RunLock.acquire(tmp_path / "run")
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
        "import sys; from pathlib import Path; from pmlm_dist.supervision.run_lock import *\n"
        "try: RunLock.acquire(Path(sys.argv[1]))\nexcept FolderInUse: sys.exit(83)\nsys.stdin.read()"
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
