"""The supervisor of one rank, which is no more than a small function here: what it ends with, and what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pmlm_dist.config import ConfigError, WatchdogConfig
from pmlm_dist.launch_environment import rank_in
from pmlm_dist.supervision.exit_codes import (
    ExitCode,
    RestartPolicy,
    blames_peers,
    describe,
    exit_code_of,
    restart_policy,
)
from pmlm_dist.supervision.failure_reports import RankReport, summary
from pmlm_dist.supervision.heartbeat import DATA, PHASES, SAVE, STEP, Heartbeat, phase_limits
from pmlm_dist.supervision.processes import count_of_kills, send, send_to_main_thread, state_of
from pmlm_dist.supervision.run_lock import FolderInUse

RANK = """
import os, signal, subprocess, sys, time
from pmlm_dist.supervision.heartbeat import *
from pmlm_dist.supervision.supervisor import exit_now, run_supervised

def main(heartbeat):
    heartbeat.register(rank={rank}, world_size=1, run_dir=sys.argv[1], attempt="attempt")
    heartbeat.set_limits(dict.fromkeys(PHASES, 1.0))
    heartbeat.enter(STEP, step=3)
    {body}
    return 0

exit_now(run_supervised(main))
"""


def run(body: str, run_dir: Path, *, rank: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
    """A supervised process whose rank does `body`."""
    code = RANK.format(body=body, rank=rank)
    command = [sys.executable, "-c", code, str(run_dir)]
    environ = {**os.environ, **environ}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("code", [0, 2, 75, 83])
def test_codes_that_all_ranks_end_with_pass_through_and_leave_nothing(tmp_path: Path, code: int):
    done = run(f"return {code}", tmp_path)
    assert (done.returncode, done.stderr) == (code, "")
    assert not list(tmp_path.iterdir())


def test_silence_is_a_hang_and_the_stack_is_kept(tmp_path: Path):
    done = run("time.sleep(60)", tmp_path)
    assert done.returncode == ExitCode.HUNG
    assert "rank 0 made no progress for 1 s, in step 3 (step)" in done.stderr
    assert "in main" in (tmp_path / "logs/attempt/rank-00000.txt").read_text()


def test_signs_of_life_hold_it_off(tmp_path: Path):
    assert run("[(time.sleep(0.2), heartbeat.beat()) for _ in range(12)]", tmp_path).returncode == 0


def test_the_time_that_the_supervisor_itself_stood_still_does_not_count(tmp_path: Path):
    body = "os.kill(os.getppid(), signal.SIGSTOP); time.sleep(2); os.kill(os.getppid(), signal.SIGCONT); time.sleep(.4)"
    assert run(body, tmp_path).returncode == 0


def test_an_error_is_told_with_its_traceback(tmp_path: Path):
    done = run("raise LookupError('lost')", tmp_path)
    assert done.returncode == ExitCode.FAILED
    assert done.stderr.count("Traceback") == 1
    assert "rank 0 failed: LookupError: lost, in step 3 (step)" in done.stderr
    assert "LookupError: lost" in (tmp_path / "logs/attempt/rank-00000.txt").read_text()


def test_a_training_that_has_diverged_is_told_in_its_own_words(tmp_path: Path):
    done = run("raise FloatingPointError('20 steps in a row: lower --optim.peak-lr')", tmp_path)
    assert done.returncode == ExitCode.NOT_FINITE
    assert "Traceback" not in done.stderr
    assert "This run cannot go on: 20 steps in a row: lower --optim.peak-lr" in done.stderr
    assert "FloatingPointError" in (tmp_path / "logs/attempt/rank-00000.txt").read_text()


def test_another_ranks_cause_ends_this_one_with_its_code(tmp_path: Path):
    body = """(__import__('pathlib').Path(sys.argv[1]) / 'logs/attempt').mkdir(parents=True)
    open(sys.argv[1] + '/logs/attempt/failure.json', 'w').write(
        '{"rank": 4, "code": 81, "what": "x", "step": 1, "phase": "step"}')
    while True: time.sleep(0.2); heartbeat.beat()"""
    done = run(body, tmp_path)
    assert (done.returncode, done.stderr) == (81, "")
    assert (tmp_path / "logs/attempt/rank-00000.txt").exists()


def test_what_the_rank_has_started_is_ended_with_it(tmp_path: Path):
    token = f"PMLM_TEST_{time.monotonic_ns()}"
    body = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); os.kill(os.getpid(), 9)"
    assert run(body, tmp_path, TOKEN=token).returncode == 137
    alive = [path for path in Path("/proc").glob("[0-9]*/environ") if token.encode() in read(path)]
    assert not alive


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_the_rank_ends_when_its_supervisor_is_killed(tmp_path: Path):
    body = "(__import__('pathlib').Path(sys.argv[1]) / 'pid').write_text(str(os.getpid())); os.kill(os.getppid(), 9)"
    assert run(body + "; time.sleep(60)", tmp_path).returncode == -9
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/environ").exists() and read(Path(f"/proc/{pid}/environ")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_signals_are_passed_on(tmp_path: Path):
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(75)); os.kill(os.getppid(), signal.SIGTERM); time.sleep(9)"
    )
    assert run(body, tmp_path).returncode == 75


def test_a_rank_that_does_not_heed_sigterm_is_killed(tmp_path: Path):
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); open(sys.argv[1] + '/pid', 'w').write(str(os.getpid()))"
    done = run(f"{body}; time.sleep(60)", tmp_path)
    assert done.returncode == ExitCode.HUNG
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_signals_that_come_while_the_rank_is_being_ended_hold_nothing_up(tmp_path: Path):
    body = """signal.signal(signal.SIGTERM, lambda *_: [os.kill(os.getppid(), signal.SIGTERM) for _ in range(9)])
    while True: time.sleep(60)"""
    assert run(body, tmp_path).returncode == ExitCode.HUNG


@pytest.mark.fault("F88")
@pytest.mark.parametrize(("body", "code"), [("return 0", 0), ("return 75", 75), ("time.sleep(60)", ExitCode.HUNG)])
def test_a_full_disk_changes_no_exit_code(tmp_path: Path, body: str, code: int):
    """The log's disk takes nothing, and neither causes nor reports can be written."""
    (tmp_path / "logs").touch()
    program = RANK.format(body=f"print('a line'); {body}", rank=0)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", program, str(tmp_path)]
        environ = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(command, stdout=full, stderr=full, env=environ, timeout=60, check=False)
    assert done.returncode == code


@pytest.mark.fault("F88")
def test_reports_hold_no_secret_of_the_environment(tmp_path: Path):
    done = run("time.sleep(60)", tmp_path, SECRET_TOKEN="hunter2hunter2")
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert not [text for text in (*files, done.stdout, done.stderr) if "hunter2" in text]


def test_without_a_supervisor_the_rank_is_the_process(tmp_path: Path):
    done = run("print(os.getppid()); time.sleep(1.5)", tmp_path, PMLM_SUPERVISOR="off")
    assert (done.returncode, done.stdout) == (0, f"{os.getpid()}\n")


# ---------------------------------------------------------------------------------------------------------- the parts


def test_a_beat_says_where_the_rank_is():
    heartbeat = Heartbeat()
    heartbeat.set_limits(phase_limits(WatchdogConfig(data_s=7.0), warm=True))
    heartbeat.enter(DATA, step=5)
    first = heartbeat.read()
    assert first is not None
    assert (first.step, first.phase, first.limit_s) == (5, DATA, 7.0)
    heartbeat.enter(SAVE)
    second = heartbeat.read()
    assert second is not None
    assert (second.step, second.phase, second.count) == (5, SAVE, first.count + 1)


def test_every_phase_has_a_limit_of_its_own():
    watch = WatchdogConfig()
    assert phase_limits(watch, warm=True).keys() == set(PHASES)
    assert phase_limits(watch, warm=True)[STEP] == watch.step_s
    assert set(phase_limits(watch, warm=False).values()) == {watch.startup_s}


def test_a_long_traceback_fits():
    heartbeat = Heartbeat()
    heartbeat.fail(ValueError("x" * 100_000))
    assert len(heartbeat.status().failure or "") == 2000
    assert heartbeat.status().code == ExitCode.FAILED


def reports() -> list[RankReport]:
    at = time.time()
    return [
        RankReport(rank, step=7, phase="data", last_beat=at - (60 if rank == 5 else 59.5), process="sleeping")
        for rank in range(40)
        if rank != 9
    ]


def test_the_rank_that_was_silent_first_is_furthest_behind():
    lines = summary(reports(), world_size=40)
    assert lines[:2] == ["without a report: ranks 9", "furthest behind: rank 5"]
    assert len(lines) == 10


def test_a_rank_at_an_earlier_step_or_stopped_is_further_behind():
    now = time.time()
    others = [*reports(), RankReport(50, step=6, phase="step", last_beat=now, process="running")]
    assert "furthest behind: rank 50" in summary(others, world_size=40)
    others.append(RankReport(51, step=8, phase="step", last_beat=now, process="stopped"))
    assert "furthest behind: rank 51" in summary(others, world_size=40)


@pytest.mark.fault("F16")
def test_kills_for_want_of_memory_are_counted_in_both_versions_of_control_groups():
    assert count_of_kills("low 0\nhigh 0\nmax 11\noom 4\noom_kill 3\noom_group_kill 0\n") == 3
    assert count_of_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n") == 2
    assert count_of_kills("") == 0


def test_a_rank_is_called_as_its_launcher_calls_it():
    assert rank_in({"SLURM_PROCID": "3"}) == 3
    assert rank_in({"SLURM_PROCID": "0", "OMPI_COMM_WORLD_RANK": "2"}) == 2
    assert rank_in({}) == 0


# ---------------------------------------------------------------------------------------------------------- exit codes

ERRORS: list[tuple[BaseException, ExitCode]] = [
    (ConfigError(["x"]), ExitCode.BAD_CONFIGURATION),
    (MemoryError(), ExitCode.OUT_OF_MEMORY),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), ExitCode.OUT_OF_MEMORY),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte"), ExitCode.OUT_OF_MEMORY),
    (FloatingPointError("20 steps in a row"), ExitCode.NOT_FINITE),
    (Exception("Current loss scale already at minimum - cannot decrease scale anymore."), ExitCode.NOT_FINITE),
    (FolderInUse("x"), ExitCode.IN_USE),
    (KeyError("memory"), ExitCode.FAILED),
]


@pytest.mark.fault("F72", "F73", "F86")
@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: repr(value)[:30])
def test_errors_end_with_the_code_of_their_kind(error: BaseException, code: ExitCode):
    assert exit_code_of(error) is code


@pytest.mark.fault("F86")
def test_what_is_started_again_follows_from_the_code():
    assert [restart_policy(code) for code in (0, 2, 82, 83, 84)] == [RestartPolicy.NEVER] * 5
    assert restart_policy(75) is RestartPolicy.ALWAYS
    assert restart_policy(81) is RestartPolicy.ONCE
    assert [restart_policy(code) for code in (1, 80, 137, 139, 255)] == [RestartPolicy.BOUNDED] * 5
    assert describe(137) == "ended by signal 9"


def test_errors_that_tell_of_other_ranks_are_known():
    assert blames_peers(RuntimeError("[third_party/gloo/pair.cc:525] Connection closed by peer [127.0.0.1]:2"))
    assert blames_peers(RuntimeError("NCCL communicator was aborted on rank 3"))
    assert not blames_peers(RuntimeError("parameters that ranks hold in common are not equal"))


STANDING = """
import faulthandler, os, signal, sys, threading, time
faulthandler.register(signal.SIGUSR2, open(sys.argv[1], "w"))
for _ in range(3):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
def stand_still():
    os.kill(os.getpid(), signal.SIGSTOP)
stand_still()
time.sleep(60)
"""


def test_a_process_that_was_stopped_tells_where_before_it_goes_on(tmp_path: Path):
    places = [tmp_path / str(number) for number in range(16)]  # told by any of its threads, one in six was too late
    children = [subprocess.Popen([sys.executable, "-c", STANDING, str(place)]) for place in places]
    try:
        for child, place in zip(children, places, strict=True):
            wait_until(lambda child=child: state_of(child.pid) == "stopped")
            send_to_main_thread(child.pid, signal.SIGUSR2)
            send(child.pid, signal.SIGCONT)
            wait_until(lambda place=place: "in <module>" in place.read_text())
            assert "in stand_still" in place.read_text()
    finally:
        for child in children:
            child.kill()
            child.wait()


def wait_until(is_so: Callable[[], bool], *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
