"""The whole plan: known cases, invalid settings, warnings, and proposed layouts."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pmlm_dist.config import DS_CONFIGS, BatchConfig, ConfigError, ParallelConfig
from pmlm_dist.planning import report
from pmlm_dist.planning.estimate import Layout
from pmlm_dist.planning.plan import Plan, make_plan
from pmlm_dist.planning.settings import Assumptions, PlanConfig

TEN_BILLION = {"hidden_size": 4096, "num_layers": 48, "num_heads": 32, "ffn_size": 16_384}


def config(preset: str = "large", **changes: Any) -> PlanConfig:
    settings = PlanConfig.of_preset(preset)
    model = replace(settings.model, **changes.pop("model", {}))
    parallel = ParallelConfig(changes.pop("tp", 1))
    return replace(settings, model=model, parallel=parallel, **changes)


def plan_of(preset: str = "large", **changes: Any) -> Plan:
    return make_plan(config(preset, **changes))


def test_large_preset_on_eight_nodes():
    plan = plan_of(nodes=8)
    assert plan.parameters == 335_246_720
    assert (plan.estimate.dp, plan.estimate.accumulation) == (64, 4)
    assert plan.estimate.fits
    assert 0.1 < plan.estimate.mfu < plan.cluster.device.matrix_share
    assert plan.slots == 7680 * 666
    assert plan.days == pytest.approx(
        500_000 * plan.estimate.time.total / 86_400 / plan.checkpoints.effective, rel=1e-9
    )
    assert plan.checkpoints.bytes == 12 * plan.parameters


def test_options_replace_settings_of_preset_and_engine():
    plan = plan_of(nodes=8, tp=2, zero=2, batch=BatchConfig(640, 10), sequence_length=128, steps=10)
    assert plan.estimate.layout == Layout(tp=2, zero=2, micro_batch=10)
    assert (plan.estimate.dp, plan.estimate.accumulation, plan.estimate.global_batch) == (32, 2, 640)
    assert plan.estimate.work.context == 128
    assert plan.estimate.work.predictions == 20
    assert plan.config.steps == 10


def test_indivisible_batch_is_rounded_up_with_a_warning():
    plan = plan_of(nodes=8, tp=2, zero=1, batch=BatchConfig(micro=64))
    assert plan.estimate.global_batch == 8192
    assert any("train_batch_size (7680) must be a multiple" in warning for warning in plan.warnings)
    (proposal,) = (warning for warning in plan.warnings if "valid and fitting" in warning)
    assert plan.alternatives[0].layout.options in proposal


def test_layout_that_does_not_fit_warns_with_one_that_does():
    plan = plan_of(nodes=8, batch=BatchConfig(micro=240))
    assert not plan.estimate.fits
    (warning,) = (warning for warning in plan.warnings if warning.startswith("does not fit"))
    same = next(other for other in plan.alternatives if other.layout.zero == 1)
    assert same.layout.options in warning
    assert same.fits


@pytest.mark.parametrize(("device", "preset"), [("h100-80gb", "large"), ("a100-40gb", "large"), ("l40s-48gb", "base")])
def test_proposals_are_the_fastest_fitting_layouts(device: str, preset: str):
    plan = plan_of(preset, nodes=8, device=device)
    job = plan.estimate.job
    assert [other.layout.zero for other in plan.alternatives]
    for proposal in plan.alternatives:
        assert proposal.fits
        assert proposal.global_batch == job.engine.global_batch
        for micro_batch in job.micro_batches(proposal.layout.tp):
            other = job.estimate(replace(proposal.layout, micro_batch=micro_batch))
            assert not other.fits or other.time.total >= proposal.time.total
    times = [proposal.time.total for proposal in plan.alternatives]
    assert times == sorted(times)


def test_ten_billion_parameters_on_a_thousand_gpus():
    plan = plan_of(nodes=128, tp=8, model=TEN_BILLION, batch=BatchConfig(8192, 8))
    assert plan.parameters == pytest.approx(9.81e9, rel=1e-3)
    assert plan.estimate.fits
    assert (plan.estimate.dp, plan.estimate.accumulation) == (128, 8)
    assert plan.alternatives
    alone = plan_of(nodes=128, model=TEN_BILLION, batch=BatchConfig(8192, 8))
    assert not alone.estimate.fits  # fp32 gradients of all parameters on every GPU
    assert all(other.layout.zero > 1 or other.layout.tp > 1 for other in alone.alternatives)


def test_cluster_too_small_for_any_layout_warns():
    plan = plan_of(nodes=1, gpus_per_node=1, device="v100-32gb", model=TEN_BILLION, ds_config=fp16())
    assert plan.alternatives == ()
    assert any("no layout fits on this cluster" in warning for warning in plan.warnings)


def fp16() -> Path:
    return DS_CONFIGS / "large_fp16.json"


def test_device_without_the_precision_raises():
    with pytest.raises(ConfigError, match="v100-32gb has no bf16 products"):
        plan_of(device="v100-32gb")
    assert plan_of(device="v100-32gb", ds_config=fp16()).estimate.job.engine.precision == "fp16"


def test_all_problems_are_raised_at_once():
    with pytest.raises(ConfigError) as caught:
        plan_of(
            nodes=0,
            gpus_per_node=8,
            tp=3,
            zero=0,
            device="h300",
            sequence_length=1024,
            assume=Assumptions(matrix_share=-1.0),
        )
    text = str(caught.value)
    for part in (
        "nodes (0)",
        "parallel.tp (3) must divide gpus_per_node (8)",
        "parallel.tp (3) must divide model.num_heads (16)",
        "ZeRO stage 0 with bf16",
        "device (h300)",
        "sequence_length (1024) exceeds model.max_positions (512)",
        "assume.matrix_share (-1.0)",
    ):
        assert part in text


def test_settings_without_effect_and_wasted_buckets_warn(tmp_path: Path):
    assert not any("overlap_comm" in warning or "bucket" in warning for warning in plan_of(nodes=8).warnings)
    for settings, expected in (({"overlap_comm": False}, "set zero_optimization.overlap_comm"), ({}, "one bucket")):
        raw = json.loads((DS_CONFIGS / "base.json").read_text())
        raw["zero_optimization"] |= {"reduce_bucket_size": 500_000_000, **settings}
        (changed := tmp_path / "bf16.json").write_text(json.dumps(raw))
        assert any(expected in warning for warning in plan_of(nodes=8, ds_config=changed).warnings)
    raw = json.loads(fp16().read_text())
    raw["zero_optimization"] |= {"reduce_bucket_size": 1_000_000_000, "offload_param": {"device": "cpu"}}
    changed = tmp_path / "engine.json"
    changed.write_text(json.dumps(raw))
    warnings = " ".join(plan_of(nodes=8, ds_config=changed).warnings)
    assert "reduce_bucket_size (1,000,000,000) exceeds" in warnings
    assert "wastes 2.7 GB" in warnings  # two buckets of 665 M fp16 numbers more than there are parameters
    assert "offload_param is not modeled" in warnings
    assert "overlap_comm" not in warnings


def test_high_communication_share_warns():
    slow = Assumptions(network_gbit_per_s=1.0)
    assert any("communication takes" in warning for warning in plan_of(nodes=8, assume=slow).warnings)
    assert not any("communication takes" in warning for warning in plan_of(nodes=8).warnings)


def test_bad_checkpoint_interval_warns():
    often = Assumptions(failure_hours=500.0)
    (warning,) = (w for w in plan_of(nodes=8, assume=often).warnings if w.startswith("checkpoints every 5000"))
    assert "--train.checkpoint-every" in warning
    assert not any(w.startswith("checkpoints every") for w in plan_of(nodes=8).warnings)


def test_checkpoint_advice_stays_within_the_run():
    def advised(**changes: Any) -> list[str]:
        return [w for w in plan_of("tiny", batch=BatchConfig(micro=4), **changes).warnings if "checkpoint-every" in w]

    assert not advised()  # 1,000 steps take seconds
    (warning,) = advised(steps=1_000_000, assume=Assumptions(failure_hours=1e12))
    assert warning.endswith("--train.checkpoint-every 1000000")


def test_assumptions_replace_rates_of_the_device():
    assume = Assumptions(matrix_share=0.9, bandwidth_share=0.5, link_gb_per_s=100.0, network_gbit_per_s=80.0)
    device = plan_of(nodes=8, assume=assume).cluster.device
    assert (device.matrix_share, device.bandwidth_share, device.link, device.network) == (0.9, 0.5, 100e9, 10e9)


def test_plan_is_printed_and_written_as_json():
    plan = plan_of(nodes=8, assume=Assumptions(failure_hours=500.0))  # warns of the checkpoint interval
    again = json.loads(json.dumps(plan.as_dict()))
    assert again["parameters"] == plan.parameters
    assert again["memory"]["device"] == plan.estimate.memory.device
    assert again["step_s"] == plan.estimate.time.total
    text = StringIO()
    report.show(plan, Console(file=text, width=120))
    shown = text.getvalue()
    for part in ("335,246,720", "optimizer", "all-reduce", "MFU", "days", "best interval", "--zero 3", "warning:"):
        assert part in shown
