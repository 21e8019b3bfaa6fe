"""Ranks that hang or are slow: detected, named and, if they hang, ended."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fault_jobs import (
    LIMIT_S,
    Fault,
    check_recovered,
    report_text,
    run_attempt,
    run_with_restarts,
    small_run,
    stop,
)

from pmlm_dist.config import RunConfig
from pmlm_dist.supervision.exit_codes import ExitCode

Record = Callable[[str, object], None]


@pytest.mark.fault("F03")
def test_stopped_rank_is_detected_named_and_ended(
    small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig, record_property: Record
):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = run_with_restarts(config, Fault(stop))
    assert first.codes == [ExitCode.HUNG] * 2, first.printed
    assert "furthest behind: rank 1\n" in first.printed
    assert "process stopped" in first.printed
    assert "in stop" in report_text(config, 1)
    assert "wait_for" in report_text(config, 0) or "all_reduce" in report_text(config, 0)
    assert "(1 failure)" in second.printed
    assert second.codes == [0, 0]
    record_property(
        "lost", f"{check_recovered(config, uninterrupted)} steps repeated, detected after {LIMIT_S:g} s (limit)"
    )


def hold_interpreter_lock() -> None:
    ctypes.PyDLL(None).sleep(1_000_000)


@pytest.mark.nightly
@pytest.mark.fault("F04")
def test_rank_holding_the_interpreter_lock_is_detected(small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = run_with_restarts(config, Fault(hold_interpreter_lock))
    assert first.codes == [ExitCode.HUNG] * 2, first.printed
    assert "furthest behind: rank 1\n" in first.printed
    assert "in hold_interpreter_lock" in report_text(config, 1)
    assert second.codes == [0, 0]
    check_recovered(config, uninterrupted)


def skip_one_collective() -> None:
    """Skip the next agreement of this rank: it gets its own values back."""
    import torch

    from pmlm_dist.parallel.groups import PendingMaxima, Topology

    start_all_reduce_max = Topology.start_all_reduce_max

    def skip(self: Topology, *values: int) -> PendingMaxima:
        Topology.start_all_reduce_max = start_all_reduce_max
        return PendingMaxima(torch.tensor(values), None)

    Topology.start_all_reduce_max = skip


@pytest.mark.fault("F06")
def test_skipped_collective_ends_the_run_before_a_save(small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = run_with_restarts(config, Fault(skip_one_collective, step=6))
    assert set(first.codes) <= {ExitCode.HUNG, ExitCode.FAILED}, first.printed
    assert "supervisor: rank 0: step" in first.printed
    assert "supervisor: rank 1: step" in first.printed
    assert second.codes == [0, 0]
    check_recovered(config, uninterrupted)


class Slow:
    """Extend every forward pass of this rank from now on."""

    def __call__(self) -> None:
        from pmlm_dist.training import pretraining

        forward_losses = pretraining.forward_losses

        def slowly(*args: Any) -> Any:
            time.sleep(0.3)
            return forward_losses(*args)

        pretraining.forward_losses = slowly


@pytest.mark.nightly
@pytest.mark.fault("F14")
def test_only_the_slow_rank_is_named(small_corpus: Path, tmp_path: Path, record_property: Record):
    config = small_run(small_corpus, tmp_path / "slow")
    ended = run_attempt(config, Fault(Slow(), step=1))
    assert ended.codes == [0, 0]
    warned = [line for line in ended.printed.splitlines() if "is slow" in line]
    assert len(warned) == 1
    assert "rank 1 is slow" in warned[0]
    record_property("lost", f"nothing; named at {warned[0].split(':')[1].strip()}")


@pytest.mark.nightly
@pytest.mark.fault("F14")
def test_no_straggler_is_named_in_200_even_steps(small_corpus: Path, tmp_path: Path):
    ended = run_attempt(small_run(small_corpus, tmp_path / "run", steps=200, every=100, log_every=5), within_s=120)
    assert ended.codes == [0, 0]
    assert "is slow" not in ended.printed


def never_ready() -> None:
    """Let this rank wait for its data forever, as for a hung disk."""
    from pmlm_dist.training.stopping import Prefetcher, Readiness

    def readiness(self: Any, *, within_s: float = 0.0) -> Readiness:
        time.sleep(within_s)
        return Readiness.MISSING

    Prefetcher.readiness = readiness


@pytest.mark.fault("F03")
def test_rank_that_waits_for_its_data_is_the_one_named(small_corpus: Path, tmp_path: Path):
    ended = run_attempt(small_run(small_corpus, tmp_path / "run"), Fault(never_ready))
    assert ended.codes == [ExitCode.HUNG] * 2, ended.printed
    assert f"supervisor: rank 1 made no progress for {LIMIT_S:g} s, in step 8 (data)" in ended.printed
    assert "rank 0 made no progress" not in ended.printed
