"""The best interval against a search for it, and Llama 3's failures."""

from __future__ import annotations

import pytest

from pmlm_dist.planning.reliability import Checkpoints, checkpoints
from pmlm_dist.supervision.attempts import LLAMA_3_HOURS


def planned(**changes: float) -> Checkpoints:
    settings = {
        "gpus": 1024,
        "gpu_hours": LLAMA_3_HOURS,
        "bytes_per_s": 5e6,
        "restart_s": 600.0,
        "step_s": 0.1,
    }
    return checkpoints(10**10, **{**settings, **changes})  # pyright: ignore[reportArgumentType]


def test_llama_3_fails_as_often_as_it_did():
    found = planned(gpus=16_384)
    assert found.between_failures == pytest.approx(54 * 86_400 / 419)  # every three hours
    assert found.effective > 0.9  # as was reported


def test_the_interval_loses_least():
    found = planned()

    def lost(interval: float) -> float:
        return found.seconds / interval + (interval / 2 + 600.0) / found.between_failures

    assert found.effective == pytest.approx(1 - lost(found.interval))
    tried = [found.interval * (1 + 0.01 * change) for change in range(-50, 100)]
    assert min(map(lost, tried)) == pytest.approx(lost(found.interval), rel=1e-6)


def test_a_checkpoint_holds_twelve_bytes_a_parameter_and_every_rank_writes_its_part():
    found = planned()
    assert found.bytes == 12e10
    assert found.seconds == pytest.approx(12e10 / 1024 / 5e6)


def test_nothing_is_saved_more_often_than_every_step():
    assert planned(step_s=1e5).interval == 1e5


def test_what_fails_faster_than_it_saves_gets_nowhere():
    assert planned(gpu_hours=1e-3).effective == 0
