"""Spikes of the loss, replicas, and runs without any fault."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.fault_jobs import (
    Fault,
    check_recovered,
    run_attempt,
    running_job,
    slow_steps,
    small_run,
    trajectory,
    uninterrupted_run,
)
from support.small_runs import with_train

from pmlm_dist.config import RunConfig
from pmlm_dist.supervision.signals import STOP_FILE

Record = Callable[[str, object], None]


class LearningRateSpike:
    """Multiply the learning rate by 100 for three steps."""

    def __init__(self, first: int):
        self.steps = range(first, first + 3)

    def __call__(self) -> None:
        from pmlm_dist.training import step

        rate = step.learning_rate
        step.learning_rate = lambda number, **about: rate(number, **about) * (100 if number in self.steps else 1)


@pytest.mark.nightly
@pytest.mark.fault("F74")
def test_run_book_recovers_from_a_loss_spike(
    small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig, record_property: Record
):
    """The program rolls nothing back and skips no batch; the test follows docs/operations.md."""
    config = with_train(small_run(small_corpus, tmp_path / "run"), keep_checkpoints=9)
    spike = [Fault(LearningRateSpike(7), rank=rank, step=1) for rank in range(2)]
    with running_job(config, *spike, *slow_steps(0.3)) as job:
        job.wait_for_print("step 11/20")
        (config.run_dir / STOP_FILE).touch()
        assert job.wait() == [0, 0], job.printed
    spiked, smooth = trajectory(config).scalars, trajectory(uninterrupted).scalars
    assert [step for step in range(1, 8) if spiked[step]["train/total"] != smooth[step]["train/total"]] == []
    worst = max(spiked[step]["train/total"] / smooth[step]["train/total"] for step in range(8, 12))
    assert worst > 1.2, worst
    (config.run_dir / STOP_FILE).unlink()
    aside = config.run_dir / "aside"
    aside.mkdir()
    for checkpoint in (config.run_dir / "checkpoints").glob("step-*"):
        if int(checkpoint.name[5:]) > 6:
            checkpoint.rename(aside / checkpoint.name)
    assert list(aside.iterdir())
    ended = run_attempt(config)
    assert ended.codes == [0, 0], ended.printed
    assert "resuming after step 5;" in ended.printed
    repeated = check_recovered(config, uninterrupted)
    record_property(
        "lost",
        f"the spike raised the loss to {worst:.1f} times; equal to the uninterrupted run after {repeated} "
        "repeated steps",
    )


@pytest.mark.fault("F78")
def test_two_runs_are_identical(small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig):
    assert trajectory(uninterrupted_run(small_corpus, tmp_path / "run")) == trajectory(uninterrupted)


@pytest.mark.nightly
@pytest.mark.fault("F77")
def test_bf16_tensor_parallel_replicas_stay_equal_over_200_steps(small_corpus: Path, tmp_path: Path):
    """They are compared bit for bit before and after every step; a difference ends the run."""
    config = small_run(small_corpus, tmp_path / "run", steps=200, every=200, tp=2, precision="bf16")
    ended = run_attempt(replace(config, train=replace(config.train, guard_every=1)), within_s=120)
    assert ended.codes == [0, 0], ended.printed
