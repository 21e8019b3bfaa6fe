"""Interruptions of jobs on a cluster: every run resumes, and every step equals that of an uninterrupted run."""

import os
import re
import signal
from pathlib import Path

import pytest
from support.slurm_cluster import processes_of, rank_process, wait_until
from support.submissions import ROOT, Submission, check_equal, step_scalars

from pmlm_dist.supervision.processes import process_state


def steps_saved(run_dir: Path) -> list[int]:
    names = [path.name[5:] for path in (run_dir / "checkpoints").glob("step-*")]
    return sorted(int(number) for number in names if number.isdecimal())


def resumed_steps(printed: str) -> list[int]:
    """Return the step that each attempt of a job resumed after."""
    return [int(step) for step in re.findall(r"resuming after step (\d+);", printed)]


@pytest.mark.fault("F80", "F81")
def test_signal_and_requeue_lose_no_step(submit: Submission, uninterrupted: Path, tmp_path: Path):
    """`scancel --signal=USR1` reaches all processes of the step, loader workers too; `scontrol requeue` sends TERM."""
    run_dir, cluster = tmp_path / "run", submit.cluster
    job = submit.pretrain(run_dir)
    job.wait_for_print("step  20/")
    cluster.run("scancel", "--signal=USR1", job.number)
    job.wait_for_print("stopped by a signal to stop")
    job.wait_for_restart(1)
    job.wait_for_print("resuming after step")
    (first,) = resumed_steps(job.printed())
    assert first >= 20
    cluster.run("scontrol", "requeue", job.number)
    job.wait_for_restart(2)
    assert job.wait_for_end() == "COMPLETED", job.printed()
    printed = job.printed()
    assert printed.count("stopped by a signal to stop") == 2
    second = resumed_steps(printed)[1]
    assert second >= first
    assert "Traceback" not in printed
    assert job.restarts() == 2
    check_equal(run_dir, uninterrupted)


@pytest.mark.fault("F80")
def test_job_at_its_time_limit_saves_and_resumes(submit: Submission, uninterrupted: Path, tmp_path: Path):
    run_dir, cluster = tmp_path / "run", submit.cluster
    job = submit.pretrain(run_dir, options=("--time=20", "--signal=B:USR1@30"), GRACE_S="25")
    job.wait_for_print("step  20/", timeout_s=300)
    cluster.run(
        "scancel", "--signal=STOP", job.number
    )  # the ranks alone: otherwise the run would complete before the limit
    job.set_limit(within_s=35)  # not before: on a busy machine ranks take more than a minute to start
    job.wait_for_print("USR1: the time limit is near", timeout_s=120)
    cluster.run("scancel", "--signal=CONT", job.number)
    job.wait_for_restart(1)
    cluster.run("scontrol", "update", f"jobid={job.number}", "TimeLimit=20")
    assert job.wait_for_end() == "COMPLETED", job.printed()
    assert job.printed().count("USR1: the time limit is near") == 1
    assert resumed_steps(job.printed())[0] >= 20
    check_equal(run_dir, uninterrupted)


@pytest.mark.fault("F83")
def test_node_failure_loses_only_steps_since_last_checkpoint(submit: Submission, uninterrupted: Path, tmp_path: Path):
    run_dir, cluster = tmp_path / "run", submit.cluster
    job = submit.pretrain(run_dir)
    job.wait_for_print("step  60/")
    lost = job.nodes()[1]
    cluster.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    try:
        job.wait_for_restart(1)
        job.wait_for_print("resuming after step")
        assert lost not in job.nodes()
    finally:
        cluster.run("scontrol", "update", f"nodename={lost}", "state=resume")
    assert job.wait_for_end() == "COMPLETED", job.printed()
    assert resumed_steps(job.printed())[0] >= 50
    check_equal(run_dir, uninterrupted)


@pytest.mark.nightly
@pytest.mark.fault("F84")
def test_ranks_that_outlive_their_node_daemon_change_nothing(submit: Submission, uninterrupted: Path, tmp_path: Path):
    """Kill the daemon of rank 0's node: SLURM restarts the job on other nodes, beside the old ranks and batch script.

    The old processes are stopped meanwhile, so that they continue long after the new attempt has started.
    """
    run_dir, cluster = tmp_path / "run", submit.cluster
    job = submit.pretrain(run_dir)
    job.wait_for_print("step  60/")
    node = job.nodes()[0]
    cluster.run("scancel", "--signal=STOP", job.number)
    rank_0, old = rank_process(job.number, rank=0), processes_of(job.number, node=node)
    wait_until(
        lambda: process_state(rank_0) == "stopped", timeout_s=20, what=job.printed
    )  # scancel does not wait for it
    cluster.kill_daemon(f"slurmd.{node}")
    try:
        job.wait_for_restart(1, timeout_s=120)
        job.wait_for_print("resuming after step")
        assert node not in job.nodes()
        remaining = [pid for pid in old if Path(f"/proc/{pid}").exists()]
        assert rank_0 in remaining, cluster.logs(node) + job.printed()
        for pid in remaining:
            os.kill(pid, signal.SIGCONT)
        assert job.wait_for_end() == "COMPLETED", job.printed()
        wait_until(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in old),
            timeout_s=60,
            what=lambda: f"not all have ended: { {pid: process_state(pid) for pid in old} }\n{job.printed()}",
        )
    finally:
        cluster.start_daemon(node)
    assert job.restarts() == 1
    assert len(resumed_steps(job.printed())) == 1
    check_equal(run_dir, uninterrupted)


@pytest.mark.fault("F01", "F87")
def test_killed_rank_is_named_and_job_resumes(submit: Submission, uninterrupted: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    job = submit.pretrain(run_dir)
    job.wait_for_print("step  60/")
    os.kill(rank_process(job.number, rank=1), signal.SIGKILL)
    job.wait_for_restart(1)
    assert job.wait_for_end() == "COMPLETED", job.printed()
    printed = job.printed()
    assert "rank 1 was ended by SIGKILL" in printed
    assert "exit code 137 at step" in printed
    assert resumed_steps(printed)[0] >= 50
    assert "(1 failure)" in printed
    check_equal(run_dir, uninterrupted)


@pytest.mark.fault("F85")
def test_controller_failure_does_not_affect_the_job(submit: Submission, uninterrupted: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    job = submit.pretrain(run_dir)
    job.wait_for_print("step  20/")
    submit.cluster.restart_controller()
    assert job.wait_for_end() == "COMPLETED", job.printed()
    assert resumed_steps(job.printed()) == []
    check_equal(run_dir, uninterrupted)


@pytest.mark.fault("F82")
def test_cancelled_job_saves_and_is_not_requeued(submit: Submission, tmp_path: Path):
    run_dir, cluster = tmp_path / "a run; $(touch PWNED) 'x'", submit.cluster
    job = submit.pretrain(run_dir)
    job.wait_for_print("step  10/")
    cluster.run("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"
    assert "stopped by a signal to stop" in job.printed()
    (saved,) = steps_saved(run_dir)
    assert saved == max(step_scalars(run_dir))
    assert not (run_dir / "COMPLETE").exists()
    assert job.restarts() == 0
    assert not list(ROOT.glob("PWNED"))


def test_chain_of_jobs_ends_when_training_is_complete(submit: Submission, uninterrupted: Path, tmp_path: Path):
    run_dir, cluster = tmp_path / "run", submit.cluster
    job = submit.pretrain(run_dir, options=("--array=1-4%1",))
    job.wait_for_print("step  20/")
    cluster.run(
        "scancel", "--signal=USR1", f"{job.number}_1.0"
    )  # its step: for a job of an array SLURM rejects the signal
    job.wait_for_print("resuming after step")
    wait_until(lambda: not cluster.run("squeue", "-h", "-j", job.number).strip(), timeout_s=120, what=job.printed)
    printed = job.printed()
    assert len(re.findall(r" job \d+, attempt 0,", printed)) == 2, printed
    assert resumed_steps(printed)[0] >= 20
    check_equal(run_dir, uninterrupted)
