"""Estimated time of a step before a run starts, and the limit on it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.small_runs import run_config
from support.worlds import run_world

from pmlm_dist.config import BatchConfig, ConfigError, RunConfig
from pmlm_dist.devices import Device


def forecast_of(config: RunConfig, flops: float) -> str:
    """Return the forecast for devices of `flops` FLOP/s, or the error."""
    from pmlm_dist.parallel import groups
    from pmlm_dist.training import forecast
    from pmlm_dist.training.resolve import resolve

    def device(precision: str, *_args: object, **_settings: object) -> Device:
        return Device("cpu", 1e12, {precision: flops}, 1e15, 1e15, 1e15, matrix_share=1.0, is_accelerator=False)

    forecast.measure_device = device
    try:
        return forecast.forecast(resolve(config, groups.init_process_groups()), first_step=0)
    except ConfigError as error:
        return str(error)


def forecasts(cases: list[tuple[RunConfig, float]]) -> list[str]:
    return [forecast_of(*case) for case in cases]


@pytest.mark.distributed
def test_time_is_estimated_and_a_slow_step_needs_a_flag(small_corpus: Path, tmp_path: Path):
    short = run_config(small_corpus, tmp_path / "run", steps=20, micro_batch=2)
    run = replace(short, train=replace(short.train, steps=100_000))
    huge = replace(run, batch=BatchConfig(2**24, 2**20))
    allowed = replace(huge, train=replace(huge.train, allow_slow_steps=True))
    found, other_rank = run_world(forecasts, 2, [(short, 1e9), (run, 1e12), (huge, 5e10), (huge, 1e6), (allowed, 5e10)])
    assert found == other_rank
    assert found[0] == ""
    assert re.fullmatch(r"estimate: .* s a step, .* for 100,000 steps on 2 cpu ranks", found[1])
    assert re.search(r"a step of 16,777,216 sequences .* use --preset tiny \(.* s a step here\), a smaller", found[2])
    assert "preset" not in found[3]
    assert "use a smaller --batch.global, more ranks, or --train.allow-slow-steps" in found[3]
    assert found[4].startswith("estimate: ")
