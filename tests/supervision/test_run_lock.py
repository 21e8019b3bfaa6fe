"""The lock of a run's folder: who gets it, who is refused, who has lost it."""

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
from pmlm_dist.supervision.run_lock import LOCK, FolderInUse, LockOwner, RunLock, Superseded, read_owner


def held_by(folder: Path, **changes: object) -> LockOwner:
    """Leave a lock of another process in `folder`."""
    owner = replace(LockOwner.current({}), pid=os.getppid(), started=run_lock._start_time(os.getppid()) or 0)
    owner = replace(owner, **changes)  # pyright: ignore[reportArgumentType]
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(owner)))
    return owner


def test_a_lock_leaves_nothing_behind_not_even_the_folder(tmp_path: Path):
    lock = RunLock.acquire(tmp_path / "run")
    lock.check()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    lock.release()
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("F33")
def test_a_living_holder_of_this_host_is_named_and_keeps_it(tmp_path: Path):
    owner = held_by(tmp_path / "run", job="12")
    with pytest.raises(FolderInUse, match=rf"in use by process {owner.pid} on .*, SLURM job 12: wait for its end"):
        RunLock.acquire(tmp_path / "run", {"SLURM_JOB_ID": "13"})
    assert read_owner(tmp_path / "run" / LOCK) == owner
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


@pytest.mark.fault("F33")
def test_a_dead_holder_loses_it_at_once_also_when_its_number_was_given_again(tmp_path: Path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for changes in ({"pid": gone.pid}, {"started": 1}):
        held_by(tmp_path / "run", **changes)
        lock = RunLock.acquire(tmp_path / "run")
        lock.check()
        lock.release()


@pytest.mark.fault("F34")
def test_an_earlier_life_of_the_same_job_loses_it_while_it_lives(tmp_path: Path):
    held_by(tmp_path / "run", job="12", restart=0)
    lock = RunLock.acquire(tmp_path / "run", {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"})
    lock.check()
    assert lock.attempt.startswith("12.1-")
    lock.release()


@pytest.mark.fault("F33")
def test_a_holder_on_another_host_keeps_it_as_long_as_it_shows_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_lock, "_STALE_S", 2.0)
    monkeypatch.setattr(run_lock, "_TOUCH_S", 0.5)
    lock = RunLock.acquire(tmp_path / "run")
    path = tmp_path / "run" / LOCK
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid_namespace": "elsewhere", "host": "n7"}))
    with pytest.raises(FolderInUse, match="on n7"):
        RunLock.acquire(tmp_path / "run")
    lock._released.set()
    time.sleep(0.6)
    RunLock.acquire(tmp_path / "run").release()


@pytest.mark.fault("F34")
def test_who_has_lost_it_commits_nothing(tmp_path: Path):
    lock = RunLock.acquire(tmp_path / "run")
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints", keep=2, fence=lock.check)
    temporary = folder.temporary(5, attempt=lock.attempt)
    temporary.mkdir(parents=True)
    (temporary / "state.json").write_text("{}")
    held_by(tmp_path / "run", attempt="other")
    with pytest.raises(Superseded, match="has taken over"):
        lock.check()
    with pytest.raises(Superseded):
        folder.fence()
    CheckpointFolder(folder.root, keep=2).remove_temporary()
    assert not list(folder.root.iterdir())
    lock.release()
    assert (tmp_path / "run" / LOCK).exists(), "another's lock is not given back"


def test_of_several_that_come_at_once_one_gets_it(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from pmlm_dist.supervision.run_lock import *\n"
        "try: RunLock.acquire(Path(sys.argv[1]))\nexcept FolderInUse: sys.exit(83)\ntime.sleep(3)"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")]) for _ in range(5)]
    assert sorted(process.wait(timeout=60) for process in started) == [0, 83, 83, 83, 83]
