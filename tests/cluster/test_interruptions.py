"""What ends jobs on a cluster, and that a run goes on afterwards as if nothing had been: every step is compared."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from support.slurm_cluster import processes_of, rank_process, wait_until
from support.submissions import ROOT, Submission, check_equal, learned

from pmlm_dist.supervision.processes import state_of


def steps_saved(run_dir: Path) -> list[int]:
    found = [path.name[5:] for path in (run_dir / "checkpoints").glob("step-*")]
    return sorted(int(number) for number in found if number.isdecimal())


def starts(printed: str) -> list[int]:
    """The steps after which the lives of a job went on."""
    return [int(step) for step in re.findall(r"resuming after step (\d+);", printed)]


@pytest.mark.fault("F80", "F81")
def test_signals_and_requeues_cost_no_step(submit: Submission, straight: Path, tmp_path: Path):
    """`scancel --signal=USR1` reaches all processes of the step, loader workers too; `scontrol requeue` sends TERM."""
    run_dir, cluster = tmp_path / "run", submit.cluster
    job = submit.pretrain(run_dir)
    job.wait_for_print("step  20/")
    cluster.ask("scancel", "--signal=USR1", job.number)
    job.wait_for_print("stopped by a signal to stop")
    job.wait_for_restart(1)
    job.wait_for_print("resuming after step")
    (first,) = starts(job.printed())
    assert first >= 20
    cluster.ask("scontrol", "requeue", job.number)
    job.wait_for_restart(2)
    assert job.wait_for_end() == "COMPLETED", job.printed()
    printed = job.printed()
    assert printed.count("stopped by a signal to stop") == 2
    second = starts(printed)[1]
    assert second >= first
    assert "Traceback" not in printed
    assert job.restarts() == 2
    check_equal(run_dir, straight)


@pytest.mark.fault("F80")
def test_at_the_time_limit_a_job_saves_and_goes_on_in_a_new_life(submit: Submission, straight: Path, tmp_path: Path):
    run_dir, cluster = tmp_path / "run", submit.cluster
    job = submit.pretrain(run_dir, options=("--time=20", "--signal=B:USR1@30"), GRACE_S="25")
    job.wait_for_print("step  20/", timeout_s=300)
    cluster.ask("scancel", "--signal=STOP", job.number)  # the ranks alone: so few steps would be done by then
    job.set_limit(within_s=35)  # not before: on a busy machine ranks need more than a minute to begin
    job.wait_for_print("USR1: the time is nearly over", timeout_s=120)
    cluster.ask("scancel", "--signal=CONT", job.number)
    job.wait_for_restart(1)
    cluster.ask("scontrol", "update", f"jobid={job.number}", "TimeLimit=20")
    assert job.wait_for_end() == "COMPLETED", job.printed()
    assert job.printed().count("USR1: the time is nearly over") == 1
    assert starts(job.printed())[0] >= 20
    check_equal(run_dir, straight)


@pytest.mark.fault("F83")
def test_a_node_that_goes_down_costs_the_steps_since_the_last_checkpoint(
    submit: Submission, straight: Path, tmp_path: Path
):
    run_dir, cluster = tmp_path / "run", submit.cluster
    job = submit.pretrain(run_dir)
    job.wait_for_print("step  60/")
    lost = job.nodes()[1]
    cluster.ask("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    try:
        job.wait_for_restart(1)
        job.wait_for_print("resuming after step")
        assert lost not in job.nodes()
    finally:
        cluster.ask("scontrol", "update", f"nodename={lost}", "state=resume")
    assert job.wait_for_end() == "COMPLETED", job.printed()
    assert starts(job.printed())[0] >= 50
    check_equal(run_dir, straight)


@pytest.mark.nightly
@pytest.mark.fault("F84")
def test_what_lives_on_without_its_nodes_daemon_changes_nothing(submit: Submission, straight: Path, tmp_path: Path):
    """The daemon of rank 0's node is killed: SLURM gives the job other nodes, where it goes on, beside the old ranks
    and the old batch script. They stand still meanwhile, so that they come back when the new life is long at work.
    """
    run_dir, cluster = tmp_path / "run", submit.cluster
    job = submit.pretrain(run_dir)
    job.wait_for_print("step  60/")
    node = job.nodes()[0]
    cluster.ask("scancel", "--signal=STOP", job.number)
    rank_0, old = rank_process(job.number, rank=0), processes_of(job.number, node=node)
    wait_until(lambda: state_of(rank_0) == "stopped", timeout_s=20, what=job.printed)  # scancel does not wait for it
    cluster.kill_daemon(f"slurmd.{node}")
    try:
        job.wait_for_restart(1, timeout_s=120)
        job.wait_for_print("resuming after step")
        assert node not in job.nodes()
        still_there = [pid for pid in old if Path(f"/proc/{pid}").exists()]
        assert rank_0 in still_there, cluster.logs(node) + job.printed()
        for pid in still_there:
            os.kill(pid, signal.SIGCONT)
        assert job.wait_for_end() == "COMPLETED", job.printed()
        wait_until(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in old),
            timeout_s=60,
            what=lambda: f"not all have ended: { {pid: state_of(pid) for pid in old} }\n{job.printed()}",
        )
    finally:
        cluster.start_daemon(node)
    assert job.restarts() == 1
    assert len(starts(job.printed())) == 1
    check_equal(run_dir, straight)


@pytest.mark.fault("F01", "F87")
def test_a_rank_that_is_killed_is_named_and_the_job_goes_on(submit: Submission, straight: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    job = submit.pretrain(run_dir)
    job.wait_for_print("step  60/")
    os.kill(rank_process(job.number, rank=1), signal.SIGKILL)
    job.wait_for_restart(1)
    assert job.wait_for_end() == "COMPLETED", job.printed()
    printed = job.printed()
    assert "rank 1 was ended by SIGKILL" in printed
    assert "exit code 137 at step" in printed
    assert starts(printed)[0] >= 50
    assert "(1 unexpected ends)" in printed
    check_equal(run_dir, straight)


@pytest.mark.fault("F85")
def test_a_controller_that_fails_leaves_the_job_alone(submit: Submission, straight: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    job = submit.pretrain(run_dir)
    job.wait_for_print("step  20/")
    submit.cluster.restart_controller()
    assert job.wait_for_end() == "COMPLETED", job.printed()
    assert starts(job.printed()) == []
    check_equal(run_dir, straight)


@pytest.mark.fault("F82")
def test_a_cancelled_job_saves_and_stays_cancelled(submit: Submission, tmp_path: Path):
    run_dir, cluster = tmp_path / "a run; $(touch PWNED) 'x'", submit.cluster
    job = submit.pretrain(run_dir)
    job.wait_for_print("step  10/")
    cluster.ask("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"
    assert "stopped by a signal to stop" in job.printed()
    (saved,) = steps_saved(run_dir)
    assert saved == max(learned(run_dir))
    assert not (run_dir / "COMPLETE").exists()
    assert job.restarts() == 0
    assert not list(ROOT.glob("PWNED"))


def test_a_chain_of_jobs_ends_when_training_is_done(submit: Submission, straight: Path, tmp_path: Path):
    run_dir, cluster = tmp_path / "run", submit.cluster
    job = submit.pretrain(run_dir, options=("--array=1-4%1",))
    job.wait_for_print("step  20/")
    cluster.ask("scancel", "--signal=USR1", f"{job.number}_1.0")  # its step; of an array's job SLURM says: not now
    job.wait_for_print("resuming after step")
    wait_until(lambda: not cluster.ask("squeue", "-h", "-j", job.number).strip(), timeout_s=120, what=job.printed)
    printed = job.printed()
    assert len(re.findall(r" job \d+, life 0,", printed)) == 2, printed
    assert starts(printed)[0] >= 20
    check_equal(run_dir, straight)
