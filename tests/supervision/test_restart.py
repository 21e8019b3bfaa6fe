"""Effective training time, the restart rule, and the restart loop around a launcher."""

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
from pmlm_dist.supervision.attempts import AttemptLog, best_interval, effective_time, read_attempts
from pmlm_dist.supervision.exit_codes import ExitCode, RestartPolicy
from pmlm_dist.supervision.restart import RestartHistory, RestartLimits, decide_restart

ROOT = Path(__file__).parent.parent.parent


def lines(*events: tuple[str, float, int, float]) -> list[dict[str, object]]:
    """Lines of an attempt: event, time, step, seconds of training so far."""
    return [
        {"event": event, "time": at, "step": step, "start_time": at, "attempt": f"{at}", "world_size": 2}
        | {"checkpoint_every": 5, "useful_s": useful_s, "stalled_s": 1.0, "code": 0}
        for event, at, step, useful_s in events
    ]


def write(run_dir: Path, facts: list[dict[str, object]]) -> Path:
    (run_dir / attempts.ATTEMPTS).write_text("".join(json.dumps(line) + "\n" for line in facts))
    return run_dir


@pytest.mark.fault("F70")
def test_effective_time_counts_only_steps_that_were_resumed_from(tmp_path: Path):
    """100 s until step 10, saved at 5 (50 s) and 10; an attempt without progress; one that resumes from step 5."""
    facts = lines(
        *[("start", 0, 0, 0), ("save", 70, 5, 50), ("save", 130, 10, 100)],
        *[("start", 200, 10, 0)],
        *[("start", 300, 5, 0), ("save", 370, 10, 60), ("end", 500, 20, 170)],
    )
    effective = effective_time(read_attempts(write(tmp_path, facts)))
    assert effective.useful_s == 50 + 170
    assert (effective.total_s, effective.attempts, effective.failures) == (500, 3, 2)
    assert effective.fraction == pytest.approx(0.44)
    assert effective.steps == 20
    assert effective.save_s == pytest.approx(2 / 3)
    assert str(effective) == "effective training time: 44.0% of 500 s in 3 attempts (2 failures)"


def test_interval_is_advised_after_several_failures_and_an_hour(tmp_path: Path):
    facts = lines(("start", 0, 0, 0), ("save", 90, 5, 80))
    for n in (1, 2, 3):
        facts += lines(("start", 3600 * n, 5 * n, 0), ("save", 3600 * n + 90, 5 * n + 5, 80))
    line = str(effective_time(read_attempts(write(tmp_path, [*facts, *lines(("end", 10_900, 20, 80))]))))
    interval = math.sqrt(2 * 1 * 10_900 / 3)
    assert "in 4 attempts (3 failures); a checkpoint costs 1 s, the time between failures is 3633 s: " in line
    assert f"one every {interval:.0f} s ({round(interval / 16)} steps) loses least (now every 5 steps)" in line


def test_lines_of_attempts_that_cannot_be_read_are_skipped(tmp_path: Path):
    run_dir = write(tmp_path, lines(("start", 0, 0, 0), ("save", 90, 5, 80)))
    with (run_dir / attempts.ATTEMPTS).open("a") as file:
        file.write("[" * 100_000 + '\n{"event": "en')
    assert effective_time(read_attempts(run_dir)).useful_s == 80


@pytest.mark.parametrize("code", [0, 75, 130, 138, 143])
def test_stops_by_signal_are_no_failures(tmp_path: Path, code: int):
    facts = lines(*[("start", 0, 0, 0), ("save", 90, 5, 80)])
    facts += [{**line, "code": code} for line in lines(("end", 5_000, 5, 80))]
    effective = effective_time(read_attempts(write(tmp_path, facts)))
    assert str(effective) == "effective training time: 1.6% of 5000 s in 1 attempt (0 failures)"


def test_effective_time_excludes_the_pause_after_a_stop_by_hand(tmp_path: Path):
    facts = lines(("start", 0, 0, 0), ("save", 90, 5, 80), ("end", 100, 5, 80))
    facts += lines(("start", 9_100, 5, 0), ("end", 9_200, 9, 90))
    effective = effective_time(read_attempts(write(tmp_path, facts)))
    assert (effective.useful_s, effective.total_s, effective.failures) == (170, 200, 0)


def test_cut_lines_are_skipped_and_wrong_exit_codes_corrected(tmp_path: Path):
    log = AttemptLog(tmp_path, attempt="a", world_size=2, every=5, enabled=True)
    log.started(0)
    log.saved(5, useful_s=3.0, stalled_s=0.5)
    log.ended(7, useful_s=4.0, code=75)
    with (tmp_path / attempts.ATTEMPTS).open("a") as out:
        out.write('{"event": "sa')
    log.stopping()
    assert [attempt.code for attempt in read_attempts(tmp_path)] == [75]
    attempts.close_attempt(tmp_path, attempt="a", code=80)
    attempts.close_attempt(tmp_path, attempt="b", code=1)
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.code, attempt.saves, attempt.stalled_s, attempt.useful_s) == (80, {5: 3.0}, 0.5, 4.0)
    AttemptLog(tmp_path, attempt="c", world_size=2, every=5, enabled=False).started(5)
    assert len(read_attempts(tmp_path)) == 1


def test_best_interval_loses_least():
    def lost(interval: float) -> float:
        return 3.0 / interval + interval / 2 / 5000.0

    best = best_interval(3.0, 5000.0)
    assert lost(best) < min(lost(best * 1.05), lost(best * 0.95))


# ------------------------------------------------------------------------------------------------------------ the rule


def restarts(*attempts_of_job: tuple[int, int], limits: RestartLimits) -> list[bool]:
    """Whether the run is restarted after each (exit code, newest step)."""
    history, restarted = RestartHistory(), []
    for code, step in attempts_of_job:
        decision = decide_restart(history, code=code, step=step, limits=limits)
        history = decision.history
        restarted.append(decision.reason_to_stop is None)
    return restarted


@pytest.mark.fault("F15", "F86")
@pytest.mark.parametrize("code", [1, 80, 137, 139])
def test_failures_are_limited_and_need_progress(code: int):
    limits = RestartLimits(failures=3)
    assert restarts((code, 0), (code, 0), limits=limits) == [True, False]
    assert restarts((code, 5), (code, 9), (code, 12), (code, 20), limits=limits) == [True, True, True, False]


@pytest.mark.fault("F86")
@pytest.mark.parametrize("code", [code for code in ExitCode if code.restart is RestartPolicy.NEVER])
def test_deterministic_failure_is_not_restarted(code: ExitCode):
    assert restarts((code, 50), limits=RestartLimits()) == [False]


def test_out_of_memory_is_restarted_once_in_a_row():
    assert restarts((81, 5), (81, 9), limits=RestartLimits()) == [True, False]
    assert restarts((81, 5), (75, 9), (81, 12), limits=RestartLimits()) == [True, True, True]


def test_preemption_is_no_failure():
    preempted = [(75, step) for step in range(20)]
    assert restarts(*preempted, limits=RestartLimits(failures=0)) == [True] * 20
    assert restarts((75, 3), (75, 3), (75, 3), limits=RestartLimits(preemptions_without_progress=2)) == [
        True,
        True,
        False,
    ]


@pytest.mark.fault("F86")
def test_operations_document_has_the_table_of_exit_codes():
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
    out.write(json.dumps(dict(event="start", attempt=str(number), start_time=time.time(), time=time.time(), step=number,
                              world_size=1, checkpoint_every=1)) + "\\n")
    out.write(json.dumps(dict(event="end", time=time.time(), step=number, useful_s=1, code={codes}[number])) + "\\n")
sys.exit(1 if {codes}[number] else 0)
"""


def start_loop(run_dir: Path, *, codes: list[int], seconds: float = 0.0) -> subprocess.Popen[str]:
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


def test_loop_restarts_by_the_exit_codes_of_ranks(tmp_path: Path):
    process = start_loop(tmp_path, codes=[75, 137, 1, 0])
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert len(list(tmp_path.glob("attempt-*"))) == 4
    assert [line.split("exit code ")[1] for line in printed.splitlines()] == [
        "75 at step 0: restarting",
        "137 at step 1: restarting",
        "1 at step 2: restarting",
    ]
    assert not list(tmp_path.glob(".restarts*"))


def test_loop_does_not_restart_after_a_signal(tmp_path: Path):
    process = start_loop(tmp_path, codes=[75, 0], seconds=20)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("attempt-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert len(list(tmp_path.glob("attempt-*"))) == 1


def test_newest_step_ignores_unfinished_checkpoints(tmp_path: Path):
    assert restart.newest_step(tmp_path) == 0
    for name in ("step-00000009", "step-00000080.tmp-abc", "latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert restart.newest_step(tmp_path) == 9


# --------------------------------------------------------------------------------------------------------- stragglers


def times(own_s: float) -> RankTimes:
    return RankTimes(data_s=own_s / 4, compute_s=own_s, forward_s=own_s * 3 / 4, step_s=4.0)


@pytest.mark.fault("F14")
def test_rank_slow_three_times_in_a_row_is_a_straggler():
    stragglers = Stragglers(ratio=1.5)
    slow = [times(1.0), times(1.1), times(2.0), times(0.9)]
    even = [times(1.0)] * 4
    assert [len(stragglers.check(seen)) for seen in (slow, slow, even, slow, slow, slow, slow)] == [0, 0, 0, 0, 0, 1, 0]
    assert stragglers.check([times(1.0)]) == []


def test_small_difference_is_no_straggler():
    stragglers = Stragglers(ratio=1.5)
    assert not [name for _ in range(5) for name in stragglers.check([times(0.01), times(0.1)])]
