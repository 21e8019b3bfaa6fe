"""Loader workers that die, hang or fail raise WorkerError in time, with their position."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from support.numbered_corpus import SPECIAL, write_corpus

from pmlm_dist.config import DataConfig, MaskingConfig
from pmlm_dist.corpus.shards import TRAIN, VALIDATION
from pmlm_dist.data.loader import BatchSource, training_batches
from pmlm_dist.data.order import BatchShare
from pmlm_dist.data.stream import CorpusSource
from pmlm_dist.data.worker_pool import WorkerError, WorkerPool


@dataclass(frozen=True)
class Scripted:
    """A builder that returns the number of the item, except for one item with a fault."""

    number: int
    fault: str = "none"

    expected_errors = (LookupError,)

    def build(self, number: int, *, set_progress: Callable[[int], None]) -> object:
        set_progress(100 + number)
        if number == self.number:
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.fault == "exit":
                os._exit(3)
            elif self.fault == "hang":
                time.sleep(1000)
            elif self.fault == "expected":
                raise LookupError("not found")
            elif self.fault == "bug":
                raise ZeroDivisionError("oh")
        return number

    def describe(self, position: int) -> str:
        return f"sample {position} of shard x"


def items(builder, *, workers: int = 2, timeout_s: float = 60.0, numbers=None) -> WorkerPool:
    numbers = count() if numbers is None else numbers
    preload = "pmlm_dist.data.loader"
    return WorkerPool(builder, numbers, workers=workers, prefetch=2, timeout_s=timeout_s, preload=preload)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_items_are_in_order_and_finite(workers):
    assert list(items(Scripted(-1), workers=workers, numbers=range(17))) == list(range(17))
    assert list(items(Scripted(-1), workers=workers, numbers=range(1))) == [0]


@pytest.mark.parametrize(
    ("fault", "timeout_s", "message"),
    [
        ("killed", 60.0, r"worker 1 \(pid \d+\), at sample 103 of shard x, died by signal SIGKILL"),
        ("exit", 60.0, r"worker 1 \(pid \d+\), at sample 103 of shard x, died with exit code 3"),
        ("hang", 8.0, r"worker 1 \(pid \d+\), at sample 103 of shard x, sent nothing for 8 s"),
        ("bug", 60.0, r"worker 1 \(pid \d+\), at sample 103 of shard x, failed:\n(.*\n)*ZeroDivisionError: oh"),
    ],
)
@pytest.mark.fault("F56", "F57")
def test_failing_worker_raises_with_its_position(fault, timeout_s, message):
    loaded = items(Scripted(3, fault), timeout_s=timeout_s)
    try:
        with pytest.raises(WorkerError, match=message):
            assert [next(loaded) for _ in range(9)] == []
    finally:
        loaded.close()


def test_expected_errors_are_raised_unchanged():
    loaded = items(Scripted(3, "expected"))
    assert [next(loaded) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LookupError, match="not found"):
        next(loaded)
    loaded.close()


@dataclass(frozen=True)
class Large:
    """Items larger than the buffer of a pipe, so that a worker is usually in the middle of sending one."""

    expected_errors = ()

    def build(self, number: int, *, set_progress: Callable[[int], None]) -> np.ndarray:
        set_progress(os.getpid())
        return np.full(4_000_000, number, dtype=np.int64)

    def describe(self, position: int) -> str:
        return f"process {position}"


@pytest.mark.fault("F57")
def test_worker_stopped_while_sending_times_out():
    loaded = items(Large(), workers=1, timeout_s=2.0)
    next(loaded)
    time.sleep(0.5)  # until it sends the next one
    (worker,) = loaded._workers
    os.kill(worker.process.pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match="sent nothing for 2 s"):
        [next(loaded) for _ in range(4)]
    loaded.close()
    assert not worker.process.is_alive()


def test_stop_signals_are_ignored_by_workers():
    loaded = items(Scripted(-1), workers=1)
    assert next(loaded) == 0
    (worker,) = loaded._workers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker.process.pid, number)
    assert [next(loaded) for _ in range(20)] == list(range(1, 21))
    loaded.close()


def test_killed_loader_worker_raises_with_shard_and_sample(tmp_path: Path):
    folder = write_corpus(tmp_path, {TRAIN: (8, 8, 8, 8), VALIDATION: (1,)})
    source = BatchSource(CorpusSource(folder), SPECIAL, MaskingConfig(), seed=0)
    batches = training_batches(source, lanes=4, share=BatchShare(8, 4), loading=DataConfig(workers=1, prefetch=1))
    next(batches)
    os.kill(batches._arrays._workers[0].process.pid, signal.SIGKILL)
    with pytest.raises(
        WorkerError, match=rf"global sample \d+ \(sample \d+ of {folder}, shard train/shard-00000\d\.tar"
    ):
        [next(batches) for _ in range(5)]


@pytest.mark.fault("F65")
def test_worker_with_a_pipe_instead_of_a_shard_does_not_hang(tmp_path: Path):
    folder = write_corpus(tmp_path, {TRAIN: (8, 8), VALIDATION: (1,)})
    for shard in (folder / "train").iterdir():
        shard.unlink()
        os.mkfifo(shard)
    source = BatchSource(CorpusSource(folder), SPECIAL, MaskingConfig(), seed=0)
    batches = training_batches(
        source, lanes=2, share=BatchShare(8, 4), loading=DataConfig(workers=1, retries=1, retry_wait_s=0.0)
    )
    with pytest.raises(ValueError, match="is not a file"):
        next(batches)
