"""What a run's time went into, and whether it is started again: pure rules, and the loop around a launcher."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmlm_dist.metrics.stragglers import RankTimes, Stragglers
from pmlm_dist.supervision import attempts, restart
from pmlm_dist.supervision.attempts import AttemptLog, best_interval, effective_time_line, read_attempts
from pmlm_dist.supervision.exit_codes import ExitCode, RestartPolicy
from pmlm_dist.supervision.restart import History, Limits, decide_restart

ROOT = Path(__file__).parent.parent.parent


def lines(*events: tuple[str, float, int, float]) -> list[dict[str, object]]:
    """Lines of a life: event, time, step, seconds of training so far."""
    return [
        {"event": event, "time": at, "step": step, "began": at, "attempt": f"{at}", "world_size": 2, "every": 5}
        | {"useful_s": useful_s, "stalled_s": 1.0, "code": 0}
        for event, at, step, useful_s in events
    ]


def write(run_dir: Path, facts: list[dict[str, object]]) -> Path:
    (run_dir / attempts.ATTEMPTS).write_text("".join(json.dumps(line) + "\n" for line in facts))
    return run_dir


@pytest.mark.fault("F70")
def test_only_steps_that_are_gone_on_from_count(tmp_path: Path):
    """100 s of training until step 10, saved at 5 (50 s) and 10; then a life that gains nothing; then one from 5 on."""
    facts = lines(
        *[("start", 0, 0, 0), ("save", 70, 5, 50), ("save", 130, 10, 100)],
        *[("start", 200, 10, 0)],
        *[("start", 300, 5, 0), ("save", 370, 10, 60), ("end", 500, 20, 170)],
    )
    found = effective_time_line(read_attempts(write(tmp_path, facts)))
    assert found.useful_s == 50 + 170
    assert (found.whole_s, found.starts, found.failures) == (500, 3, 2)
    assert found.share == pytest.approx(0.44)
    assert found.steps == 20
    assert found.save_s == pytest.approx(2 / 3)
    said = str(found)
    assert "effective training time 44.0% of 500 s since the first of 3 starts (2 unexpected ends)" in said
    interval = math.sqrt(2 * 2 / 3 * 250)
    assert f"one every {interval:.0f} s ({round(interval / 11)} steps) loses least (now every 5 steps)" in said


def test_the_time_after_an_end_by_hand_does_not_count(tmp_path: Path):
    facts = lines(("start", 0, 0, 0), ("save", 90, 5, 80), ("end", 100, 5, 80))
    facts += lines(("start", 9_100, 5, 0), ("end", 9_200, 9, 90))
    found = effective_time_line(read_attempts(write(tmp_path, facts)))
    assert (found.useful_s, found.whole_s, found.failures) == (170, 200, 0)


def test_torn_lines_are_passed_over_and_ends_are_corrected(tmp_path: Path):
    log = AttemptLog(tmp_path, attempt="a", world_size=2, every=5, enabled=True)
    log.started(0)
    log.saved(5, useful_s=3.0, stalled_s=0.5)
    log.ended(7, useful_s=4.0, code=75)
    with (tmp_path / attempts.ATTEMPTS).open("a") as out:
        out.write('{"event": "sa')
    attempts.close_attempt(tmp_path, attempt="a", code=80)
    attempts.close_attempt(tmp_path, attempt="b", code=1)
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.code, attempt.saves, attempt.stalled_s, attempt.useful_s) == (80, {5: 3.0}, 0.5, 4.0)
    AttemptLog(tmp_path, attempt="c", world_size=2, every=5, enabled=False).started(5)
    assert len(read_attempts(tmp_path)) == 1


def test_the_best_interval_loses_least():
    def lost(interval: float) -> float:
        return 3.0 / interval + interval / 2 / 5000.0

    best = best_interval(3.0, 5000.0)
    assert lost(best) < min(lost(best * 1.05), lost(best * 0.95))


# ------------------------------------------------------------------------------------------------------------ the rule


def codes_survived(*lives_of_job: tuple[int, int], limits: Limits) -> list[bool]:
    """Whether the run goes on after each (code, newest step)."""
    history, goes_on = History(), []
    for code, step in lives_of_job:
        decision = decide_restart(history, code=code, step=step, limits=limits)
        history = decision.history
        goes_on.append(decision.reason_to_stop is None)
    return goes_on


@pytest.mark.fault("F15", "F86")
@pytest.mark.parametrize("code", [1, 80, 137, 139])
def test_failures_are_bounded_and_must_gain_steps(code: int):
    limits = Limits(failures=3)
    assert codes_survived((code, 0), (code, 0), limits=limits) == [True, False]
    assert codes_survived((code, 5), (code, 9), (code, 12), (code, 20), limits=limits) == [True, True, True, False]


@pytest.mark.fault("F86")
@pytest.mark.parametrize("code", [code for code in ExitCode if code.restart is RestartPolicy.NEVER])
def test_what_would_only_happen_again_ends_the_run(code: ExitCode):
    assert codes_survived((code, 50), limits=Limits()) == [False]


def test_want_of_memory_is_tried_once_more_in_a_row():
    assert codes_survived((81, 5), (81, 9), limits=Limits()) == [True, False]
    assert codes_survived((81, 5), (75, 9), (81, 12), limits=Limits()) == [True, True, True]


def test_being_told_to_stop_is_no_failure():
    told = [(75, step) for step in range(20)]
    assert codes_survived(*told, limits=Limits(failures=0)) == [True] * 20
    assert codes_survived((75, 3), (75, 3), (75, 3), limits=Limits(idle_preemptions=2)) == [True, True, False]


@pytest.mark.fault("F86")
def test_the_document_shows_the_table_of_exit_codes():
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for code in ExitCode:
        assert f"| {int(code)} | {code.meaning} | {code.restart.value} |" in text


LAUNCHER = """
import json, pathlib, sys, time
run_dir = pathlib.Path({run_dir!r})
number = len(list(run_dir.glob("attempt-*")))
(run_dir / f"attempt-{{number}}").touch()
(run_dir / "checkpoints" / f"step-{{number:08d}}").mkdir(parents=True)
time.sleep({seconds})
with (run_dir / "attempts.jsonl").open("a") as out:
    out.write(json.dumps(dict(event="start", attempt=str(number), began=time.time(), time=time.time(), step=number,
                              world_size=1, every=1)) + "\\n")
    out.write(json.dumps(dict(event="end", time=time.time(), step=number, useful_s=1, code={codes}[number])) + "\\n")
sys.exit(1 if {codes}[number] else 0)
"""


def loop(run_dir: Path, *, codes: list[int], seconds: float = 0.0) -> subprocess.Popen[str]:
    code = LAUNCHER.format(run_dir=str(run_dir), codes=codes, seconds=seconds)
    command = [
        sys.executable,
        "-m",
        "pmlm_dist.supervision.restart",
        "run",
        str(run_dir),
        "--",
        sys.executable,
        "-c",
        code,
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_loop_goes_on_by_the_codes_of_the_ranks_that_launchers_lose(tmp_path: Path):
    process = loop(tmp_path, codes=[75, 137, 1, 0])
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert len(list(tmp_path.glob("attempt-*"))) == 4
    assert [line.split("exit code ")[1] for line in printed.splitlines()] == [
        "75 at step 0: going on",
        "137 at step 1: going on",
        "1 at step 2: going on",
    ]
    assert not list(tmp_path.glob(".restarts*"))


def test_a_loop_that_is_told_to_stop_starts_nothing_again(tmp_path: Path):
    process = loop(tmp_path, codes=[75, 0], seconds=20)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("attempt-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert len(list(tmp_path.glob("attempt-*"))) == 1


def test_the_newest_step_counts_finished_checkpoints_alone(tmp_path: Path):
    assert restart.newest_step(tmp_path) == 0
    for name in ("step-00000009", "step-00000080.tmp-abc", "latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert restart.newest_step(tmp_path) == 9


# --------------------------------------------------------------------------------------------------------- stragglers


def times(own_s: float) -> RankTimes:
    return RankTimes(data_s=own_s / 4, compute_s=own_s, forward_s=own_s * 3 / 4, step_s=4.0)


@pytest.mark.fault("F14")
def test_a_rank_is_named_when_it_is_slow_three_times_in_a_row():
    stragglers = Stragglers(ratio=1.5)
    slow = [times(1.0), times(1.1), times(2.0), times(0.9)]
    even = [times(1.0)] * 4
    assert [len(stragglers.check(seen)) for seen in (slow, slow, even, slow, slow, slow, slow)] == [0, 0, 0, 0, 0, 1, 0]
    assert stragglers.check([times(1.0)]) == []


def test_a_difference_that_nobody_waits_for_is_none():
    stragglers = Stragglers(ratio=1.5)
    assert not [name for _ in range(5) for name in stragglers.check([times(0.01), times(0.1)])]
