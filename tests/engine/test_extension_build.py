"""Build lock: processes compile one at a time, and a killed one blocks no other."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.engine.extension_build import build_lock

COMPILER = "(echo started > object; sleep 3; echo done >> object) &"
"""Continues to run after the process that started it is killed."""


def compile_until_killed(started: Connection, folder: Path) -> None:
    """Compile as torch does: with a lock file in the build folder until the end."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with build_lock():
        lock = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam" / "lock"
        lock.parent.mkdir()
        lock.touch()
        os.chdir(lock.parent)
        os.system(COMPILER)
        while not Path("object").exists():
            time.sleep(0.01)
        started.send(lock)
        time.sleep(60)


@pytest.mark.full
@pytest.mark.fault("F09")
def test_build_lock_removes_the_unfinished_build_of_a_killed_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    foreign = tmp_path / "cpu_adam" / "lock"  # of another program, which may be compiling
    foreign.parent.mkdir()
    foreign.touch()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=compile_until_killed, args=(sender, tmp_path))
    process.start()
    try:
        assert receiver.poll(60)
        lock = receiver.recv()
        assert lock.exists()
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with build_lock():
        assert Path(os.environ["TORCH_EXTENSIONS_DIR"]) == lock.parent.parent
        assert not lock.parent.exists()
        lock.parent.mkdir()
        time.sleep(4)  # the compiler ends
        assert list(lock.parent.iterdir()) == []
    assert foreign.exists()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)


def log_within_lock(folder: Path, number: int) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with build_lock():
        log = folder / "log"
        with log.open("a") as out:
            out.write(f"{number} begins\n")
        time.sleep(0.2)
        with log.open("a") as out:
            out.write(f"{number} ends\n")


def test_build_lock_serializes_processes(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=log_within_lock, args=(tmp_path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 6
    for start, end in zip(lines[::2], lines[1::2], strict=True):
        assert (start.split()[1], end.split()[1]) == ("begins", "ends")
        assert start.split()[0] == end.split()[0]


def test_build_lock_restores_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with build_lock():
        assert str(tmp_path) in os.environ["TORCH_EXTENSIONS_DIR"]
    assert "TORCH_EXTENSIONS_DIR" not in os.environ


def test_build_lock_in_an_unusable_folder_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set TORCH_EXTENSIONS_DIR to a folder on a local disk"), build_lock():
        pass
