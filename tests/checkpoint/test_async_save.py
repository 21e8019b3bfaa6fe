"""Asynchronous saving: training continues during a save, and the checkpoint is that of the saved step."""

import itertools
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.saving_runs import SavingRun, check_equal, patched
from support.small_runs import run_config, with_train
from support.worlds import run_world

from pmlm_dist.checkpoint import async_save
from pmlm_dist.checkpoint.files import KINDS, CheckpointReader
from pmlm_dist.config import RunConfig

pytestmark = pytest.mark.distributed


def step_during_a_write(config: RunConfig) -> tuple[list[str], list[str], list[str]]:
    """Save after step 2 and take 3 steps while the thread is blocked; then release it."""
    saving, released = SavingRun(config), threading.Event()
    saving.take_steps(2)
    with patched("write_numbers", lambda write, *args: (released.wait(60), write(*args))[1]):
        saving.save()
        saving.take_steps(3)
        during = saving.names()
        released.set()
        saving.checkpointer.close()
    return during, saving.names(), saving.log.lines


@pytest.mark.parametrize(
    ("ranks", "settings"), [(1, {"zero": 0, "micro_batch": 8}), (2, {"zero": 3}), (2, {"zero": 2})]
)
def test_training_continues_while_a_checkpoint_is_written(
    small_corpus: Path, tmp_path: Path, ranks: int, settings: dict[str, Any]
):
    config = run_config(small_corpus, tmp_path / "run", steps=9, **settings)
    (during, after, logged), *_ = run_world(step_during_a_write, ranks, config)
    assert [name for name in during if ".tmp" not in name] == []
    assert after == ["latest", "step-00000002"]
    assert logged == [f"checkpoint: {tmp_path / 'run/checkpoints/step-00000002'}"]
    uninterrupted = replace(config, run_dir=tmp_path / "uninterrupted")
    run_world(save_at, ranks, uninterrupted, 2)
    check_equal(uninterrupted.run_dir / "checkpoints/step-00000002", config.run_dir / "checkpoints/step-00000002")


def save_at(config: RunConfig, step: int) -> None:
    saving = SavingRun(config)
    saving.take_steps(step)
    saving.save()
    saving.checkpointer.close()


def save_by_few_writers(config: RunConfig, writers: int) -> list[str]:
    """Save after step 2, replicated values by `writers` ranks at most; return the files."""
    from pmlm_dist.checkpoint import fragments

    fragments.MAX_WRITERS = writers
    save_at(config, 2)
    return sorted(path.name for path in (config.run_dir / "checkpoints/step-00000002").glob("rank-*"))


@pytest.mark.parametrize(("ranks", "settings"), [(2, {"tp": 2}), (4, {"zero": 0})], ids=["tp2", "dp4"])
def test_checkpoint_by_few_writers_holds_what_that_of_all_ranks_holds(
    small_corpus: Path, tmp_path: Path, ranks: int, settings: dict[str, Any]
):
    config = run_config(small_corpus, tmp_path / "all", steps=9, micro_batch=2, **settings)
    few = replace(config, run_dir=tmp_path / "few")
    assert len(run_world(save_by_few_writers, ranks, config, 32)[0]) == ranks
    files = run_world(save_by_few_writers, ranks, few, 1)[0]
    assert len(files) == (1 if settings.get("zero") == 0 else ranks)
    with (
        CheckpointReader(config.run_dir / "checkpoints/step-00000002") as expected,
        CheckpointReader(few.run_dir / "checkpoints/step-00000002") as found,
    ):
        assert found.tensors.keys() == expected.tensors.keys()
        for whole, kind in itertools.product(expected.tensors.values(), KINDS):
            assert np.array_equal(found.read(whole, kind), expected.read(whole, kind))


def step_during_a_copy(config: RunConfig) -> float:
    """Save after step 2 with a copy that starts late, and take two more steps; return the seconds stalled."""
    saving = SavingRun(config)
    saving.take_steps(2)
    before = saving.checkpointer.stalled_s
    take = async_save.StagingBuffer.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_save.StagingBuffer, "take", lambda *args: (time.sleep(0.5), take(*args)))
        saving.save()
        saving.take_steps(2)
        saving.checkpointer.close()
    return saving.checkpointer.stalled_s - before


@pytest.mark.parametrize("settings", [{"zero": 0}, {"zero": 1}, {"zero": 3}, {"zero": 1, "precision": "bf16"}])
def test_weights_do_not_change_before_they_are_copied(small_corpus: Path, tmp_path: Path, settings: dict[str, Any]):
    """A step takes a few milliseconds here: without the wait, the copy would be of a later step."""
    config = run_config(small_corpus, tmp_path / "run", steps=9, micro_batch=8, **settings)
    uninterrupted = replace(config, run_dir=tmp_path / "uninterrupted")
    (stalled_s,) = run_world(step_during_a_copy, 1, config)
    assert stalled_s > 0
    run_world(save_at, 1, uninterrupted, 2)
    check_equal(uninterrupted.run_dir / "checkpoints/step-00000002", config.run_dir / "checkpoints/step-00000002")


def save_to_slow_storage(config: RunConfig) -> list[str]:
    """The disk of rank 1 takes longer than the time limit of a collective."""
    saving = SavingRun(config)
    saving.take_steps(1)
    seconds = 5.0 if saving.rank == 1 else 0.0
    with patched("write_numbers", lambda write, *args: (time.sleep(seconds), write(*args))[1]):
        saving.save()
        saving.take_steps(1)
        saving.save()  # waits for the first
        saving.checkpointer.close()
    return saving.names()


@pytest.mark.fault("F30")
@pytest.mark.full
def test_disk_slower_than_the_collective_timeout_does_not_end_the_run(small_corpus: Path, tmp_path: Path):
    config = with_train(run_config(small_corpus, tmp_path, steps=9), collective_timeout_s=3)
    assert run_world(save_to_slow_storage, 2, config)[0] == ["latest", "step-00000001", "step-00000002"]
