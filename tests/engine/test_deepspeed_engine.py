"""Building the engine: settings that only DeepSpeed validates raise like all others; slow bf16 on a CPU warns."""

import contextlib
import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import run_config, start_run, take_steps
from support.worlds import run_world

from pmlm_dist.config import ConfigError, RunConfig

pytestmark = pytest.mark.distributed


def build_problems(config: RunConfig) -> list[str]:
    """Problems with which the engine of `config` cannot be built."""
    from pmlm_dist.training.pretraining import build_engine

    run = start_run(config)
    with pytest.raises(ConfigError) as caught:
        build_engine(run)
    return caught.value.problems


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        (
            {"zero_optimization": {"stage": 1, "reduce_buckt_size": 5, "overlap_comm": "maybe"}},
            [
                'zero_optimization.overlap_comm ("maybe") in DeepSpeed\'s JSON (--ds-config): '
                "Input should be a valid boolean, unable to interpret input",
                "zero_optimization.reduce_buckt_size (5) in DeepSpeed's JSON (--ds-config): "
                "DeepSpeed has no such setting: correct its name or remove it",
            ],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpuu"}}},
            [
                'zero_optimization.offload_optimizer.device ("cpuu") in DeepSpeed\'s JSON (--ds-config): '
                "Input should be 'none', 'cpu' or 'nvme'"
            ],
        ),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": 0}},
            [
                "zero_optimization.reduce_bucket_size (0) in DeepSpeed's JSON (--ds-config): "
                "Input should be greater than 0"
            ],
        ),
        (
            {"bf16": {"enabled": True, "grad_overflow": False}},
            [
                "bf16.grad_overflow (false) in DeepSpeed's JSON (--ds-config): "
                "DeepSpeed has no such setting: correct its name or remove it"
            ],
        ),
    ],
    ids=["unknown and unreadable", "nested", "out of range", "another section"],
)
def test_invalid_setting_inside_a_section_raises_on_every_rank(
    small_corpus: Path, tmp_path: Path, settings: dict[str, Any], problems: list[str]
):
    config = run_config(small_corpus, tmp_path, **settings)
    assert [sorted(messages) for messages in run_world(build_problems, 2, config)] == [problems] * 2


def printed_with_cpu(config: RunConfig, *, is_fast: bool) -> str:
    """Output of a run on a CPU with or without fast bf16 products."""
    from pmlm_dist.training import pretraining
    from pmlm_dist.training.run import pretrain

    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "has_fast_bf16", lambda device: is_fast)
        pretrain(config)
    return printed.getvalue()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("is_fast", [True, False])
def test_bf16_on_a_cpu_without_fast_products_warns(small_corpus: Path, tmp_path: Path, precision: str, is_fast: bool):
    config = run_config(small_corpus, tmp_path, steps=3, precision=precision)
    printed = run_world(partial(printed_with_cpu, is_fast=is_fast), 1, config)[0]
    assert "complete: step 3" in printed
    assert ("no bf16 matrix products" in printed) == (precision == "bf16" and not is_fast)


def device_synchronizations(config: RunConfig) -> int:
    """How often DeepSpeed waits for the device in the steps of `config`."""
    from deepspeed.accelerator import get_accelerator

    from pmlm_dist.checkpoint.resume import RunState
    from pmlm_dist.training.pretraining import build_engine

    run, waits = start_run(config), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(1))
        take_steps(run, build_engine(run), RunState(), steps=config.train.steps)
    return len(waits)


def test_steps_do_not_synchronize_the_device(small_corpus: Path, tmp_path: Path):
    """By default DeepSpeed's throughput timer does so twice a micro-batch, from the third step on."""
    config = run_config(small_corpus, tmp_path, precision="bf16", micro_batch=4)
    assert run_world(device_synchronizations, 1, config) == [0]
