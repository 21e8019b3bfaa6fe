"""Preempted runs: one checkpoint in time, or none, and a bit-exact resume."""

import contextlib
import io
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import run_config, with_train
from support.worlds import run_world

from pmlm_dist.config import RunConfig
from pmlm_dist.metrics.run_log import read_metrics
from pmlm_dist.supervision.signals import EXIT_PREEMPTED, STOP_FILE, Stopped, StopSignals


def pretrain_signalled(config: RunConfig, where: str, rank: int, at: int) -> tuple[int, str]:
    """Pre-train; `rank` receives a signal at call number `at` of the function `where`. Exit code, output."""
    from pmlm_dist.training import attempt, loop, pretraining
    from pmlm_dist.training.run import pretrain

    signals, calls = StopSignals(), 0
    places = {"find_checkpoint": attempt, "train_step": loop, "_log_start": pretraining.PretrainJob}
    place = places.get(where, pretraining)
    function = getattr(place, where)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and os.environ["RANK"] == str(rank):
            signals.request()
        return function(*args, **kwargs)

    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, where, counted)
        try:
            pretrain(config, signals)
        except Stopped as stopped:
            return stopped.exit_code, printed.getvalue()
    return 0, printed.getvalue()


def steps_saved(config: RunConfig) -> list[int]:
    folder = config.run_dir / "checkpoints"
    return [int(path.name[5:]) for path in sorted(folder.glob("step-*")) if "tmp" not in path.name]


def train_scalars(config: RunConfig) -> dict[int, dict[str, float]]:
    return {
        step: {name: value for name, value in scalars.items() if name.startswith("train/")}
        for step, scalars in read_metrics(config.run_dir).items()
    }


@pytest.fixture(scope="module")
def uninterrupted(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """An uninterrupted run of 4 steps on two ranks, with dropout."""
    config = run_config(small_corpus, tmp_path_factory.mktemp("uninterrupted"), steps=4, micro_batch=2)
    config = replace(config, model=replace(config.model, hidden_dropout=0.1, attention_dropout=0.1))
    assert [code for code, _ in run_world(pretrain_signalled, 2, config, "train_step", 0, 0)] == [0, 0]
    return config


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("where", "at", "saved"),
    [("find_checkpoint", 1, []), ("build_engine", 1, []), ("train_step", 2, [2]), ("validate", 1, [2])],
)
@pytest.mark.fault("F81")
def test_resume_after_a_signal_is_bit_exact(
    uninterrupted: RunConfig, tmp_path: Path, where: str, at: int, saved: list[int]
):
    config = with_train(replace(uninterrupted, run_dir=tmp_path / "run"), validate_every=2)
    answers = run_world(pretrain_signalled, 2, config, where, 1, at)
    assert [code for code, _ in answers] == [EXIT_PREEMPTED] * 2
    assert steps_saved(config) == saved
    place = config.run_dir / "checkpoints" / "step-00000002" if saved else "the first step"
    assert answers[0][1].splitlines()[-1] == f"stopped by a signal to stop; a restart resumes from {place}"
    assert [code for code, _ in run_world(pretrain_signalled, 2, config, where, 1, 0)] == [0, 0]
    assert train_scalars(config) == train_scalars(uninterrupted)
    assert (config.run_dir / "COMPLETE").exists()


@pytest.mark.distributed
def test_stop_does_not_save_a_saved_step_again(uninterrupted: RunConfig, tmp_path: Path):
    config = with_train(replace(uninterrupted, run_dir=tmp_path / "run"), checkpoint_every=2)
    assert run_world(pretrain_signalled, 2, config, "train_step", 0, 2)[0][0] == EXIT_PREEMPTED
    (checkpoint,) = (config.run_dir / "checkpoints").glob("step-*")
    written = checkpoint.stat().st_mtime_ns
    # A signal before the first step of the next attempt.
    code, printed = run_world(pretrain_signalled, 2, config, "_log_start", 0, 1)[0]
    assert code == EXIT_PREEMPTED
    assert "resuming after step 2" in printed
    assert steps_saved(config) == [2]
    assert checkpoint.stat().st_mtime_ns == written


@pytest.mark.distributed
def test_signal_does_not_stop_the_last_validation(uninterrupted: RunConfig, tmp_path: Path):
    config = replace(uninterrupted, run_dir=tmp_path / "run")
    assert [code for code, _ in run_world(pretrain_signalled, 2, config, "validate", 0, 1)] == [0, 0]
    assert "validation/total" in read_metrics(config.run_dir)[4]
    assert (config.run_dir / "COMPLETE").exists()


@pytest.mark.distributed
@pytest.mark.fault("F89")
def test_stop_file_saves_and_stops_until_it_is_removed(uninterrupted: RunConfig, tmp_path: Path):
    config = replace(uninterrupted, run_dir=tmp_path / "run")
    code, printed = run_world(pretrain_stopped_by_file, 2, config, 2)[0]
    assert code == 0
    assert "stopped by the file STOP" in printed
    assert steps_saved(config) == [2]
    code, printed = run_world(pretrain_signalled, 2, config, "train_step", 0, 0)[0]
    assert code == 0
    assert "stopped by the file STOP" in printed
    assert not (config.run_dir / "COMPLETE").exists()
    (config.run_dir / STOP_FILE).unlink()
    run_world(pretrain_signalled, 2, config, "train_step", 0, 0)
    assert (config.run_dir / "COMPLETE").exists()
    assert train_scalars(config) == train_scalars(uninterrupted)


def agreements_of_run(config: RunConfig, are_begun: bool) -> list[tuple[int, bool]]:
    """Pre-train; return (step, read at once) of every agreement. Not `are_begun`: in every step all wait for one."""
    from pmlm_dist.metrics.meter import Meter
    from pmlm_dist.parallel.groups import PendingMaxima, Topology
    from pmlm_dist.training.run import pretrain
    from pmlm_dist.training.stopping import StopAgreement

    start, wait, start_step = Topology.start_all_reduce_max, PendingMaxima.wait, Meter.start_step
    step, started, agreements = 0, {}, []

    def start_recorded(*args: Any) -> PendingMaxima:
        pending = start(*args)
        started[id(pending)] = pending, step
        return pending

    def wait_recorded(pending: PendingMaxima) -> list[int]:
        agreements.append((step, started[id(pending)][1] == step))
        return wait(pending)

    def start_step_recorded(meter: Meter, number: int) -> None:
        nonlocal step
        step = number
        start_step(meter, number)

    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Topology, "start_all_reduce_max", start_recorded)
        patch.setattr(PendingMaxima, "wait", wait_recorded)
        patch.setattr(Meter, "start_step", start_step_recorded)
        if not are_begun:
            patch.setattr(StopAgreement, "begin", lambda *_: None)
        pretrain(config)
    return agreements


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_agreements_begun_a_step_ahead_give_the_run_of_agreements_waited_for(
    uninterrupted: RunConfig, tmp_path: Path, ranks: int
):
    reference, config = (with_train(replace(uninterrupted, run_dir=tmp_path / name), steps=5) for name in ("r", "run"))
    waited_for = run_world(agreements_of_run, ranks, reference, False)[0]
    begun = run_world(agreements_of_run, ranks, config, True)[0]
    assert {step for step, at_once in waited_for if at_once} >= set(range(1, 6))
    assert {step for step, at_once in begun if not at_once} == set(range(2, 6))
    assert train_scalars(config) == train_scalars(reference)


def pretrain_stopped_by_file(config: RunConfig, step: int) -> tuple[int, str]:
    """Pre-train; the file is written in step `step`."""
    return pretrain_with(config, lambda calls: (config.run_dir / STOP_FILE).touch() if calls == step else None)


def pretrain_with(config: RunConfig, in_step: Callable[[int], None], **patches: Any) -> tuple[int, str]:
    """Pre-train, with `in_step(n)` called in the n-th step and some functions of `async_save` replaced."""
    from pmlm_dist.checkpoint import async_save
    from pmlm_dist.training import loop
    from pmlm_dist.training.run import pretrain

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
            pretrain(config, SIGNALS)
        except Stopped as stopped:
            return stopped.exit_code, printed.getvalue()
    return 0, printed.getvalue()


SIGNALS = StopSignals()
"""Stop signals of this process: every rank has its own."""


def pretrain_with_hanging_disk(config: RunConfig) -> tuple[int, str]:
    """The checkpoint of step 1 is written, then the disk hangs; rank 1 receives a signal in step 2."""
    from pmlm_dist.checkpoint import async_save

    write, writes = async_save.write_numbers, 0

    def hangs(*args: Any) -> Any:
        nonlocal writes
        writes += 1
        if writes > 1:
            threading.Event().wait()
        return write(*args)

    def in_step(calls: int) -> None:
        if calls == 2 and os.environ["RANK"] == "1":
            SIGNALS.request()

    return pretrain_with(config, in_step, write_numbers=hangs, _GRACE_S=0.0)


@pytest.mark.distributed
def test_save_past_the_grace_period_leaves_the_checkpoint_before(uninterrupted: RunConfig, tmp_path: Path):
    config = with_train(replace(uninterrupted, run_dir=tmp_path / "run"), checkpoint_every=1, grace_s=2.0)
    answers = run_world(pretrain_with_hanging_disk, 2, config)  # raises TimeoutError if a rank waits for the save
    assert [code for code, _ in answers] == [EXIT_PREEMPTED] * 2
    assert "the checkpoint of step 2 was not written" in answers[0][1]
    assert answers[0][1].splitlines()[-1].endswith("step-00000001")
    assert steps_saved(config) == [1]
    assert [code for code, _ in run_world(pretrain_signalled, 2, config, "train_step", 0, 0)] == [0, 0]
    assert train_scalars(config) == train_scalars(uninterrupted)
