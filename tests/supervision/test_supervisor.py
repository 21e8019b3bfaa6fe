"""The supervisor of one rank, here a small function: its exit code, its reports and the processes it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pmlm_dist import cli
from pmlm_dist.config import ConfigError, WatchdogConfig
from pmlm_dist.corpus.shards import ShardError
from pmlm_dist.folder_lock import FolderInUse
from pmlm_dist.launch_environment import rank_in
from pmlm_dist.supervision import exit_codes
from pmlm_dist.supervision.exit_codes import (
    ExitCode,
    RestartPolicy,
    describe,
    exit_code_of,
    is_peer_failure,
    restart_policy,
)
from pmlm_dist.supervision.failure_reports import RankReport, summary
from pmlm_dist.supervision.heartbeat import DATA, PHASES, SAVE, STEP, Heartbeat, phase_limits
from pmlm_dist.supervision.processes import parse_oom_kills, process_state, send_signal, send_to_main_thread

RANK = """
import os, signal, subprocess, sys, time
from pmlm_dist.supervision.heartbeat import *
from pmlm_dist.supervision.supervisor import SupervisorTimes, exit_now, run_supervised

def main(heartbeat):
    heartbeat.register(rank={rank}, world_size=1, run_dir=sys.argv[1], attempt="attempt")
    heartbeat.set_limits(dict.fromkeys(PHASES, {limit_s}))
    heartbeat.enter(STEP, step=3)
    {body}
    return 0

times = SupervisorTimes(
    poll_s=0.05, failure_poll_s=0.1, root_cause_s=0.5, reports_s=0.5, stack_s=0.5, term_s=1.0, orphans_s=0.2
)
exit_now(run_supervised(main, times=times))
"""
LIMIT_S = 0.5
"""Limit of every phase: ten polls of the supervisor."""


def run(
    body: str, run_dir: Path, *, rank: int = 0, template: str = RANK, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a supervised process whose rank executes `body`."""
    code = template.format(body=body, rank=rank, limit_s=LIMIT_S)
    command = [sys.executable, "-c", code, str(run_dir)]
    environ = {**os.environ, **environ}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("code", [0, 2, 75, 83, 130])
def test_collective_exit_code_passes_through_without_files(tmp_path: Path, code: int):
    done = run(f"return {code}", tmp_path)
    assert (done.returncode, done.stderr) == (code, "")
    assert not list(tmp_path.iterdir())


def test_missing_beats_are_a_hang_with_the_stack_reported(tmp_path: Path):
    done = run("time.sleep(60)", tmp_path)
    assert done.returncode == ExitCode.HUNG
    assert f"rank 0 made no progress for {LIMIT_S} s, in step 3 (step)" in done.stderr
    assert "in main" in (tmp_path / "logs/attempt/rank-00000.txt").read_text()


def test_beats_prevent_a_hang(tmp_path: Path):
    assert run("[(time.sleep(0.1), heartbeat.beat()) for _ in range(12)]", tmp_path).returncode == 0


def test_progress_of_a_long_step_is_printed(tmp_path: Path):
    template = RANK.replace("poll_s=0.05", "poll_s=0.05, progress_s=0.4")
    body = "for part in range(1, 9): heartbeat.enter_part(part, of=8); time.sleep(0.12)"
    lines = run(body, tmp_path, template=template).stdout.splitlines()
    assert [line.partition(",")[0] for line in lines[:2]] == ["step 3 (step"] * 2
    assert re.fullmatch(r"step 3 \(step, micro-batch [3-6] of 8\): 0 s so far", lines[0])
    assert run(body, tmp_path).stdout == ""


def test_silence_while_the_supervisor_is_stopped_does_not_count(tmp_path: Path):
    body = "os.kill(os.getppid(), signal.SIGSTOP); time.sleep(1); os.kill(os.getppid(), signal.SIGCONT); time.sleep(.1)"
    assert run(body, tmp_path).returncode == 0


def test_error_of_rank_is_reported_with_traceback(tmp_path: Path):
    done = run("raise LookupError('lost')", tmp_path)
    assert done.returncode == ExitCode.FAILED
    assert done.stderr.count("Traceback") == 1
    assert "rank 0 failed: LookupError: lost, in step 3 (step)" in done.stderr
    assert "LookupError: lost" in (tmp_path / "logs/attempt/rank-00000.txt").read_text()


def test_diverged_training_prints_its_message_without_traceback(tmp_path: Path):
    done = run("raise FloatingPointError('20 steps in a row: lower --optim.peak-lr')", tmp_path)
    assert done.returncode == ExitCode.NOT_FINITE
    assert "Traceback" not in done.stderr
    assert "train.py: 20 steps in a row: lower --optim.peak-lr" in done.stderr
    assert "FloatingPointError" in (tmp_path / "logs/attempt/rank-00000.txt").read_text()


def test_failure_of_another_rank_ends_this_one_with_its_code(tmp_path: Path):
    body = """(__import__('pathlib').Path(sys.argv[1]) / 'logs/attempt').mkdir(parents=True)
    open(sys.argv[1] + '/logs/attempt/failure.json', 'w').write(
        '{"rank": 4, "code": 81, "reason": "x", "step": 1, "phase": "step"}')
    while True: time.sleep(0.1); heartbeat.beat()"""
    done = run(body, tmp_path)
    assert (done.returncode, done.stderr) == (81, "")
    assert (tmp_path / "logs/attempt/rank-00000.txt").exists()


def test_descendants_end_with_the_rank(tmp_path: Path):
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


def test_rank_ends_when_its_supervisor_is_killed(tmp_path: Path):
    body = "(__import__('pathlib').Path(sys.argv[1]) / 'pid').write_text(str(os.getpid())); os.kill(os.getppid(), 9)"
    assert run(body + "; time.sleep(60)", tmp_path).returncode == -9
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/environ").exists() and read(Path(f"/proc/{pid}/environ")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_signals_are_forwarded_to_the_rank(tmp_path: Path):
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(75)); os.kill(os.getppid(), signal.SIGTERM); time.sleep(9)"
    )
    assert run(body, tmp_path).returncode == 75


def test_rank_that_ignores_sigterm_is_killed(tmp_path: Path):
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); open(sys.argv[1] + '/pid', 'w').write(str(os.getpid()))"
    done = run(f"{body}; time.sleep(60)", tmp_path)
    assert done.returncode == ExitCode.HUNG
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_signals_during_the_end_of_a_rank_do_not_extend_it(tmp_path: Path):
    body = """signal.signal(signal.SIGTERM, lambda *_: [os.kill(os.getppid(), signal.SIGTERM) for _ in range(9)])
    while True: time.sleep(60)"""
    assert run(body, tmp_path).returncode == ExitCode.HUNG


@pytest.mark.fault("F88")
@pytest.mark.parametrize(("body", "code"), [("return 0", 0), ("return 75", 75), ("time.sleep(60)", ExitCode.HUNG)])
def test_full_disk_changes_no_exit_code(tmp_path: Path, body: str, code: int):
    """Output, failure.json and reports cannot be written."""
    (tmp_path / "logs").touch()
    program = RANK.format(body=f"print('a line'); {body}", rank=0, limit_s=LIMIT_S)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", program, str(tmp_path)]
        environ = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(command, stdout=full, stderr=full, env=environ, timeout=60, check=False)
    assert done.returncode == code


@pytest.mark.fault("F88")
def test_reports_contain_no_environment_variable(tmp_path: Path):
    done = run("time.sleep(60)", tmp_path, SECRET_TOKEN="hunter2hunter2")
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert not [text for text in (*files, done.stdout, done.stderr) if "hunter2" in text]


def test_rank_runs_without_fork_if_supervisor_is_off(tmp_path: Path):
    done = run("print(os.getppid()); time.sleep(1)", tmp_path, PMLM_SUPERVISOR="off")
    assert (done.returncode, done.stdout) == (0, f"{os.getpid()}\n")


# ------------------------------------------------------------------------------------------------- heartbeat, reports


def test_beat_has_step_and_phase_of_rank():
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


def test_every_phase_has_its_own_limit_once_warm():
    watchdog = WatchdogConfig()
    assert phase_limits(watchdog, warm=True).keys() == set(PHASES)
    assert phase_limits(watchdog, warm=True)[STEP] == watchdog.step_s
    assert set(phase_limits(watchdog, warm=False).values()) == {watchdog.startup_s}


def test_long_error_message_is_truncated():
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


def test_rank_with_the_oldest_beat_is_furthest_behind():
    lines = summary(reports(), world_size=40)
    assert lines[:2] == ["without a report: ranks 9", "furthest behind: rank 5"]
    assert len(lines) == 10


def test_rank_at_an_earlier_step_or_stopped_is_furthest_behind():
    now = time.time()
    others = [*reports(), RankReport(50, step=6, phase="step", last_beat=now, process="running")]
    assert "furthest behind: rank 50" in summary(others, world_size=40)
    others.append(RankReport(51, step=8, phase="step", last_beat=now, process="stopped"))
    assert "furthest behind: rank 51" in summary(others, world_size=40)


@pytest.mark.fault("F16")
def test_oom_kills_are_parsed_for_both_cgroup_versions():
    assert parse_oom_kills("low 0\nhigh 0\nmax 11\noom 4\noom_kill 3\noom_group_kill 0\n") == 3
    assert parse_oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n") == 2
    assert parse_oom_kills("") == 0


def test_rank_is_read_from_the_launcher_environment():
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
def test_exit_code_follows_from_the_error(error: BaseException, code: ExitCode):
    assert exit_code_of(error) is code


@pytest.mark.parametrize("error", [error for error, _ in ERRORS] + [ShardError("x"), KeyboardInterrupt()], ids=repr)
def test_exit_code_is_that_of_train_and_of_every_command(monkeypatch: pytest.MonkeyPatch, error: BaseException):
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "plot", fail)
    assert cli.main(["plot"]) == exit_codes.run(fail, program="train.py", on_failure=Heartbeat().fail)


@pytest.mark.fault("F86")
def test_restart_policy_follows_from_the_exit_code():
    assert [restart_policy(code) for code in (0, 2, 82, 83, 84)] == [RestartPolicy.NEVER] * 5
    assert restart_policy(75) is RestartPolicy.ALWAYS
    assert restart_policy(81) is RestartPolicy.ONCE
    assert [restart_policy(code) for code in (1, 80, 137, 139, 255)] == [RestartPolicy.BOUNDED] * 5
    assert describe(137) == "ended by signal 9"


def test_failed_communication_is_a_peer_failure():
    assert is_peer_failure(RuntimeError("[third_party/gloo/pair.cc:525] Connection closed by peer [127.0.0.1]:2"))
    assert is_peer_failure(RuntimeError("NCCL communicator was aborted on rank 3"))
    assert not is_peer_failure(RuntimeError("parameters that ranks hold in common are not equal"))


def test_corpus_read_error_of_another_rank_is_a_peer_failure():
    """By its name: an import of the class would load torch here."""
    package = Path(__file__).parent.parent.parent / "pmlm_dist"
    assert any("class CorpusReadError(RuntimeError)" in path.read_text() for path in package.rglob("*.py"))
    error = type("CorpusReadError", (RuntimeError,), {})("rank 1: unreadable shard")
    assert is_peer_failure(error)


STOPPED = """
import faulthandler, os, signal, sys, threading, time
faulthandler.register(signal.SIGUSR2, open(sys.argv[1], "w"))
for _ in range(3):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
def stop_itself():
    os.kill(os.getpid(), signal.SIGSTOP)
stop_itself()
time.sleep(60)
"""


def test_stopped_process_dumps_its_stack_before_it_resumes(tmp_path: Path):
    # 16 processes: with a signal to the process, which any thread may handle, one dump in six came too late.
    paths = [tmp_path / str(number) for number in range(16)]
    children = [subprocess.Popen([sys.executable, "-c", STOPPED, str(path)]) for path in paths]
    try:
        for child, path in zip(children, paths, strict=True):
            wait_until(lambda child=child: process_state(child.pid) == "stopped")
            send_to_main_thread(child.pid, signal.SIGUSR2)
            send_signal(child.pid, signal.SIGCONT)
            wait_until(lambda path=path: "in <module>" in path.read_text())
            assert "in stop_itself" in path.read_text()
    finally:
        for child in children:
            child.kill()
            child.wait()


def wait_until(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
