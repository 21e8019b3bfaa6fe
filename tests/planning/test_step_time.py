"""Seconds of a step from given rates: properties for any rates, and cases computed by hand."""

from dataclasses import replace

import pytest
from support.real_runs import zero_settings

from pmlm_dist.config import ModelConfig
from pmlm_dist.devices import DEVICES, Device
from pmlm_dist.metrics.flops import training_flops
from pmlm_dist.planning.communication import Cluster, Traffic, collectives, traffic
from pmlm_dist.planning.model_states import Zero
from pmlm_dist.planning.step_time import StepTime, executed_flops, moved_bytes, step_time
from pmlm_dist.planning.workload import Workload

MODEL = ModelConfig(vocab_size=30_522, hidden_dropout=0.0, attention="fused")
WORK = Workload(MODEL, context=512, predictions=77, micro_batch=32)
H100 = DEVICES["h100-80gb"]


def planned(
    work: Workload = WORK,
    engine: Zero | None = None,
    device: Device = H100,
    *,
    dp: int = 1,
    accumulation: int = 1,
    nodes: int = 1,
) -> StepTime:
    engine = engine or zero_settings(1)
    cluster = Cluster(device, nodes, dp * work.tp // nodes)
    sent: list[Traffic] = [
        traffic(c, cluster, tp=work.tp) for c in collectives(work, engine, dp=dp, accumulation=accumulation)
    ]
    return step_time(work, engine, device, dp=dp, accumulation=accumulation, traffics=sent)


def test_products_run_at_the_attained_rate():
    flops = training_flops(MODEL, context=512, predictions=77, vocab_rows=30_592)
    assert executed_flops(WORK) == pytest.approx(32 * flops)
    device = replace(H100, peak={"bf16": 1e15}, matrix_share=0.5)
    assert planned(device=device).products == pytest.approx(32 * flops / 5e14)


def test_recomputation_repeats_the_layers_without_the_head():
    recomputing = replace(WORK, model=replace(MODEL, activation_checkpointing=True))
    head = 2 * 77 * 2 * 768 * (768 + 30_592)
    forward = training_flops(MODEL, context=512, predictions=77, vocab_rows=30_592) / 3
    assert executed_flops(recomputing) - executed_flops(WORK) == pytest.approx(32 * (forward - head))
    assert moved_bytes(recomputing) > moved_bytes(WORK)


def test_passes_scale_with_the_bandwidth():
    slow = planned(device=replace(H100, bandwidth=H100.bandwidth / 2))
    assert slow.passes == pytest.approx(2 * planned().passes)
    assert slow.update == pytest.approx(2 * planned().update)
    assert slow.products == planned().products


def test_accumulation_repeats_micro_batches_but_not_the_update():
    once, often = planned(), planned(accumulation=5)
    assert often.products == pytest.approx(5 * once.products)
    assert often.passes == pytest.approx(5 * once.passes)
    assert often.update == once.update


def test_moved_bytes_follow_pairs_dropouts_and_precision():
    less = [
        replace(WORK, model=replace(MODEL, attention="triton")),
        replace(WORK, tp=2),
        replace(WORK, micro_batch=16),
        replace(WORK, objectives=("ae",)),
    ]
    more = [
        replace(WORK, model=replace(MODEL, attention="reference")),
        replace(WORK, model=replace(MODEL, hidden_dropout=0.1)),
        replace(WORK, model=replace(MODEL, attention_dropout=0.1)),
        replace(WORK, precision="fp32"),
    ]
    assert all(moved_bytes(work) < moved_bytes(WORK) for work in less)
    assert all(moved_bytes(work) > moved_bytes(WORK) for work in more)


def test_tensor_parallelism_divides_products_and_adds_communication():
    alone, two = planned(), planned(replace(WORK, tp=2))
    assert two.products == pytest.approx(alone.products / 2)
    assert alone.exposed == 0
    assert two.exposed > 0
    assert two.hidden == 0


def test_overlap_hides_communication_up_to_the_backward_pass():
    shown = planned(dp=16, nodes=2)
    overlapping = zero_settings(1, overlap=True)
    hidden = planned(engine=overlapping, dp=16, nodes=2)
    assert hidden.exposed + hidden.hidden == pytest.approx(shown.exposed)
    assert hidden.hidden > 0
    crawling = replace(H100, network=1e6)
    stuck = planned(engine=overlapping, device=crawling, dp=16, nodes=2)
    assert stuck.hidden == pytest.approx(2 / 3 * (stuck.products + stuck.passes))
    assert stuck.exposed > stuck.hidden


def test_slow_host_limits_an_accelerator_and_adds_to_a_cpu():
    slow = replace(H100, dispatch=1e-3)
    waiting = planned(device=slow)
    assert waiting.issuing > 0
    assert planned().issuing == 0
    issued = waiting.issuing + waiting.products + waiting.passes
    assert planned(device=replace(slow, is_accelerator=False)).issuing == pytest.approx(issued)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_update_is_slower(stage: int):
    assert (
        planned(engine=zero_settings(stage, offload=True), dp=2).update
        > planned(engine=zero_settings(stage), dp=2).update
    )


def test_total_is_the_sum_of_sequential_parts():
    time = planned(dp=16, nodes=2)
    assert time.total == time.products + time.passes + time.issuing + time.update + time.exposed
