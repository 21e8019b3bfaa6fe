"""Ranks that die or raise: named, ended on all ranks, restarted or given up."""

import ctypes
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.fault_jobs import (
    Fault,
    check_recovered,
    descendants_of,
    fail,
    is_alive,
    kill,
    report_text,
    run_attempt,
    run_with_restarts,
    running_job,
    slow_steps,
    small_run,
)

from pmlm_dist.config import RunConfig
from pmlm_dist.supervision.exit_codes import ExitCode

Record = Callable[[str, object], None]


@pytest.mark.fault("F01")
def test_killed_rank_ends_all_ranks_and_run_recovers(
    small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig, record_property: Record
):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = run_with_restarts(config, Fault(kill))
    assert first.codes == [137, 137], first.printed
    assert "rank 1 was ended by SIGKILL, in step 7" in first.printed
    assert "(1 failure)" in second.printed
    assert second.codes == [0, 0]
    record_property("lost", f"{check_recovered(config, uninterrupted)} steps repeated")


@pytest.mark.fault("F02")
def test_rank_that_raised_first_is_named_with_its_traceback(
    small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig, record_property: Record
):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = run_with_restarts(config, Fault(fail))
    assert first.codes == [ExitCode.FAILED] * 2, first.printed
    assert "rank 1 failed: LookupError: a fault of the program, in step 7" in first.printed
    assert first.printed.count("supervisor: rank 1 failed") == 1
    assert "in fail" in report_text(config, 1)
    assert second.codes == [0, 0]
    record_property("lost", f"{check_recovered(config, uninterrupted)} steps repeated")


def segfault() -> None:
    ctypes.string_at(0)


@pytest.mark.nightly
@pytest.mark.fault("F05")
def test_crash_in_native_code_leaves_its_stack(small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = run_with_restarts(config, Fault(segfault))
    assert first.codes == [139, 139], first.printed
    assert "rank 1 was ended by SIGSEGV" in first.printed
    assert "in segfault" in report_text(config, 1)
    assert second.codes == [0, 0]
    check_recovered(config, uninterrupted)


def run_out_of_memory() -> None:
    raise MemoryError


@pytest.mark.fault("F16")
def test_out_of_memory_run_is_restarted_once(small_corpus: Path, tmp_path: Path):
    config = small_run(small_corpus, tmp_path / "run")
    attempts = run_with_restarts(
        config, Fault(run_out_of_memory, step=7), Fault(run_out_of_memory, step=12, every_attempt=True)
    )
    assert [attempt.codes for attempt in attempts] == [[ExitCode.OUT_OF_MEMORY] * 2] * 2


@pytest.mark.fault("F15")
def test_run_that_fails_at_the_same_step_is_given_up(small_corpus: Path, tmp_path: Path, record_property: Record):
    config = small_run(small_corpus, tmp_path / "run", every=50)
    attempts = run_with_restarts(config, Fault(fail, rank=0, step=3, every_attempt=True))
    assert len(attempts) <= 3
    assert {code for attempt in attempts for code in attempt.codes} == {ExitCode.FAILED}
    record_property("lost", f"given up after {len(attempts)} starts")


@pytest.mark.fault("F07")
def test_rank_killed_before_rendezvous_ends_the_others_as_hung(
    small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig
):
    config = small_run(small_corpus, tmp_path / "run")
    config = replace(config, watchdog=replace(config.watchdog, startup_s=20.0))
    first, second = run_with_restarts(config, Fault(kill, step=0))
    assert first.codes == [ExitCode.HUNG, 137], first.printed
    assert "rank 0 made no progress for 20 s, in step 0 (start-up)" in first.printed
    assert second.codes == [0, 0]
    check_recovered(config, uninterrupted)


def check_complete_runs(corpus: Path, folder: Path, *, count: int) -> None:
    """Check that `count` runs with ZeRO-3 end as complete."""
    for number in range(count):
        config = small_run(corpus, folder / str(number), steps=3, zero=3)
        assert run_attempt(config).codes == [0, 0]
        assert (config.run_dir / "COMPLETE").exists()


@pytest.mark.fault("F10")
def test_complete_runs_exit_with_code_0(small_corpus: Path, tmp_path: Path):
    check_complete_runs(small_corpus, tmp_path, count=4)


@pytest.mark.nightly
@pytest.mark.fault("F10")
def test_twenty_complete_runs_exit_with_code_0(small_corpus: Path, tmp_path: Path):
    check_complete_runs(small_corpus, tmp_path, count=20)


@pytest.mark.fault("F01")
def test_killed_supervisor_leaves_no_descendant(small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    config = replace(config, data=replace(config.data, workers=1))
    with running_job(config, *slow_steps(0.2)) as job:
        job.wait_for_print("step  7/20")
        ours = [pid for process in job.processes for pid in (process.pid, *descendants_of(process.pid))]
        job.processes[1].kill()
        assert job.wait()[1] == -signal.SIGKILL
        assert job.processes[0].exitcode not in (0, None), job.printed
        deadline = time.monotonic() + 10
        while left := [pid for pid in ours if is_alive(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    assert run_attempt(config).codes == [0, 0]
    check_recovered(config, uninterrupted)


def omit_mpu() -> None:
    from pmlm_dist.engine import deepspeed_engine

    deepspeed_engine.ModelParallelUnit = lambda: None  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.fault("F18")
def test_engine_without_mpu_raises_before_the_first_step(small_corpus: Path, tmp_path: Path):
    config = small_run(small_corpus, tmp_path / "run", tp=2)
    faults = [Fault(omit_mpu, rank=rank, step=0) for rank in range(2)]
    ended = run_attempt(config, *faults)
    assert ended.codes == [ExitCode.FAILED] * 2
    assert "DeepSpeed averages gradients over 2 ranks, but 1 are data-parallel" in ended.printed
    assert "step  1/" not in ended.printed
