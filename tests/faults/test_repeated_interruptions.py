"""Repeated kills, and signals during a save: bounded loss, bit-exact resume, correct accounting."""

import contextlib
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fault_jobs import (
    DUPLICATE_S,
    LIMIT_S,
    Fault,
    Job,
    check_recovered,
    descendants_of,
    intercept_next_file,
    kill,
    run_attempt,
    run_with_restarts,
    running_job,
    slow_steps,
    small_run,
    steps_repeated,
    uninterrupted_run,
)

from pmlm_dist.config import RunConfig
from pmlm_dist.supervision.attempts import effective_time, read_attempts
from pmlm_dist.supervision.exit_codes import ExitCode
from pmlm_dist.supervision.restart import RestartLimits

Record = Callable[[str, object], None]


@pytest.mark.fault("F39", "F11")
def test_each_kill_costs_at_most_the_steps_since_a_checkpoint(
    small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig, record_property: Record
):
    config = small_run(small_corpus, tmp_path / "run", every=2)
    faults = [Fault(kill, rank=number % 2, step=3 + 3 * number) for number in range(5)]
    attempts = run_with_restarts(config, *slow_steps(0.1), *faults)
    assert [attempt.codes[0] for attempt in attempts] == [137] * 5 + [0]
    repeated = check_recovered(config, uninterrupted)
    assert max(steps_repeated(config)) <= config.train.checkpoint_every
    record_property("lost", f"5 kills, {repeated} of 20 steps repeated, at most {max(steps_repeated(config))}")


class KillSoon:
    """Kill this process after `after_s` seconds, wherever it is then."""

    def __init__(self, after_s: float):
        self.after_s = after_s

    def __call__(self) -> None:
        threading.Timer(self.after_s, kill).start()


@pytest.mark.nightly
@pytest.mark.fault("F39", "F11")
def test_thirty_random_kills_change_no_step(small_corpus: Path, tmp_path: Path, record_property: Record):
    steps, every, dice = 130, 2, random.Random(0)
    reference = uninterrupted_run(small_corpus, tmp_path / "uninterrupted", steps=steps, every=every)
    config = small_run(small_corpus, tmp_path / "run", steps=steps, every=every)
    faults = [Fault(KillSoon(dice.uniform(0, 0.2)), rank=dice.randrange(2), step=4 * number) for number in range(1, 32)]
    attempts = run_with_restarts(config, *slow_steps(0.1), *faults, limits=RestartLimits(failures=50))
    kills = sum(137 in attempt.codes for attempt in attempts)
    assert kills >= 30
    repeated = check_recovered(config, reference)
    assert max(steps_repeated(config)) <= config.train.checkpoint_every
    record_property(
        "lost", f"{kills} kills, {repeated} of {steps} steps repeated, at most {max(steps_repeated(config))}"
    )


class SignalDuringNextFile:
    """Send `times` stop signals to this process while it writes its next checkpoint file."""

    def __init__(self, times: int):
        self.times = times

    def __call__(self) -> None:
        intercept_next_file(self._write)

    def _write(self, write: Callable[[], Any]) -> Any:
        for _ in range(self.times):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5 * DUPLICATE_S)
        return write()


@pytest.mark.fault("F81")
@pytest.mark.parametrize(("times", "codes"), [(1, [75, 75]), (2, [143, 143])])
def test_signal_during_a_save_keeps_it_and_a_second_one_drops_it(
    small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig, times: int, codes: list[int]
):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = run_with_restarts(config, Fault(SignalDuringNextFile(times), step=8), *slow_steps(0.1))
    assert first.codes == codes, first.printed
    assert second.codes == [0, 0], second.printed
    (step,) = re.findall(r"resuming after step (\d+);", second.printed)
    assert int(step) == 5 if times == 2 else int(step) >= 10
    check_recovered(config, uninterrupted)


@pytest.mark.fault("F70")
def test_effective_training_time_equals_measured_step_times(
    small_corpus: Path, tmp_path: Path, record_property: Record
):
    config = small_run(small_corpus, tmp_path / "run")
    start_time = time.time()
    attempts = run_with_restarts(
        config, *slow_steps(0.4, tmp_path / "steps"), Fault(kill, step=7), Fault(kill, step=14)
    )
    total_s = time.time() - start_time
    assert len(attempts) == 3
    last: dict[int, float] = {}
    for line in (tmp_path / "steps").read_text().splitlines():
        step, seconds = json.loads(line)
        last[step] = seconds
    by_hand = sum(last.values()) / total_s
    reported = effective_time(read_attempts(config.run_dir))
    assert (reported.attempts, reported.failures) == (3, 2)
    process_start = 1.0 / total_s * by_hand  # not part of the reported total
    assert reported.fraction == pytest.approx(by_hand, abs=0.02 + process_start)
    record_property("lost", f"reported {reported.fraction:.1%}, by hand {by_hand:.1%}")


def press_ctrl_c(job: Job) -> None:
    """Send SIGINT to every process of the job, as a terminal does."""
    for process in job.processes:
        for pid in (process.pid, *descendants_of(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)


@pytest.mark.fault("F95")
@pytest.mark.parametrize("after", ["", "starting;", "step  7/20"])
def test_ctrl_c_saves_and_is_no_failure(small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig, after: str):
    config = small_run(small_corpus, tmp_path / "run")
    with running_job(config, *slow_steps(0.1)) as job:
        job.wait_for_print(after)
        while len(job.rank_processes()) < len(job.processes):
            time.sleep(0.02)
        press_ctrl_c(job)
        assert job.wait() == [ExitCode.INTERRUPTED] * 2, job.printed
    assert "Traceback" not in job.printed
    assert "supervisor: " not in job.printed
    if after == "step  7/20":
        assert "stopped by Ctrl-C; a restart resumes from" in job.printed
        assert "in 1 attempt (0 failures)\n" in job.printed
    ended = run_attempt(config)
    assert ended.codes == [0, 0], ended.printed
    check_recovered(config, uninterrupted)


@pytest.mark.fault("F95")
def test_second_ctrl_c_ends_hung_ranks_at_once(small_corpus: Path, tmp_path: Path):
    config = small_run(small_corpus, tmp_path / "run")
    with running_job(config, Fault(sleep_long, rank=0), Fault(sleep_long, rank=1)) as job:
        job.wait_for_print("asleep\nasleep\n")
        press_ctrl_c(job)
        job.wait_for_print("SIGINT: stopping at the next step")
        time.sleep(2 * DUPLICATE_S)
        press_ctrl_c(job)
        assert job.wait(within_s=LIMIT_S - 1) == [ExitCode.INTERRUPTED] * 2, job.printed
    assert "SIGINT is the second signal to stop; exiting at once" in job.printed
    assert "in 1 attempt (0 failures)\n" in job.printed


def sleep_long() -> None:
    """Block this rank's step."""
    os.write(1, b"asleep\n")
    time.sleep(60)
