"""Compiling in turn: a process that is killed while it compiles keeps nobody waiting."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.engine.extension_build import build_lock

COMPILER = "(echo begun > object; sleep 3; echo ended >> object) &"
"""What goes on when the process that started it is killed."""


def killed_while_it_compiles(begun: Connection, folder: Path) -> None:
    """What torch does: a lock file beside what is compiled, for as long as it takes."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with build_lock():
        lock = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam" / "lock"
        lock.parent.mkdir()
        lock.touch()
        os.chdir(lock.parent)
        os.system(COMPILER)
        while not Path("object").exists():
            time.sleep(0.01)
        begun.send(lock)
        time.sleep(60)


@pytest.mark.fault("F09")
def test_who_was_killed_while_it_compiled_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    foreign = tmp_path / "cpu_adam" / "lock"  # of another program, which may be at work
    foreign.parent.mkdir()
    foreign.touch()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=killed_while_it_compiles, args=(sender, tmp_path))
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


def counted_in_turn(folder: Path, number: int) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with build_lock():
        log = folder / "log"
        with log.open("a") as out:
            out.write(f"{number} begins\n")
        time.sleep(0.2)
        with log.open("a") as out:
            out.write(f"{number} ends\n")


def test_processes_of_a_machine_take_turns(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=counted_in_turn, args=(tmp_path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 6
    for begun, ended in zip(lines[::2], lines[1::2], strict=True):
        assert (begun.split()[1], ended.split()[1]) == ("begins", "ends")
        assert begun.split()[0] == ended.split()[0]


def test_the_variable_is_not_left_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with build_lock():
        assert str(tmp_path) in os.environ["TORCH_EXTENSIONS_DIR"]
    assert "TORCH_EXTENSIONS_DIR" not in os.environ


def test_a_place_that_cannot_be_had_is_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set TORCH_EXTENSIONS_DIR to a folder on a local disk"), build_lock():
        pass
