"""Two attempts in one run folder: one runs, the other commits nothing."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.fault_jobs import Fault, check_recovered, kill, run_attempt, running_job, small_run, trajectory

from pmlm_dist.config import RunConfig
from pmlm_dist.folder_lock import LOCK, read_owner
from pmlm_dist.supervision.exit_codes import ExitCode


class Wait:
    """Wait in this rank until the file `go` exists."""

    def __init__(self, go: Path):
        self.go = go

    def __call__(self) -> None:
        self.go.with_suffix(".waiting").touch()
        while not self.go.exists():
            time.sleep(0.02)


def wait_for(path: Path, *, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def with_long_limits(config: RunConfig) -> RunConfig:
    """Return `config` with limits beyond the duration of a test of two jobs."""
    return replace(config, watchdog=replace(config.watchdog, step_s=90.0, data_s=90.0, save_s=90.0))


@pytest.mark.fault("F33")
def test_second_job_in_the_same_folder_exits_as_in_use(small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig):
    config, go = with_long_limits(small_run(small_corpus, tmp_path / "run")), tmp_path / "go"
    with running_job(config, Fault(Wait(go))) as job:
        wait_for(go.with_suffix(".waiting"))
        second = run_attempt(config)
        assert second.codes == [ExitCode.IN_USE] * 2
        assert "is in use by process" in second.printed
        go.touch()
        assert job.wait() == [0, 0], job.printed
    check_recovered(config, uninterrupted)


@pytest.mark.fault("F33")
def test_lock_of_a_killed_attempt_is_taken_over(small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    assert run_attempt(config, Fault(kill, rank=0)).codes == [137, 137]
    owner = read_owner(config.run_dir / LOCK)
    assert owner is not None
    assert run_attempt(config).codes == [0, 0]
    check_recovered(config, uninterrupted)


@pytest.mark.fault("F34", "F84")
def test_rank_of_an_older_attempt_commits_nothing(small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig):
    config, go = with_long_limits(small_run(small_corpus, tmp_path / "run")), tmp_path / "go"
    old = {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "0", "PMLM_SUPERVISOR": "off"}
    with running_job(config, Fault(Wait(go), rank=0), **old) as zombie:
        wait_for(go.with_suffix(".waiting"))
        new = run_attempt(config, SLURM_JOB_ID="5", SLURM_RESTART_COUNT="1")
        assert new.codes == [0, 0], new.printed
        written = {path: path.stat().st_mtime_ns for path in (config.run_dir / "checkpoints").rglob("*")}
        go.touch()
        zombie.processes[0].join(30)
        assert zombie.processes[0].exitcode == ExitCode.SUPERSEDED, zombie.printed
    assert {path: path.stat().st_mtime_ns for path in written} == written
    committed = [path for path in (config.run_dir / "checkpoints").glob("step-*") if ".tmp" not in path.name]
    assert set(committed) <= written.keys()
    assert trajectory(config).scalars == trajectory(uninterrupted).scalars
