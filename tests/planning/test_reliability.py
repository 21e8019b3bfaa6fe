"""The best checkpoint interval against a search for it, and Llama 3's failures."""

import pytest

from pmlm_dist.checkpoint.fragments import Fragment
from pmlm_dist.planning.reliability import Checkpoints, checkpoints, writers
from pmlm_dist.supervision.attempts import LLAMA_3_HOURS


def planned(**changes: float) -> Checkpoints:
    settings = {
        "gpus": 1024,
        "writers": changes.get("gpus", 1024),
        "gpu_hours": LLAMA_3_HOURS,
        "bytes_per_s": 5e6,
        "restart_s": 600.0,
        "step_s": 0.1,
    }
    return checkpoints(10**10, **{**settings, **changes})  # pyright: ignore[reportArgumentType]


def test_failures_of_llama_3_are_reproduced():
    plan = planned(gpus=16_384)
    assert plan.between_failures == pytest.approx(54 * 86_400 / 419)  # every three hours
    assert plan.effective > 0.9  # as reported


def test_best_interval_loses_least():
    plan = planned()

    def lost(interval: float) -> float:
        return plan.seconds / interval + (interval / 2 + 600.0) / plan.between_failures

    assert plan.effective == pytest.approx(1 - lost(plan.interval))
    intervals = [plan.interval * (1 + 0.01 * change) for change in range(-50, 100)]
    assert min(map(lost, intervals)) == pytest.approx(lost(plan.interval), rel=1e-6)


def test_checkpoint_is_twelve_bytes_a_parameter_and_every_rank_writes_a_part():
    plan = planned()
    assert plan.bytes == 12e10
    assert plan.seconds == pytest.approx(12e10 / 1024 / 5e6)


@pytest.mark.parametrize("dp", [1, 4, 32, 33, 1000])
def test_writers_are_the_ranks_that_write_a_share(dp: int):
    whole = Fragment.whole("w", (10_000,))
    assert writers(zero_stage=0, tp=1, dp=dp) == sum(whole.share_of_replica(rank, dp) is not None for rank in range(dp))
    assert writers(zero_stage=1, tp=2, dp=dp) == 2 * dp
    assert planned(writers=writers(zero_stage=0, tp=2, dp=512)).seconds == pytest.approx(12e10 / 64 / 5e6)


def test_interval_is_at_least_one_step():
    assert planned(step_s=1e5).interval == 1e5


def test_failures_faster_than_saves_leave_no_time():
    assert planned(gpu_hours=1e-3).effective == 0
