"""Agreement of all ranks on a stop, also while they wait for data."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.worlds import run_world

from pmlm_dist.supervision.signals import EXIT_PREEMPTED, STOP_FILE, Stopped, StopSignals
from pmlm_dist.training.stopping import Prefetcher, StopAgreement

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
    assert not prefetcher.is_ready(within_s=0.01)
    prefetcher.close()  # does not wait for the thread, and leaves its iterator open
    released.set()
    assert prefetcher.take() == [1, 2]


def test_prefetcher_raises_the_error_of_the_iterator():
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    prefetcher = Prefetcher(items(), count=2)
    assert prefetcher.is_ready(within_s=20)
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


# --------------------------------------------------------------------------------------------------------- agreement


@dataclass(frozen=True)
class Stop:
    """How a rank was stopped."""

    checks_passed: int
    exit_code: int
    is_requested: bool
    """Whether its `StopSignals` have a request."""


def stops(folder: Path) -> dict[str, Stop]:
    """Stop two ranks by a signal to rank 1, by a file, and by a signal to rank 0 while rank 1 waits for data."""
    from pmlm_dist.parallel import groups

    topology = groups.init_process_groups()
    return {
        "signal": _stop_before_third_check(topology, folder / "none", by_file=False),
        "file": _stop_before_third_check(topology, folder / STOP_FILE, by_file=True),
        "waiting": _stop_while_waiting(topology),
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
def stops_of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Stop]]:
    return run_world(stops, 2, tmp_path_factory.mktemp("stops"))


@pytest.mark.distributed
def test_signal_to_one_rank_stops_all_at_the_same_check(stops_of_ranks: list[dict[str, Stop]]):
    assert [rank["signal"] for rank in stops_of_ranks] == [Stop(2, EXIT_PREEMPTED, is_requested=True)] * 2


@pytest.mark.distributed
def test_stop_file_stops_all_without_a_restart(stops_of_ranks: list[dict[str, Stop]]):
    assert [rank["file"] for rank in stops_of_ranks] == [Stop(2, 0, is_requested=False)] * 2


@pytest.mark.distributed
def test_rank_without_data_does_not_prevent_a_stop(stops_of_ranks: list[dict[str, Stop]]):
    assert [rank["waiting"] for rank in stops_of_ranks] == [Stop(0, EXIT_PREEMPTED, is_requested=True)] * 2
