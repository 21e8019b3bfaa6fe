"""Faults of the host: ports, stale locks, clock, terminal, shared memory."""

import ctypes
import json
import os
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.fault_jobs import Fault, check_recovered, children_of, run_attempt, running_job, slow_steps, small_run

from pmlm_dist.config import RunConfig
from pmlm_dist.supervision.attempts import effective_time, read_attempts
from pmlm_dist.supervision.exit_codes import ExitCode

_CLONE_NEWNS = 0x00020000


@pytest.mark.fault("F12")
def test_occupied_port_is_reported_at_once(small_corpus: Path, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running_job(small_run(small_corpus, tmp_path / "run"), MASTER_PORT=str(port)) as job:
            job.processes[0].join(timeout=30)
            assert job.processes[0].exitcode == ExitCode.FAILED, job.printed
            assert f"port: {port}" in job.printed
            assert "EADDRINUSE" in job.printed


@pytest.mark.fault("F08")
def test_stale_compiler_lock_does_not_block_a_run(small_corpus: Path, tmp_path: Path):
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    config = small_run(small_corpus, tmp_path / "run", steps=4)
    ended = run_attempt(config, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert ended.codes == [0, 0], ended.printed
    assert sorted(path.name for path in lock.parent.parent.rglob("*")) == ["deepspeed_shm_comm", "lock"]


def jump() -> None:
    """Set the clock of this process one hour ahead."""
    real = time.time
    time.time = lambda: real() + 3600


@pytest.mark.nightly
@pytest.mark.fault("F90")
def test_clock_jump_changes_no_timeout(small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    start_time = time.time()
    ended = run_attempt(config, Fault(jump, rank=0), Fault(jump, rank=1))
    total_s = time.time() - start_time
    assert ended.codes == [0, 0], ended.printed
    check_recovered(config, uninterrupted)
    assert effective_time(read_attempts(config.run_dir)).total_s < total_s


class FullTerminal:
    """Redirect the output of this process to a full device."""

    def __call__(self) -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.close(full)


@pytest.mark.nightly
@pytest.mark.fault("F88")
def test_closed_terminal_does_not_end_the_training(small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    ended = run_attempt(config, Fault(FullTerminal(), rank=0))
    assert ended.codes == [0, 0], ended.printed
    assert "complete: step 20" not in ended.printed
    check_recovered(config, uninterrupted)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("log/lost_lines", 0) for line in lines) > 5


class OwnSharedMemory:
    """Give this process and its descendants a /dev/shm of their own, of one megabyte."""

    def __call__(self) -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare")
        for command in ("--make-rprivate /", "-t tmpfs -o size=1m tmpfs /dev/shm"):
            subprocess.run(["mount", *command.split()], check=True)


def fill_shared_memory() -> None:
    """Fill /dev/shm to the last byte; existing files keep their pages."""
    with open("/dev/shm/filler", "wb", buffering=0) as filler:
        while os.statvfs("/dev/shm").f_bfree:
            filler.write(b"\0" * 4096)


def mount_namespaces(pid: int) -> set[str]:
    """Return the mount namespaces of a process and its descendants."""
    below = [mount_namespaces(child) for child in children_of(pid)]
    return {os.readlink(f"/proc/{pid}/ns/mnt")}.union(*below)


@pytest.mark.fault("F58")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a /dev/shm of its own")
@pytest.mark.parametrize("step", [0, 7], ids=["from the start", "amid the run"])
def test_loader_processes_need_no_shared_memory(
    small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig, step: int
):
    """Batches are sent through pipes and gradients through sockets, so that no bus error can occur."""
    config = small_run(small_corpus, tmp_path / "run")
    config = replace(config, data=replace(config.data, workers=2))
    own = [Fault(OwnSharedMemory(), rank=rank, step=-1) for rank in range(2)]
    full = [Fault(fill_shared_memory, rank=rank, step=step) for rank in range(2)]
    with running_job(config, *own, *full, *slow_steps(0.1)) as job:
        job.wait_for_print("step  8/20")
        namespaces = [mount_namespaces(rank) for rank in job.rank_processes().values()]
        assert job.wait() == [0, 0], job.printed
    assert [len(namespace) for namespace in namespaces] == [1, 1], "a loader process sees another /dev/shm"
    assert os.readlink("/proc/self/ns/mnt") not in set.union(*namespaces)
    check_recovered(config, uninterrupted)
