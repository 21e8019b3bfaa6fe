"""Ranks that die, hang, fall behind or disagree: found, named, ended, and started again as if nothing had been."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fault_jobs import (
    LIMIT_S,
    Fault,
    check_recovered,
    children_of,
    descendants_of,
    fail,
    is_alive,
    kill,
    learned,
    live,
    live_on,
    paced,
    small_run,
    started,
    steps_redone,
    stop,
    straight_run,
    with_the_next_file,
)
from support.small_runs import with_train

from pmlm_dist.config import RunConfig
from pmlm_dist.supervision.attempts import effective_time_line, read_attempts
from pmlm_dist.supervision.exit_codes import ExitCode
from pmlm_dist.supervision.restart import Limits
from pmlm_dist.supervision.run_lock import LOCK, read_owner
from pmlm_dist.supervision.signals import STOP_FILE

Record = Callable[[str, object], None]
_CLONE_NEWNS = 0x00020000


def report_of(config: RunConfig, rank: int) -> str:
    """What the supervisor of `rank` has left of the first life that ended by a fault."""
    folder = min((config.run_dir / "logs").iterdir(), key=lambda path: path.stat().st_mtime)
    return (folder / f"rank-{rank:05d}.txt").read_text()


# ---------------------------------------------------------------------------------------------------- ranks that end


@pytest.mark.fault("F01")
def test_a_rank_that_is_killed_ends_all_and_the_run_goes_on(
    small_corpus: Path, tmp_path: Path, straight: RunConfig, record_property: Record
):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = live_on(config, Fault(kill))
    assert first.codes == [137, 137], first.printed
    assert "rank 1 was ended by SIGKILL, in step 7" in first.printed
    assert "(1 unexpected ends)" in second.printed
    assert second.codes == [0, 0]
    record_property("lost", f"{check_recovered(config, straight)} steps done again")


@pytest.mark.fault("F02")
def test_the_rank_that_raised_first_is_named_with_its_traceback(
    small_corpus: Path, tmp_path: Path, straight: RunConfig, record_property: Record
):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = live_on(config, Fault(fail))
    assert first.codes == [ExitCode.FAILED] * 2, first.printed
    assert "rank 1 failed: LookupError: a fault of the program, in step 7" in first.printed
    assert first.printed.count("supervisor: rank 1 failed") == 1
    assert "in fail" in report_of(config, 1)
    assert second.codes == [0, 0]
    record_property("lost", f"{check_recovered(config, straight)} steps done again")


def segfault() -> None:
    ctypes.string_at(0)


@pytest.mark.nightly
@pytest.mark.fault("F05")
def test_a_crash_in_native_code_leaves_its_stack(small_corpus: Path, tmp_path: Path, straight: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = live_on(config, Fault(segfault))
    assert first.codes == [139, 139], first.printed
    assert "rank 1 was ended by SIGSEGV" in first.printed
    assert "in segfault" in report_of(config, 1)
    assert second.codes == [0, 0]
    check_recovered(config, straight)


def starve() -> None:
    raise MemoryError


@pytest.mark.fault("F16")
def test_a_run_without_memory_is_tried_once_more_and_no_more(small_corpus: Path, tmp_path: Path):
    config = small_run(small_corpus, tmp_path / "run")
    attempts = live_on(config, Fault(starve, step=7), Fault(starve, step=12, again=True))
    assert [attempt.codes for attempt in attempts] == [[ExitCode.OUT_OF_MEMORY] * 2] * 2


@pytest.mark.fault("F15")
def test_a_run_that_fails_at_the_same_step_every_time_is_given_up(
    small_corpus: Path, tmp_path: Path, record_property: Record
):
    config = small_run(small_corpus, tmp_path / "run", every=50)
    attempts = live_on(config, Fault(fail, rank=0, step=3, again=True))
    assert len(attempts) <= 3
    assert {code for attempt in attempts for code in attempt.codes} == {ExitCode.FAILED}
    record_property("lost", f"given up after {len(attempts)} starts")


@pytest.mark.fault("F07")
def test_a_rank_that_dies_before_it_has_joined_is_not_waited_for_without_end(
    small_corpus: Path, tmp_path: Path, straight: RunConfig
):
    config = small_run(small_corpus, tmp_path / "run")
    config = replace(config, watch=replace(config.watchdog, startup_s=20.0))
    first, second = live_on(config, Fault(kill, step=0))
    assert first.codes == [ExitCode.HUNG, 137], first.printed
    assert "rank 0 made no progress for 20 s, in step 0 (start-up)" in first.printed
    assert second.codes == [0, 0]
    check_recovered(config, straight)


@pytest.mark.fault("F12")
def test_a_port_that_is_taken_is_said_at_once(small_corpus: Path, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with started(small_run(small_corpus, tmp_path / "run"), MASTER_PORT=str(port)) as job:
            job.processes[0].join(timeout=30)
            assert job.processes[0].exitcode == ExitCode.FAILED, job.printed
            assert f"port: {port}" in job.printed
            assert "EADDRINUSE" in job.printed


@pytest.mark.fault("F08")
def test_a_lock_that_a_compiler_left_behind_is_not_waited_for(small_corpus: Path, tmp_path: Path):
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    config = small_run(small_corpus, tmp_path / "run", steps=4)
    ended = live(config, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert ended.codes == [0, 0], ended.printed
    assert sorted(path.name for path in lock.parent.parent.rglob("*")) == ["deepspeed_shm_comm", "lock"]


def complete_runs(corpus: Path, folder: Path, *, count: int) -> None:
    """That so many runs with ZeRO-3 end as complete ones do."""
    for number in range(count):
        config = small_run(corpus, folder / str(number), steps=3, zero=3)
        assert live(config).codes == [0, 0]
        assert (config.run_dir / "COMPLETE").exists()


@pytest.mark.fault("F10")
def test_runs_that_are_complete_end_so(small_corpus: Path, tmp_path: Path):
    complete_runs(small_corpus, tmp_path, count=4)


@pytest.mark.nightly
@pytest.mark.fault("F10")
def test_twenty_runs_that_are_complete_end_so(small_corpus: Path, tmp_path: Path):
    complete_runs(small_corpus, tmp_path, count=20)


# ---------------------------------------------------------------------------------------------------- ranks that hang


@pytest.mark.fault("F03")
def test_a_rank_that_stands_still_is_found_named_and_ended(
    small_corpus: Path, tmp_path: Path, straight: RunConfig, record_property: Record
):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = live_on(config, Fault(stop))
    assert first.codes == [ExitCode.HUNG] * 2, first.printed
    assert "furthest behind: rank 1\n" in first.printed
    assert "process stopped" in first.printed
    assert "in stop" in report_of(config, 1)
    assert "wait_for" in report_of(config, 0) or "all_reduce" in report_of(config, 0)
    assert "unexpected ends" in second.printed
    assert second.codes == [0, 0]
    record_property("lost", f"{check_recovered(config, straight)} steps done again, found after {LIMIT_S:g} s (limit)")


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(1_000_000)


@pytest.mark.nightly
@pytest.mark.fault("F04")
def test_a_rank_that_holds_the_interpreters_lock_is_found(small_corpus: Path, tmp_path: Path, straight: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = live_on(config, Fault(hold_the_interpreter))
    assert first.codes == [ExitCode.HUNG] * 2, first.printed
    assert "furthest behind: rank 1\n" in first.printed
    assert "in hold_the_interpreter" in report_of(config, 1)
    assert second.codes == [0, 0]
    check_recovered(config, straight)


def skip_one_collective() -> None:
    """The next agreement of this rank is with itself alone."""
    from pmlm_dist.parallel.groups import Topology

    largest = Topology.all_reduce_max

    def alone(self: Topology, *values: int) -> list[int]:
        Topology.all_reduce_max = largest
        return list(values)

    Topology.all_reduce_max = alone


@pytest.mark.fault("F06")
def test_a_collective_that_one_rank_leaves_out_ends_the_run_before_it_is_saved(
    small_corpus: Path, tmp_path: Path, straight: RunConfig
):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = live_on(config, Fault(skip_one_collective, step=6))
    assert set(first.codes) <= {ExitCode.HUNG, ExitCode.FAILED}, first.printed
    assert "supervisor: rank 0: step" in first.printed
    assert "supervisor: rank 1: step" in first.printed
    assert second.codes == [0, 0]
    check_recovered(config, straight)


# --------------------------------------------------------------------------------------------------------- stragglers


class Slow:
    """From now on every forward pass of this rank takes longer."""

    def __call__(self) -> None:
        from pmlm_dist.training import pretraining

        losses_of = pretraining.forward_losses

        def slowly(*args: Any) -> Any:
            time.sleep(0.3)
            return losses_of(*args)

        pretraining.forward_losses = slowly


@pytest.mark.nightly
@pytest.mark.fault("F14")
def test_a_slow_rank_is_named_and_no_other(small_corpus: Path, tmp_path: Path, record_property: Record):
    config = small_run(small_corpus, tmp_path / "slow")
    ended = live(config, Fault(Slow(), step=1))
    assert ended.codes == [0, 0]
    warned = [line for line in ended.printed.splitlines() if "is slow" in line]
    assert len(warned) == 1
    assert "rank 1 is slow" in warned[0]
    record_property("lost", f"nothing; named at {warned[0].split(':')[1].strip()}")


@pytest.mark.nightly
@pytest.mark.fault("F14")
def test_no_rank_is_called_slow_in_200_steps_in_which_none_is(small_corpus: Path, tmp_path: Path):
    ended = live(small_run(small_corpus, tmp_path / "run", steps=200, every=100, log_every=5), within_s=120)
    assert ended.codes == [0, 0]
    assert "is slow" not in ended.printed


# ------------------------------------------------------------------------------------------------------ chains of ends


@pytest.mark.fault("F39", "F11")
def test_a_chain_of_kills_costs_no_more_than_the_steps_since_each_checkpoint(
    small_corpus: Path, tmp_path: Path, straight: RunConfig, record_property: Record
):
    config = small_run(small_corpus, tmp_path / "run", every=2)
    faults = [Fault(kill, rank=number % 2, step=3 + 3 * number) for number in range(5)]
    attempts = live_on(config, *paced(0.1), *faults)
    assert [attempt.codes[0] for attempt in attempts] == [137] * 5 + [0]
    redone = check_recovered(config, straight)
    assert max(steps_redone(config)) <= config.train.checkpoint_every
    record_property("lost", f"5 kills, {redone} of 20 steps done again, at most {max(steps_redone(config))}")


class KillSoon:
    """The process is gone some milliseconds from now, wherever it is then."""

    def __init__(self, after_s: float):
        self.after_s = after_s

    def __call__(self) -> None:
        threading.Timer(self.after_s, kill).start()


@pytest.mark.nightly
@pytest.mark.fault("F39", "F11")
def test_thirty_kills_of_random_ranks_at_random_times_change_nothing(
    small_corpus: Path, tmp_path: Path, record_property: Record
):
    steps, every, dice = 130, 2, random.Random(0)
    undisturbed = straight_run(small_corpus, tmp_path / "straight", steps=steps, every=every)
    config = small_run(small_corpus, tmp_path / "run", steps=steps, every=every)
    faults = [Fault(KillSoon(dice.uniform(0, 0.2)), rank=dice.randrange(2), step=4 * number) for number in range(1, 32)]
    attempts = live_on(config, *paced(0.1), *faults, limits=Limits(failures=50))
    kills = sum(137 in attempt.codes for attempt in attempts)
    assert kills >= 30
    redone = check_recovered(config, undisturbed)
    assert max(steps_redone(config)) <= config.train.checkpoint_every
    record_property("lost", f"{kills} kills, {redone} of {steps} steps done again, at most {max(steps_redone(config))}")


# ---------------------------------------------------------------------------------------------- signals at bad moments


class SignalAmidTheNextFile:
    """The next checkpoint takes a while, and this process is told to stop meanwhile: `times` times."""

    def __init__(self, times: int):
        self.times = times

    def __call__(self) -> None:
        with_the_next_file(self._slowly)

    def _slowly(self, write: Callable[[], Any]) -> Any:
        for _ in range(self.times):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.5)
        return write()


@pytest.mark.fault("F81")
@pytest.mark.parametrize(("times", "codes"), [(1, [75, 75]), (2, [143, 143])])
def test_a_signal_amid_a_save_costs_nothing_and_a_second_one_that_checkpoint(
    small_corpus: Path, tmp_path: Path, straight: RunConfig, times: int, codes: list[int]
):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = live_on(config, Fault(SignalAmidTheNextFile(times), step=8), *paced(0.1))
    assert first.codes == codes, first.printed
    assert second.codes == [0, 0], second.printed
    (step,) = re.findall(r"resuming after step (\d+);", second.printed)
    assert int(step) == 5 if times == 2 else int(step) >= 10
    check_recovered(config, straight)


@pytest.mark.fault("F01")
def test_a_supervisor_that_is_killed_takes_its_rank_and_all_that_it_started_with_it(
    small_corpus: Path, tmp_path: Path, straight: RunConfig
):
    config = small_run(small_corpus, tmp_path / "run")
    config = replace(config, data=replace(config.data, workers=1))
    with started(config, *paced(0.2)) as job:
        job.wait_for_print("step  7/20")
        ours = [pid for process in job.processes for pid in (process.pid, *descendants_of(process.pid))]
        job.processes[1].kill()
        assert job.wait()[1] == -signal.SIGKILL
        assert job.processes[0].exitcode not in (0, None), job.printed
        deadline = time.monotonic() + 10
        while left := [pid for pid in ours if is_alive(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    assert live(config).codes == [0, 0]
    check_recovered(config, straight)


# --------------------------------------------------------------------------------------------------- two jobs, one run


class Wait:
    """Stand still until a file is there."""

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


def patient(config: RunConfig) -> RunConfig:
    """`config` with limits that a test of two jobs does not reach."""
    return replace(config, watch=replace(config.watchdog, step_s=90.0, data_s=90.0, save_s=90.0))


@pytest.mark.fault("F33")
def test_a_second_job_in_the_same_folder_is_refused(small_corpus: Path, tmp_path: Path, straight: RunConfig):
    config, go = patient(small_run(small_corpus, tmp_path / "run")), tmp_path / "go"
    with started(config, Fault(Wait(go))) as job:
        wait_for(go.with_suffix(".waiting"))
        second = live(config)
        assert second.codes == [ExitCode.IN_USE] * 2
        assert "is in use by process" in second.printed
        go.touch()
        assert job.wait() == [0, 0], job.printed
    check_recovered(config, straight)


@pytest.mark.fault("F33")
def test_the_lock_of_a_dead_holder_is_taken_over(small_corpus: Path, tmp_path: Path, straight: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    assert live(config, Fault(kill, rank=0)).codes == [137, 137]
    owner = read_owner(config.run_dir / LOCK)
    assert owner is not None
    assert live(config).codes == [0, 0]
    check_recovered(config, straight)


@pytest.mark.fault("F34", "F84")
def test_ranks_that_have_outlived_their_job_commit_nothing(small_corpus: Path, tmp_path: Path, straight: RunConfig):
    config, go = patient(small_run(small_corpus, tmp_path / "run")), tmp_path / "go"
    old = {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "0", "PMLM_SUPERVISOR": "off"}
    with started(config, Fault(Wait(go), rank=0), **old) as zombie:
        wait_for(go.with_suffix(".waiting"))
        new = live(config, SLURM_JOB_ID="5", SLURM_RESTART_COUNT="1")
        assert new.codes == [0, 0], new.printed
        written = {path: path.stat().st_mtime_ns for path in (config.run_dir / "checkpoints").rglob("*")}
        go.touch()
        zombie.processes[0].join(30)
        assert zombie.processes[0].exitcode == ExitCode.SUPERSEDED, zombie.printed
    assert {path: path.stat().st_mtime_ns for path in written} == written
    committed = [path for path in (config.run_dir / "checkpoints").glob("step-*") if ".tmp" not in path.name]
    assert set(committed) <= written.keys()
    assert learned(config).scalars == learned(straight).scalars


# --------------------------------------------------------------------------------------------------- time and terminal


@pytest.mark.fault("F70")
def test_effective_training_time_is_what_a_stopwatch_says(small_corpus: Path, tmp_path: Path, record_property: Record):
    config = small_run(small_corpus, tmp_path / "run")
    began = time.time()
    attempts = live_on(config, *paced(0.4, tmp_path / "steps"), Fault(kill, step=7), Fault(kill, step=14))
    whole_s = time.time() - began
    assert len(attempts) == 3
    last: dict[int, float] = {}
    for line in (tmp_path / "steps").read_text().splitlines():
        step, seconds = json.loads(line)
        last[step] = seconds
    by_hand = sum(last.values()) / whole_s
    found = effective_time_line(read_attempts(config.run_dir))
    assert (found.starts, found.failures) == (3, 2)
    assert found.share == pytest.approx(by_hand, abs=0.02 + 1.0 / whole_s * by_hand)  # starting a process is not seen
    record_property("lost", f"reported {found.share:.1%}, by hand {by_hand:.1%}")


def jump() -> None:
    """The clock of this process is an hour ahead from now on."""
    real = time.time
    time.time = lambda: real() + 3600


@pytest.mark.nightly
@pytest.mark.fault("F90")
def test_a_clock_that_jumps_makes_nothing_late(small_corpus: Path, tmp_path: Path, straight: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    began = time.time()
    ended = live(config, Fault(jump, rank=0), Fault(jump, rank=1))
    whole_s = time.time() - began
    assert ended.codes == [0, 0], ended.printed
    check_recovered(config, straight)
    assert effective_time_line(read_attempts(config.run_dir)).whole_s < whole_s


class FullTerminal:
    """What this process prints from now on has no place any more."""

    def __call__(self) -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.close(full)


@pytest.mark.nightly
@pytest.mark.fault("F88")
def test_a_terminal_that_is_gone_does_not_end_the_training(small_corpus: Path, tmp_path: Path, straight: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    ended = live(config, Fault(FullTerminal(), rank=0))
    assert ended.codes == [0, 0], ended.printed
    assert "complete: step 20" not in ended.printed
    check_recovered(config, straight)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("log/lost_lines", 0) for line in lines) > 5


# ------------------------------------------------------------------------------------------------------ shared memory


class OwnSharedMemory:
    """/dev/shm of this process, and of all that it starts, is from now on a disk of its own of one megabyte."""

    def __call__(self) -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare")
        for command in ("--make-rprivate /", "-t tmpfs -o size=1m tmpfs /dev/shm"):
            subprocess.run(["mount", *command.split()], check=True)


def fill_shared_memory() -> None:
    """Not a byte is left; a file of which a page was touched already keeps it."""
    with open("/dev/shm/filler", "wb", buffering=0) as filler:
        while os.statvfs("/dev/shm").f_bfree:
            filler.write(b"\0" * 4096)


def places_of(pid: int) -> set[str]:
    """The file systems that a process and its descendants see, as the kernel numbers them."""
    below = [places_of(child) for child in children_of(pid)]
    return {os.readlink(f"/proc/{pid}/ns/mnt")}.union(*below)


@pytest.mark.fault("F58")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a /dev/shm of its own")
@pytest.mark.parametrize("step", [0, 7], ids=["from the start", "amid the run"])
def test_a_run_with_loader_processes_needs_no_room_in_shared_memory(
    small_corpus: Path, tmp_path: Path, straight: RunConfig, step: int
):
    """Batches come through pipes, gradients through sockets: nothing to fall back from, no bus error."""
    config = small_run(small_corpus, tmp_path / "run")
    config = replace(config, data=replace(config.data, workers=2))
    own = [Fault(OwnSharedMemory(), rank=rank, step=-1) for rank in range(2)]
    full = [Fault(fill_shared_memory, rank=rank, step=step) for rank in range(2)]
    with started(config, *own, *full, *paced(0.1)) as job:
        job.wait_for_print("step  8/20")
        places = [places_of(rank) for rank in job.rank_processes().values()]
        assert job.wait() == [0, 0], job.printed
    assert [len(place) for place in places] == [1, 1], "a loader process sees another /dev/shm"
    assert os.readlink("/proc/self/ns/mnt") not in set.union(*places)
    check_recovered(config, straight)


# ----------------------------------------------------------------------------------------------------- loss that spikes


class TooFast:
    """The learning rate is a hundred times what it should be, for three steps."""

    def __init__(self, first: int):
        self.steps = range(first, first + 3)

    def __call__(self) -> None:
        from pmlm_dist.training import step

        rate = step.learning_rate
        step.learning_rate = lambda number, **about: rate(number, **about) * (100 if number in self.steps else 1)


@pytest.mark.nightly
@pytest.mark.fault("F74")
def test_after_a_spike_of_the_loss_the_run_book_leads_back_to_the_run_without_it(
    small_corpus: Path, tmp_path: Path, straight: RunConfig, record_property: Record
):
    """Nothing is rolled back by itself and no batch is skipped: a person does what docs/operations.md says."""
    config = with_train(small_run(small_corpus, tmp_path / "run"), keep_checkpoints=9)
    spike = [Fault(TooFast(7), rank=rank, step=1) for rank in range(2)]
    with started(config, *spike, *paced(0.3)) as job:
        job.wait_for_print("step 11/20")
        (config.run_dir / STOP_FILE).touch()
        assert job.wait() == [0, 0], job.printed
    spiked, smooth = learned(config).scalars, learned(straight).scalars
    assert [step for step in range(1, 8) if spiked[step]["train/total"] != smooth[step]["train/total"]] == []
    worst = max(spiked[step]["train/total"] / smooth[step]["train/total"] for step in range(8, 12))
    assert worst > 1.2, worst
    (config.run_dir / STOP_FILE).unlink()
    aside = config.run_dir / "aside"
    aside.mkdir()
    for checkpoint in (config.run_dir / "checkpoints").glob("step-*"):
        if int(checkpoint.name[5:]) > 6:
            checkpoint.rename(aside / checkpoint.name)
    assert list(aside.iterdir())
    ended = live(config)
    assert ended.codes == [0, 0], ended.printed
    assert "resuming after step 5;" in ended.printed
    redone = check_recovered(config, straight)
    record_property(
        "lost",
        f"the spike raised the loss to {worst:.1f} times; by hand back to the straight run, {redone} steps done again",
    )


# --------------------------------------------------------------------------------------------------------- wrong groups


def forget_the_groups() -> None:
    from pmlm_dist.engine import deepspeed_engine

    deepspeed_engine.ModelParallelUnit = lambda: None  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.fault("F18")
def test_an_engine_that_does_not_know_the_groups_is_refused_before_the_first_step(small_corpus: Path, tmp_path: Path):
    config = small_run(small_corpus, tmp_path / "run", tp=2)
    forgetful = [Fault(forget_the_groups, rank=rank, step=0) for rank in range(2)]
    ended = live(config, *forgetful)
    assert ended.codes == [ExitCode.FAILED] * 2
    assert "DeepSpeed averages gradients over 2 ranks, but 1 are data-parallel" in ended.printed
    assert "step  1/" not in ended.printed


# ---------------------------------------------------------------------------------------------------------- no fault


@pytest.mark.fault("F78")
def test_a_run_that_nothing_happens_to_is_the_same_every_time(small_corpus: Path, tmp_path: Path, straight: RunConfig):
    assert learned(straight_run(small_corpus, tmp_path / "run")) == learned(straight)


@pytest.mark.nightly
@pytest.mark.fault("F77")
def test_replicas_on_tensor_parallel_peers_stay_equal_over_200_steps_in_bf16(small_corpus: Path, tmp_path: Path):
    """They are compared bit for bit before and after every step; a difference ends the run."""
    config = small_run(small_corpus, tmp_path / "run", steps=200, every=200, tp=2, precision="bf16")
    ended = live(replace(config, train=replace(config.train, guard_every=1)), within_s=120)
    assert ended.codes == [0, 0], ended.printed
