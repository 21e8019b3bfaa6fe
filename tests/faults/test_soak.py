"""A bad month in minutes: faults of seven kinds in random order, at random steps, each 20 to 40 seconds after the last.

`SOAK_MINUTES=30` makes it half an hour long, `make test-soak`; without it each kind strikes once.
"""

from __future__ import annotations

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
    kill,
    live_on,
    open_files,
    paced,
    small_run,
    stop,
    straight_run,
    with_the_next_file,
)

from pmlm_dist.supervision.exit_codes import ExitCode
from pmlm_dist.supervision.restart import Limits

MINUTES = float(os.environ.get("SOAK_MINUTES", "3.5"))
PACE_S = 0.25
"""What a step takes at least: a restart takes as long as some dozen steps, so that faults come every 20 to 40 s."""
GAP = (60, 120)
EVERY = 10


def kill_a_worker() -> None:
    """F56: a process that loads data for this rank is gone."""
    server, *_ = [pid for pid in children_of(os.getpid()) if children_of(pid)]
    os.kill(children_of(server)[0], signal.SIGKILL)


def be_told_to_stop() -> None:
    """F80: the signal that SLURM sends before the time limit."""
    os.kill(os.getpid(), signal.SIGUSR1)


def write_and_die(write: Callable[[], Any]) -> None:
    write()
    kill()


def find_the_disk_full(_write: Callable[[], Any]) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill_amid_a_save() -> None:
    """F20: when its own file is there, and nothing that says so."""
    with_the_next_file(write_and_die)


def fill_the_disk() -> None:
    """F28: one checkpoint is lost, the training goes on."""
    with_the_next_file(find_the_disk_full)


KINDS = {
    "F01": kill,
    "F02": fail,
    "F03": stop,
    "F20": kill_amid_a_save,
    "F28": fill_the_disk,
    "F56": kill_a_worker,
    "F80": be_told_to_stop,
}


CODES = {
    "F01": 137,
    "F02": ExitCode.FAILED,
    "F03": ExitCode.HUNG,
    "F20": 137,
    "F56": ExitCode.FAILED,
    "F80": ExitCode.PREEMPTED,
}
"""What they end a life with; a full disk ends none."""


def drawn(dice: random.Random, *, minutes: float) -> list[tuple[str, Fault]]:
    """Two faults a minute: all kinds in random order, then all again."""
    deck, step, found = [], 0, []
    while len(found) < 2 * minutes:
        deck = deck or dice.sample(sorted(KINDS), len(KINDS))
        step += dice.randint(*GAP)
        name = deck.pop()
        found.append((name, Fault(KINDS[name], rank=dice.randrange(2), step=step)))
    return found


@pytest.mark.nightly
@pytest.mark.fault("F91")
def test_a_month_of_mixed_faults(small_corpus: Path, tmp_path: Path, record_property: Callable[[str, object], None]):
    faults = drawn(random.Random(1), minutes=MINUTES)
    steps = faults[-1][1].step + EVERY
    size = {"steps": steps, "every": EVERY}
    undisturbed = straight_run(small_corpus, tmp_path / "straight", within_s=60 * MINUTES, **size)
    config = small_run(small_corpus, tmp_path / "run", **size)
    config = replace(config, data=replace(config.data, workers=1))
    began, limits = time.monotonic(), Limits(failures=10_000, idle_preemptions=3)
    attempts = live_on(config, *paced(PACE_S), *(fault for _, fault in faults), limits=limits, within_s=600)
    seconds = time.monotonic() - began
    expected = [CODES[name] for name, _ in faults if name in CODES]
    assert [max(attempt.codes) for attempt in attempts] == [*expected, ExitCode.DONE]
    assert sum(attempt.printed.count("was not written (") for attempt in attempts) == [
        name for name, _ in faults
    ].count("F28")
    redone = check_recovered(config, undisturbed)
    for counts in open_files(config).values():
        assert max(counts[EVERY:], default=0) <= max(counts[:EVERY]) + 2, counts
    record_property("lost", f"{len(faults)} faults in {seconds / 60:.0f} min, {redone} of {steps} steps done again")
