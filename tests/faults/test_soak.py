"""Faults of seven kinds in random order at random steps, 20 to 40 seconds apart.

`SOAK_MINUTES` sets the duration, 30 in `make test-soak`; by default each kind is injected once.
"""

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fault_jobs import (
    Fault,
    check_recovered,
    children_of,
    fail,
    intercept_next_file,
    kill,
    open_files,
    run_with_restarts,
    slow_steps,
    small_run,
    stop,
    uninterrupted_run,
)

from pmlm_dist.supervision.exit_codes import ExitCode
from pmlm_dist.supervision.restart import RestartLimits

MINUTES = float(os.environ.get("SOAK_MINUTES", "3.5"))
STEP_S = 0.25
"""Shortest step: a restart lasts some dozen steps, so that faults are 20 to 40 s apart."""
GAP = (60, 120)
EVERY = 10


def kill_a_worker() -> None:
    """F56: kill a loader process of this rank."""
    server, *_ = [pid for pid in children_of(os.getpid()) if children_of(pid)]
    os.kill(children_of(server)[0], signal.SIGKILL)


def preempt() -> None:
    """F80: send the signal of SLURM before the time limit."""
    os.kill(os.getpid(), signal.SIGUSR1)


def write_and_die(write: Callable[[], Any]) -> None:
    write()
    kill()


def raise_disk_full(_write: Callable[[], Any]) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill_during_save() -> None:
    """F20: kill this rank after its checkpoint file is written and before it is reported."""
    intercept_next_file(write_and_die)


def fill_the_disk() -> None:
    """F28: lose one checkpoint; the training continues."""
    intercept_next_file(raise_disk_full)


KINDS = {
    "F01": kill,
    "F02": fail,
    "F03": stop,
    "F20": kill_during_save,
    "F28": fill_the_disk,
    "F56": kill_a_worker,
    "F80": preempt,
}


CODES = {
    "F01": 137,
    "F02": ExitCode.FAILED,
    "F03": ExitCode.HUNG,
    "F20": 137,
    "F56": ExitCode.FAILED,
    "F80": ExitCode.PREEMPTED,
}
"""Exit code of the attempt by fault; a full disk does not end it."""


def draw_faults(dice: random.Random, *, minutes: float) -> list[tuple[str, Fault]]:
    """Draw two faults a minute: all kinds in random order, then all again."""
    deck, step, faults = [], 0, []
    while len(faults) < 2 * minutes:
        deck = deck or dice.sample(sorted(KINDS), len(KINDS))
        step += dice.randint(*GAP)
        name = deck.pop()
        faults.append((name, Fault(KINDS[name], rank=dice.randrange(2), step=step)))
    return faults


@pytest.mark.nightly
@pytest.mark.fault("F91")
def test_mixed_faults_in_random_order_change_no_step(
    small_corpus: Path, tmp_path: Path, record_property: Callable[[str, object], None]
):
    faults = draw_faults(random.Random(1), minutes=MINUTES)
    steps = faults[-1][1].step + EVERY
    size = {"steps": steps, "every": EVERY}
    reference = uninterrupted_run(small_corpus, tmp_path / "uninterrupted", within_s=60 * MINUTES, **size)
    config = small_run(small_corpus, tmp_path / "run", **size)
    config = replace(config, data=replace(config.data, workers=1))
    start_time, limits = time.monotonic(), RestartLimits(failures=10_000, preemptions_without_progress=3)
    attempts = run_with_restarts(
        config, *slow_steps(STEP_S), *(fault for _, fault in faults), limits=limits, within_s=600
    )
    seconds = time.monotonic() - start_time
    expected = [CODES[name] for name, _ in faults if name in CODES]
    assert [max(attempt.codes) for attempt in attempts] == [*expected, ExitCode.DONE]
    assert sum(attempt.printed.count("was not written (") for attempt in attempts) == [
        name for name, _ in faults
    ].count("F28")
    repeated = check_recovered(config, reference)
    for counts in open_files(config).values():
        assert max(counts[EVERY:], default=0) <= max(counts[:EVERY]) + 2, counts
    record_property("lost", f"{len(faults)} faults in {seconds / 60:.0f} min, {repeated} of {steps} steps repeated")
