"""Agreement of all ranks on a stop, also while they wait for data."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.worlds import run_world

from pmlm_dist.supervision.signals import EXIT_PREEMPTED, STOP_FILE, Stopped, StopSignals
from pmlm_dist.training.stopping import Prefetcher, Readiness, StopAgreement

if TYPE_CHECKING:
    from pmlm_dist.parallel.groups import Topology


def test_prefetcher_returns_items_in_order_and_by_count():
    prefetcher = Prefetcher(iter(range(6)), count=3)
    assert [prefetcher.take(), prefetcher.take()] == [[0, 1, 2], [3, 4, 5]]


def test_prefetcher_wait_is_interruptible():
    released = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        released.wait(20)
        yield 2

    prefetcher = Prefetcher(items(), count=2)
    assert prefetcher.readiness(within_s=0.01) is Readiness.MISSING
    prefetcher.close()  # does not wait for the thread
    released.set()
    assert prefetcher.take() == [1, 2]


def test_prefetcher_raises_the_error_of_the_iterator():
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    prefetcher = Prefetcher(items(), count=2)
    assert prefetcher.readiness(within_s=20) is Readiness.FAILED
    with pytest.raises(ValueError, match="damaged"):
        prefetcher.take()


def test_prefetcher_closes_its_iterator():
    closed = []

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    prefetcher = Prefetcher(items(), count=2)
    prefetcher.take()
    prefetcher.close()
    assert closed == [True]


def test_prefetcher_closed_during_a_fetch_closes_its_iterator_after_it():
    released, closed = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        try:
            released.wait(20)
            yield 1
        finally:
            closed.set()

    prefetcher = Prefetcher(items(), count=1)
    prefetcher.start()
    prefetcher.close()
    assert not closed.is_set()
    released.set()
    assert closed.wait(20)


# --------------------------------------------------------------------------------------------------------- agreement


@dataclass(frozen=True)
class Stop:
    """How a rank was stopped."""

    checks_passed: int
    exit_code: int
    is_requested: bool
    """Whether its `StopSignals` have a request."""


def stops(folder: Path) -> dict[str, Any]:
    """Stop two ranks by a signal to rank 1, by a file, while rank 1 waits for data, and by an agreement begun before.

    Then let the ranks wait for their data, of which rank 1's were in each state when the agreement was begun.
    """
    from pmlm_dist.parallel import groups

    topology = groups.init_process_groups()
    return {
        "signal": _stop_before_third_check(topology, folder / "none", by_file=False),
        "file": _stop_before_third_check(topology, folder / STOP_FILE, by_file=True),
        "waiting": _stop_while_waiting(topology),
        "begun": _stop_at_begun_agreement(topology, signal_before=True),
        "too late": _stop_at_begun_agreement(topology, signal_before=False),
        "data": _wait_after(topology, begun=Readiness.READY),
        "data missing": _wait_after(topology, begun=Readiness.MISSING),
        "data failed": _wait_after(topology, begun=Readiness.FAILED),
    }


def _stop_before_third_check(topology: Topology, file: Path, *, by_file: bool) -> Stop:
    signals, passed = StopSignals(), 0
    stop = StopAgreement(signals, file=file, topology=topology)
    try:
        for number in range(3):
            if number == 2 and by_file:
                topology.barrier()
                file.touch()
                topology.barrier()
            elif number == 2 and topology.rank == 1:
                signals.request()
            stop.check()
            passed += 1
    except Stopped as stopped:
        return Stop(passed, stopped.exit_code, signals.requested)
    return Stop(passed, -1, signals.requested)


def _stop_at_begun_agreement(topology: Topology, *, signal_before: bool) -> Stop:
    """Rank 1 receives a signal right before, or right after, it begins the agreement of the second step."""
    signals, passed = StopSignals(), 0
    stop = StopAgreement(signals, file=Path("/nowhere"), topology=topology)
    try:
        for step in range(4):
            stop.check_begun()
            passed += 1
            if step == 1 and topology.rank == 1 and signal_before:
                signals.request()
            stop.begin()
            if step == 1 and topology.rank == 1:
                signals.request()
    except Stopped as stopped:
        return Stop(passed, stopped.exit_code, signals.requested)
    return Stop(passed, -1, signals.requested)


def _wait_after(topology: Topology, *, begun: Readiness) -> tuple[bool, int]:
    """Result of `wait_for`, and the agreements that it starts, if the data of rank 1 were in state `begun`."""
    from pmlm_dist.parallel.groups import Topology

    stop = StopAgreement(StopSignals(), file=Path("/nowhere"), topology=topology)
    stop.begin(begun if topology.rank == 1 else Readiness.READY)
    start_all_reduce_max, calls = Topology.start_all_reduce_max, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Topology, "start_all_reduce_max", lambda *args: (calls.append(args), start_all_reduce_max(*args))[1]
        )
        return stop.wait_for(Prefetcher(iter([1]), count=1)), len(calls)


def _stop_while_waiting(topology: Topology) -> Stop:
    signals, never = StopSignals(), threading.Event()

    def items() -> Iterator[int]:
        if topology.rank == 1:
            never.wait()
        yield 1

    stop = StopAgreement(signals, file=Path("/nowhere"), topology=topology)
    if topology.rank == 0:
        threading.Timer(0.3, signals.request).start()
    try:
        stop.wait_for(Prefetcher(items(), count=1))
    except Stopped as stopped:
        return Stop(0, stopped.exit_code, signals.requested)
    finally:
        never.set()
    return Stop(1, -1, signals.requested)


@pytest.fixture(scope="module")
def stops_of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_world(stops, 2, tmp_path_factory.mktemp("stops"))


@pytest.mark.distributed
def test_signal_to_one_rank_stops_all_at_the_same_check(stops_of_ranks: list[dict[str, Any]]):
    assert [rank["signal"] for rank in stops_of_ranks] == [Stop(2, EXIT_PREEMPTED, is_requested=True)] * 2


@pytest.mark.distributed
def test_stop_file_stops_all_without_a_restart(stops_of_ranks: list[dict[str, Any]]):
    assert [rank["file"] for rank in stops_of_ranks] == [Stop(2, 0, is_requested=False)] * 2


@pytest.mark.distributed
def test_rank_without_data_does_not_prevent_a_stop(stops_of_ranks: list[dict[str, Any]]):
    assert [rank["waiting"] for rank in stops_of_ranks] == [Stop(0, EXIT_PREEMPTED, is_requested=True)] * 2


@pytest.mark.distributed
def test_signal_before_an_agreement_is_begun_stops_all_at_the_next_step(stops_of_ranks: list[dict[str, Any]]):
    assert [rank["begun"] for rank in stops_of_ranks] == [Stop(2, EXIT_PREEMPTED, is_requested=True)] * 2


@pytest.mark.distributed
def test_signal_after_an_agreement_is_begun_stops_all_one_step_later(stops_of_ranks: list[dict[str, Any]]):
    assert [rank["too late"] for rank in stops_of_ranks] == [Stop(3, EXIT_PREEMPTED, is_requested=True)] * 2


@pytest.mark.distributed
def test_begun_agreement_is_the_only_one_unless_data_are_missing(stops_of_ranks: list[dict[str, Any]]):
    assert [rank["data"] for rank in stops_of_ranks] == [(True, 0)] * 2
    assert [rank["data missing"] for rank in stops_of_ranks] == [(True, 1)] * 2
    assert [rank["data failed"] for rank in stops_of_ranks] == [(False, 0)] * 2
