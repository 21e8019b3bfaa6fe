"""The measured device: every field is set and has a plausible value."""

import math

import pytest
from support.worlds import run_world

from pmlm_dist.config import ModelConfig
from pmlm_dist.devices import Device


def measured(precision: str) -> Device:
    from pmlm_dist.parallel import groups
    from pmlm_dist.planning.measure import measure_device

    model = ModelConfig(hidden_size=64, num_layers=2, num_heads=2, ffn_size=128)
    return measure_device(precision, groups.init_process_groups(), model=model, tokens=64, seconds=0.02)


def test_one_rank_measures_plausible_rates():
    (device,) = run_world(measured, 1, "fp32")
    assert set(device.peak) == {"fp32"}
    assert device.matrix_share == device.bandwidth_share == device.link_share == 1.0
    assert 1e8 < device.peak["fp32"] < 1e16
    assert 1e7 < device.bandwidth < 1e14
    assert 0 < device.dispatch < 1e-2
    assert device.memory > 2**28
    assert not device.is_accelerator
    assert math.isnan(device.link)


@pytest.mark.distributed
def test_two_ranks_agree_on_the_slowest_and_measure_their_link():
    one, two = run_world(measured, 2, "bf16")
    assert one.peak == two.peak
    assert one.bandwidth == two.bandwidth
    assert one.link == pytest.approx(two.link)
    assert 1e5 < one.link < 1e13
