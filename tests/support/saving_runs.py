"""Runs of one world that save in the background, for tests of asynchronous checkpoints."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pmlm_dist.checkpoint import async_save
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import RunConfig
from support.small_runs import start_run, take_steps


class RecordingLog:
    """A log that keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failures: list[int] = []

    def info(self, text: str) -> None:
        self.lines.append(text)

    def scalars(self, scalars: dict[str, int], *, step: int) -> None:
        self.failures.append(scalars["checkpoint/failed"])


class SavingRun:
    """A run on this rank that saves on request."""

    def __init__(self, config: RunConfig, *, timeout_s: float = 60):
        from pmlm_dist.checkpoint.engine_state import EngineState
        from pmlm_dist.training.pretraining import build_engine

        self.run = start_run(config)
        self.engine = build_engine(self.run)
        self.state, self.log = RunState(), RecordingLog()
        self.folder = CheckpointFolder(self.run.checkpoints, keep=9)
        log: Any = self.log
        metadata = {"identity": self.run.identity(), "configuration": self.run.configuration()}
        engine_state = EngineState(self.engine, self.run.topology)
        self.checkpointer = async_save.AsyncCheckpointer(
            engine_state, self.folder, log, metadata=metadata, timeout_s=timeout_s
        )

    @property
    def rank(self) -> int:
        """This rank."""
        return self.run.topology.rank

    def take_steps(self, count: int) -> None:
        """Take `count` optimizer steps."""
        for _ in range(count):
            self.state, _, _ = take_steps(self.run, self.engine, self.state, steps=1)
            self.checkpointer.log_finished()

    def save(self) -> None:
        """Start a save of the current step."""
        self.checkpointer.save(self.state)

    def join_thread(self) -> None:
        """Wait for the thread of the last save, on all ranks, without the checkpointer's own wait."""
        writer = self.checkpointer._writer
        assert writer is not None
        writer.join(60)
        self.run.topology.barrier()
        self.checkpointer.log_finished()

    def names(self) -> list[str]:
        """Names in the folder of checkpoints, once all ranks are here."""
        self.run.topology.barrier()
        return sorted(path.name for path in self.run.checkpoints.iterdir())


@contextlib.contextmanager
def patched(name: str, change: Callable[..., Any]) -> Iterator[None]:
    """Within the block, replace a function of `async_save` by `change(function, *args, **kwargs)`."""
    function = getattr(async_save, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_save, name, lambda *args, **kwargs: change(function, *args, **kwargs))
        yield


def tensors_in(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint by file and name."""
    return {
        f"{file.name}/{name}": value
        for file in sorted(path.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def check_equal(first: Path, second: Path) -> None:
    """Check that two checkpoints hold the same tensors in the same files, bit for bit."""
    expected, found = tensors_in(first), tensors_in(second)
    assert expected.keys() == found.keys()
    assert len(expected) > 60
    assert all(np.array_equal(value, found[name]) for name, value in expected.items())


def printed_by_pretrain(config: RunConfig) -> str:
    """Pre-train on this rank; return what it printed."""
    from pmlm_dist.training.run import pretrain

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pretrain(config)
    return printed.getvalue()
