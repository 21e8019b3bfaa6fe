"""Being told to stop: one checkpoint that the run goes on from as if nothing had been, in time, or none at all."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import run_config, with_train
from support.worlds import run_world

from pmlm_dist.config import RunConfig
from pmlm_dist.metrics.run_log import read_metrics
from pmlm_dist.supervision.signals import (
    EXIT_PREEMPTED,
    STOP_FILE,
    Prefetcher,
    StopAgreement,
    Stopped,
    StopReason,
    StopSignals,
    stop_signals_blocked,
)

# ------------------------------------------------------------------------------------------------------- one process

LISTENING = """
import signal, sys, threading, time
from pmlm_dist.supervision.signals import StopSignals
signals = StopSignals(grace_s=float(sys.argv[1]))
if len(sys.argv) > 2:
    signals.request()
    time.sleep(1.5)
signals.install()
print("listening", flush=True)
while not signals.requested:
    time.sleep(0.01)
print("requested", signals.deadline() < float("inf"), flush=True)
lock = threading.Lock(); lock.acquire(); lock.acquire()
"""


@contextlib.contextmanager
def listening(*arguments: str, grace_s: float) -> Iterator[subprocess.Popen[str]]:
    """A process that listens for signals, and hangs for ever, deaf to Python's handlers, after the first."""
    command = [sys.executable, "-c", LISTENING, str(grace_s), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.fault("F81")
def test_the_first_signal_is_a_request_and_the_second_ends_the_process_at_once(number: signal.Signals):
    with listening(grace_s=600) as process:
        process.send_signal(number)
        assert said(process) == "requested True\n"
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=20)
        assert process.returncode == 128 + signal.SIGTERM
        assert "SIGTERM is the second signal to stop" in error
        assert "the last checkpoint stands" in error


def test_the_same_request_by_two_ways_is_one():
    """As when a process group gets a signal, and the launcher in it passes it on to the ranks."""
    with listening(grace_s=600) as process:
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
        assert said(process) == "requested True\n"
        process.send_signal(signal.SIGUSR1)
        time.sleep(1.5)
        assert process.poll() is None


def test_a_signal_that_comes_after_another_ranks_is_this_ranks_first():
    with listening("requested by another rank", grace_s=600) as process:
        assert said(process) == "requested True\n"
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        assert process.poll() is None


def test_when_the_time_after_a_signal_is_over_the_process_ends_wherever_it_is():
    with listening(grace_s=0.5) as process:
        process.send_signal(signal.SIGUSR1)
        _, error = process.communicate(timeout=20)
        assert process.returncode == EXIT_PREEMPTED
        assert "0.5 s after a signal to stop (--train.grace-s)" in error


def test_other_signals_are_none_of_it():
    code = LISTENING.replace("signals.install()", "signal.signal(signal.SIGCHLD, lambda *_: None); signals.install()")
    process = subprocess.Popen([sys.executable, "-c", code, "600"], stdout=subprocess.PIPE, text=True)
    try:
        assert said(process) == "listening\n"
        process.send_signal(signal.SIGCHLD)
        process.send_signal(signal.SIGCHLD)
        process.send_signal(signal.SIGUSR1)
        assert said(process) == "requested True\n"
        time.sleep(1.5)
        process.send_signal(signal.SIGCHLD)
        time.sleep(0.2)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_the_time_counts_from_the_first_request_and_a_save_gets_a_little_less_of_it():
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


def test_children_do_not_see_signals_that_are_sent_to_all_processes_of_a_step():
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


def test_workers_their_server_and_its_tracker_outlive_such_signals():
    done = subprocess.run([sys.executable, "-c", WORKERS], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True True\n"
    assert "died" not in done.stderr


# ------------------------------------------------------------------------------------------------------ what arrives


def test_items_arrive_in_order_and_so_many_at_a_time():
    arriving = Prefetcher(iter(range(6)), count=3)
    assert [arriving.take(), arriving.take()] == [[0, 1, 2], [3, 4, 5]]


def test_one_can_look_up_while_items_are_awaited():
    released = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        released.wait(20)
        yield 2

    arriving = Prefetcher(items(), count=2)
    assert not arriving.is_ready(within_s=0.01)
    arriving.close()  # does not wait, and leaves alone what the thread is in
    released.set()
    assert arriving.take() == [1, 2]


def test_an_error_comes_instead_of_the_items():
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    arriving = Prefetcher(items(), count=2)
    assert arriving.is_ready(within_s=20)
    with pytest.raises(ValueError, match="damaged"):
        arriving.take()


def test_the_iterator_is_closed_with_it():
    closed = []

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    arriving = Prefetcher(items(), count=2)
    arriving.take()
    arriving.close()
    assert closed == [True]


# --------------------------------------------------------------------------------------------------------- agreement


def agreed(folder: Path, told: int, *, by_file: bool) -> tuple[int, int, bool]:
    """Check 3 times; before the third rank `told` gets a signal, or all a file. Checks passed, exit code, request."""
    from pmlm_dist.parallel import groups

    topology, signals = groups.init_process_groups(), StopSignals()
    stop, passed = StopAgreement(signals, file=folder / STOP_FILE, topology=topology), 0
    try:
        for number in range(3):
            if number == 2 and by_file:
                topology.barrier()
                (folder / STOP_FILE).touch()
                topology.barrier()
            elif number == 2 and topology.rank == told:
                signals.request()
            stop.check()
            passed += 1
    except Stopped as stopped:
        return passed, stopped.exit_code, signals.requested
    return passed, -1, signals.requested


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all_at_the_same_place(tmp_path: Path):
    assert run_world(_agreed_by_signal, 2, tmp_path) == [(2, EXIT_PREEMPTED, True)] * 2


@pytest.mark.distributed
def test_a_file_stops_all_without_a_request_to_be_started_again(tmp_path: Path):
    assert run_world(_agreed_by_file, 2, tmp_path) == [(2, 0, False)] * 2


def _agreed_by_signal(folder: Path) -> tuple[int, int, bool]:
    return agreed(folder, 1, by_file=False)


def _agreed_by_file(folder: Path) -> tuple[int, int, bool]:
    return agreed(folder, 0, by_file=True)


def stopped_while_waiting() -> str:
    """Rank 1's data never come; then rank 0 gets a signal."""
    from pmlm_dist.parallel import groups

    topology, signals, never = groups.init_process_groups(), StopSignals(), threading.Event()

    def items() -> Iterator[int]:
        if topology.rank == 1:
            never.wait()
        yield 1

    stop = StopAgreement(signals, file=Path("/nowhere"), topology=topology)
    if topology.rank == 0:
        threading.Timer(0.5, signals.request).start()
    arriving = Prefetcher(items(), count=1)
    try:
        stop.wait_for(arriving)
    except Stopped as stopped:
        return stopped.reason.name
    return "arrived"


@pytest.mark.distributed
def test_a_rank_whose_data_do_not_come_keeps_none_from_stopping():
    assert run_world(stopped_while_waiting, 2, timeout_s=60) == [StopReason.SIGNAL.name] * 2


# -------------------------------------------------------------------------------------------------------------- runs


def told_in(config: RunConfig, where: str, rank: int, at: int) -> tuple[int, str]:
    """Pre-train; at the `at`-th call of the loop's function `where` this `rank` is sent a signal. Exit code, output."""
    from pmlm_dist.training import loop

    signals, calls = StopSignals(), 0
    function = getattr(loop, where)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and os.environ["RANK"] == str(rank):
            signals.request()
        return function(*args, **kwargs)

    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, where, counted)
        try:
            loop.pretrain(config, signals)
        except Stopped as stopped:
            return stopped.exit_code, printed.getvalue()
    return 0, printed.getvalue()


def steps_saved(config: RunConfig) -> list[int]:
    folder = config.run_dir / "checkpoints"
    return [int(path.name[5:]) for path in sorted(folder.glob("step-*")) if "tmp" not in path.name]


def learned(config: RunConfig) -> dict[int, dict[str, float]]:
    return {
        step: {name: value for name, value in scalars.items() if name.startswith("train/")}
        for step, scalars in read_metrics(config.run_dir).items()
    }


@pytest.fixture(scope="module")
def straight(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 4 steps on two ranks, with dropout, that nobody stops."""
    config = run_config(small_corpus, tmp_path_factory.mktemp("straight"), steps=4, micro_batch=2)
    config = replace(config, model=replace(config.model, hidden_dropout=0.1, attention_dropout=0.1))
    assert [code for code, _ in run_world(told_in, 2, config, "train_step", 0, 0)] == [0, 0]
    return config


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("where", "at", "saved"),
    [("find_checkpoint", 1, []), ("build_engine", 1, []), ("train_step", 2, [2]), ("_validate", 1, [2])],
)
@pytest.mark.fault("F81")
def test_a_run_that_was_told_to_stop_goes_on_as_if_nothing_had_been(
    straight: RunConfig, tmp_path: Path, where: str, at: int, saved: list[int]
):
    config = with_train(replace(straight, run_dir=tmp_path / "run"), validate_every=2)
    answers = run_world(told_in, 2, config, where, 1, at)
    assert [code for code, _ in answers] == [EXIT_PREEMPTED] * 2
    assert steps_saved(config) == saved
    place = config.run_dir / "checkpoints" / "step-00000002" if saved else "the beginning"
    assert answers[0][1].splitlines()[-1] == f"stopped by a signal to stop; started again, it goes on from {place}"
    assert [code for code, _ in run_world(told_in, 2, config, where, 1, 0)] == [0, 0]
    assert learned(config) == learned(straight)
    assert (config.run_dir / "COMPLETE").exists()


@pytest.mark.distributed
def test_a_step_that_is_saved_already_is_not_saved_again(straight: RunConfig, tmp_path: Path):
    config = with_train(replace(straight, run_dir=tmp_path / "run"), checkpoint_every=2)
    assert run_world(told_in, 2, config, "train_step", 0, 2)[0][0] == EXIT_PREEMPTED
    (checkpoint,) = (config.run_dir / "checkpoints").glob("step-*")
    written = checkpoint.stat().st_mtime_ns
    code, printed = run_world(told_in, 2, config, "_announce", 0, 1)[0]  # again, before its first step
    assert code == EXIT_PREEMPTED
    assert "going on after step 2" in printed
    assert steps_saved(config) == [2]
    assert checkpoint.stat().st_mtime_ns == written


@pytest.mark.distributed
def test_the_last_validation_is_seen_through(straight: RunConfig, tmp_path: Path):
    config = replace(straight, run_dir=tmp_path / "run")
    assert [code for code, _ in run_world(told_in, 2, config, "_validate", 0, 1)] == [0, 0]
    assert "validation/total" in read_metrics(config.run_dir)[4]
    assert (config.run_dir / "COMPLETE").exists()


@pytest.mark.distributed
@pytest.mark.fault("F89")
def test_a_stop_file_saves_and_ends_and_holds_until_it_is_removed(straight: RunConfig, tmp_path: Path):
    config = replace(straight, run_dir=tmp_path / "run")
    code, printed = run_world(stopped_by_file_at, 2, config, 2)[0]
    assert code == 0
    assert "stopped by the file STOP" in printed
    assert steps_saved(config) == [2]
    code, printed = run_world(told_in, 2, config, "train_step", 0, 0)[0]
    assert code == 0
    assert "stopped by the file STOP" in printed
    assert not (config.run_dir / "COMPLETE").exists()
    (config.run_dir / STOP_FILE).unlink()
    run_world(told_in, 2, config, "train_step", 0, 0)
    assert (config.run_dir / "COMPLETE").exists()
    assert learned(config) == learned(straight)


def stopped_by_file_at(config: RunConfig, step: int) -> tuple[int, str]:
    """Pre-train; in step `step` somebody writes the file."""
    return interrupted(config, lambda calls: (config.run_dir / STOP_FILE).touch() if calls == step else None)


def interrupted(config: RunConfig, in_step: Callable[[int], None], **patches: Any) -> tuple[int, str]:
    """Pre-train, with `in_step(n)` called in the n-th step and some of the saver's functions replaced."""
    from pmlm_dist.checkpoint import async_save
    from pmlm_dist.training import loop

    step, calls = loop.train_step, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        in_step(calls)
        return step(*args, **kwargs)

    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", counted)
        for name, value in patches.items():
            patch.setattr(async_save, name, value)
        try:
            loop.pretrain(config, PENDING)
        except Stopped as stopped:
            return stopped.exit_code, printed.getvalue()
    return 0, printed.getvalue()


PENDING = StopSignals()
"""The signals of a rank's process; ranks are processes of their own."""


def stopped_with_a_disk_that_hangs(config: RunConfig) -> tuple[int, str, int]:
    """The checkpoint of step 1 is written, then the disk hangs; rank 1 is sent a signal in step 2."""
    from pmlm_dist.checkpoint import async_save

    write, writes = async_save.write_numbers, 0

    def hangs(*args: Any) -> Any:
        nonlocal writes
        writes += 1
        if writes > 1:
            time.sleep(60)
        return write(*args)

    def in_step(calls: int) -> None:
        if calls == 2 and os.environ["RANK"] == "1":
            PENDING.request()

    started = time.monotonic()
    code, printed = interrupted(config, in_step, write_numbers=hangs, _GRACE_S=0.0)
    return code, printed, int(time.monotonic() - started)


@pytest.mark.distributed
def test_when_a_save_cannot_end_in_time_the_checkpoint_before_stands(straight: RunConfig, tmp_path: Path):
    config = with_train(replace(straight, run_dir=tmp_path / "run"), checkpoint_every=1, grace_s=2.0)
    answers = run_world(stopped_with_a_disk_that_hangs, 2, config)
    assert [code for code, _, _ in answers] == [EXIT_PREEMPTED] * 2
    assert all(seconds < 40 for _, _, seconds in answers), "the save was waited for"
    assert "the checkpoint of step 2 was not written" in answers[0][1]
    assert answers[0][1].splitlines()[-1].endswith("step-00000001")
    assert steps_saved(config) == [1]
    assert [code for code, _ in run_world(told_in, 2, config, "train_step", 0, 0)] == [0, 0]
    assert learned(config) == learned(straight)
