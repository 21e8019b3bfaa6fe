"""Stop signals of one process: requests, the second signal, the grace period, blocked signals in children."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pmlm_dist.supervision.signals import EXIT_PREEMPTED, StopSignals, stop_signals_blocked

WATCHER = """
import signal, sys, threading, time
from pmlm_dist.supervision.signals import SignalTimes, StopSignals
grace_s, duplicate_s, requested = sys.argv[1:]
signals = StopSignals(grace_s=float(grace_s), times=SignalTimes(duplicate_s=float(duplicate_s), poll_s=0.02))
if requested == "True":
    signals.request()
    time.sleep(2 * float(duplicate_s))
signals.install()
print("installed", flush=True)
while not signals.requested:
    time.sleep(0.01)
print("requested", signals.deadline() < float("inf"), flush=True)
lock = threading.Lock(); lock.acquire(); lock.acquire()
"""


FILL = """
import os
def fill():
    try:
        while True: os.write(2, bytes(4096))
    except BlockingIOError: pass
"""

DUPLICATE_S = 0.2


@contextlib.contextmanager
def signal_watcher(
    *, grace_s: float = 600, duplicate_s: float = DUPLICATE_S, requested: bool = False, code: str = WATCHER
) -> Iterator[subprocess.Popen[str]]:
    """A process that handles signals; after the first it hangs in a lock, where Python runs no handler."""
    command = [sys.executable, "-c", code, str(grace_s), str(duplicate_s), str(requested)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "installed\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.fault("F81")
def test_first_signal_is_a_request_and_second_exits_at_once(number: signal.Signals):
    with signal_watcher() as process:
        process.send_signal(number)
        assert next_line(process) == "requested True\n"
        time.sleep(2 * DUPLICATE_S)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=20)
        assert process.returncode == 128 + signal.SIGTERM
        assert "SIGTERM is the second signal to stop" in error
        assert "the last checkpoint is valid" in error


def test_duplicate_signals_are_one_request():
    """As when a process group receives a signal, and the launcher in it forwards it to the ranks."""
    with signal_watcher(duplicate_s=30) as process:
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
        assert next_line(process) == "requested True\n"
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        assert process.poll() is None


def test_signal_after_a_request_of_another_rank_is_the_first():
    with signal_watcher(requested=True) as process:
        assert next_line(process) == "requested True\n"
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        assert process.poll() is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, EXIT_PREEMPTED), (signal.SIGINT, 130)])
def test_process_exits_at_the_end_of_the_grace_period(number: signal.Signals, code: int):
    with signal_watcher(grace_s=0.5) as process:
        process.send_signal(number)
        _, error = process.communicate(timeout=20)
        assert process.returncode == code
        assert f"{number.name}: stopping at the next step; a second signal ends it at once" in error
        assert "it has not ended 0.5 s after a signal to stop (grace_s)" in error


INTERRUPTIBLE = """
import os, sys, time
from pmlm_dist.supervision import exit_codes
from pmlm_dist.supervision.signals import interruptible

def command():
    try:
        print("installed", flush=True)
        time.sleep(60)
    finally:
        print("cleaning up", flush=True)
        time.sleep(float(sys.argv[1]))
        print("clean", flush=True)

with interruptible():
    code = exit_codes.run(command, program="pmlm")
sys.exit(code)
"""


@pytest.mark.fault("F95")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_without_checkpoints_cleans_up_and_ends_with_one_line(number: signal.Signals):
    with signal_watcher(grace_s=0.2, code=INTERRUPTIBLE) as process:
        process.send_signal(number)
        assert next_line(process) == "cleaning up\n"
        process.send_signal(number)  # a duplicate
        printed, error = process.communicate(timeout=20)
        assert (process.returncode, printed) == (128 + number, "clean\n")
        assert error == f"pmlm: interrupted ({number.name})\n"


@pytest.mark.fault("F95")
def test_second_signal_ends_a_command_that_cleans_up():
    with signal_watcher(grace_s=60, code=INTERRUPTIBLE) as process:
        process.send_signal(signal.SIGINT)
        assert next_line(process) == "cleaning up\n"
        time.sleep(1.1)  # SignalTimes.duplicate_s
        process.send_signal(signal.SIGINT)
        printed, error = process.communicate(timeout=20)
        assert (process.returncode, printed) == (130, "")
        assert "Traceback" not in error


@pytest.mark.parametrize(
    "break_stderr",
    [
        "os.close(2)",
        "reader, writer = os.pipe(); os.dup2(writer, 2); os.close(reader); os.close(writer)",
        "reader, writer = os.pipe(); os.dup2(writer, 2); os.set_blocking(2, False); fill(); os.set_blocking(2, True)",
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
    ],
    ids=["closed", "reader gone", "full pipe", "full disk"],
)
@pytest.mark.parametrize("grace_s", [0.5, 600])
def test_process_exits_without_a_usable_stderr(break_stderr: str, grace_s: float):
    code = f"{FILL}{break_stderr}\n{WATCHER}"
    with signal_watcher(grace_s=grace_s, code=code) as process:
        process.send_signal(signal.SIGTERM)
        assert next_line(process) == "requested True\n"
        if grace_s == 600:
            time.sleep(2 * DUPLICATE_S)
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == (EXIT_PREEMPTED if grace_s < 600 else 128 + signal.SIGTERM)


def test_other_signals_are_ignored():
    code = WATCHER.replace("signals.install()", "signal.signal(signal.SIGCHLD, lambda *_: None); signals.install()")
    assert code != WATCHER
    with signal_watcher(code=code) as process:
        process.send_signal(signal.SIGCHLD)
        process.send_signal(signal.SIGCHLD)
        process.send_signal(signal.SIGUSR1)
        assert next_line(process) == "requested True\n"
        time.sleep(2 * DUPLICATE_S)
        process.send_signal(signal.SIGCHLD)
        time.sleep(0.2)
        assert process.poll() is None


def test_deadline_counts_from_first_request_with_a_margin():
    signals = StopSignals(grace_s=50)
    assert not signals.requested
    assert signals.deadline() == float("inf")
    before = time.monotonic()
    signals.request()
    first = signals.deadline()
    signals.request()
    assert signals.requested
    assert signals.deadline() == first
    assert before + 45 <= first <= time.monotonic() + 45


def test_children_started_with_blocked_signals_ignore_them():
    with stop_signals_blocked():
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        child.send_signal(number)
    child.communicate(b"\n", timeout=20)
    assert child.returncode == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGUSR1, signal.SIGTERM}


WORKERS = """
import multiprocessing, os, signal, time
from multiprocessing import forkserver, resource_tracker
from pmlm_dist.supervision.signals import stop_signals_blocked

context = multiprocessing.get_context("forkserver")
workers = [context.Process(target=time.sleep, args=(60,), daemon=True) for _ in range(2)]
with stop_signals_blocked():
    workers[0].start()
servers = [forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid]
for number in (signal.SIGUSR1, signal.SIGTERM):
    for pid in (*servers, workers[0].pid):
        os.kill(pid, number)
workers[1].start()  # by the same server
time.sleep(0.2)
print(all(worker.is_alive() for worker in workers), forkserver._forkserver._forkserver_pid == servers[0])
for worker in workers:
    worker.kill()
"""


def test_worker_processes_survive_stop_signals():
    done = subprocess.run([sys.executable, "-c", WORKERS], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True True\n"
    assert "died" not in done.stderr
