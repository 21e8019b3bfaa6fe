"""Planned collectives against those of the real training path; bytes by link against cases computed by hand."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.real_runs import BF16, BF16_SUMMED_IN_FP32, Case, zero, zero_settings
from support.worlds import run_world

from pmlm_dist.config import RunConfig
from pmlm_dist.devices import DEVICES
from pmlm_dist.planning.communication import Cluster, Collective, collectives, traffic
from pmlm_dist.planning.parameters import rank_parameters
from pmlm_dist.planning.workload import Workload

H100 = replace(DEVICES["h100-80gb"], link_share=1.0, network_share=1.0, latency=0.0)
KINDS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
ZERO_3 = {**zero(3, stage3_param_persistence_threshold=20_000), **BF16}
CASES = {
    "ZeRO 0": Case(dp=2),
    "ZeRO 1": Case(engine=zero(1), dp=2),
    "ZeRO 1, bf16 in fp32": Case(engine={**zero(1), **BF16_SUMMED_IN_FP32}, dp=2, accumulation=2),
    "ZeRO 1, bf16, averaged in fp32": Case(
        engine={**zero(1), **BF16_SUMMED_IN_FP32, "communication_data_type": "fp32"}, dp=2
    ),
    "ZeRO 2, two micro-batches": Case(engine={**zero(2), **BF16}, dp=2, accumulation=2),
    "ZeRO 3": Case(engine=ZERO_3, dp=2),
    "ZeRO 3, two micro-batches": Case(engine=ZERO_3, dp=2, accumulation=2),
    "tensor-parallel": Case(tp=2),
    "tensor-parallel, two micro-batches": Case(tp=2, accumulation=2),
    "tensor-parallel, checkpointing": Case({"activation_checkpointing": True}, tp=2),
    "tensor-parallel, ZeRO 1": Case(engine=zero(1), tp=2, dp=2),
}


def bytes_of_steps(configs: list[RunConfig]) -> list[Counter[str]]:
    """For each run the tensor bytes of the collectives of its second step, by operation."""
    return [_bytes_of_a_step(config) for config in configs]


def _bytes_of_a_step(config: RunConfig) -> Counter[str]:
    """Bytes by operation; of a gather or scatter the larger of input and output."""
    import torch
    from support.small_runs import start_run, take_steps
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from pmlm_dist.checkpoint.resume import RunState
    from pmlm_dist.training.pretraining import build_engine

    counted: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
                sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
                counted[str(func._schema.name).removeprefix("c10d::")] += max(sizes, default=0)
            return func(*args, **(kwargs or {}))

    run = start_run(config)
    engine = build_engine(run)
    state, *_ = take_steps(run, engine, RunState(), steps=1)
    with Count():
        take_steps(run, engine, state, steps=1)
    return counted


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Counter[str], Counter[str]]]:
    """Planned and measured bytes by case and kind of collective; cases with equal ranks share a world."""
    folders = {name: tmp_path_factory.mktemp("run") for name in CASES}
    results = {}
    for dp, tp in sorted({(case.dp, case.tp) for case in CASES.values()}):
        names = [name for name, case in CASES.items() if (case.dp, case.tp) == (dp, tp)]
        configs = [CASES[name].write(folders[name]) for name in names]
        counted = run_world(bytes_of_steps, dp * tp, configs, timeout_s=300)[0]
        for name, operations in zip(names, counted, strict=True):
            measured: Counter[str] = Counter()
            for operation, size in operations.items():
                measured[str(KINDS.get(operation, operation))] += size
            results[name] = (planned_bytes(CASES[name], folders[name]), measured)
    return results


def planned_bytes(case: Case, folder: Path) -> Counter[str]:
    work, engine = case.planned(folder)
    planned: Counter[str] = Counter()
    for collective in collectives(work, engine, dp=case.dp, accumulation=case.accumulation):
        planned[collective.kind] += int(collective.times * collective.bytes)
    return planned


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_bytes_of_a_step_equal_the_plan(sent: dict[str, tuple[Counter[str], Counter[str]]], name: str):
    planned, measured = sent[name]
    for kind in KINDS.values():  # norms, losses and counts, a few numbers each, are not planned
        assert planned[kind] == pytest.approx(measured[kind], rel=0.01, abs=20_000), kind


def all_reduce(size: float, group: Any = "data parallel", **settings: Any) -> Collective:
    return Collective("test", group, "all-reduce", size, times=1, **settings)


def test_one_node_sends_nothing_over_the_network():
    sent = traffic(all_reduce(8e9), Cluster(H100, nodes=1, gpus_per_node=8), tp=1)
    assert sent.outside == 0
    assert sent.inside == pytest.approx(2 * 7 / 8 * 8e9)
    assert sent.seconds == pytest.approx(14e9 / 450e9)


def test_ring_over_two_nodes_sends_one_byte_in_eight_over_the_network():
    """16 ranks send 2 * 15/16 of 16 GB = 30 GB each; one of a node's 8 hops leaves it: 3.75 GB at 50 GB/s."""
    sent = traffic(all_reduce(16e9), Cluster(H100, nodes=2, gpus_per_node=8), tp=1)
    assert sent.outside == pytest.approx(3.75e9)
    assert sent.inside == pytest.approx(26.25e9)
    assert sent.seconds == pytest.approx(3.75 / 50)


def test_tensor_parallelism_sends_a_larger_share_over_the_network():
    """A ring over 16 ranks visits 8 of a node, one over 4 of them visits 2: 2 * 15/16 / 8 against 2 * 3/4 / 2."""
    cluster = Cluster(H100, nodes=2, gpus_per_node=8)
    alone, shared = (traffic(all_reduce(1e9), cluster, tp=tp) for tp in (1, 4))
    assert alone.outside == pytest.approx(2 * 15 / 16 / 8 * 1e9)
    assert shared.outside == pytest.approx(2 * 3 / 4 / 2 * 1e9)
    inner = traffic(all_reduce(1e9, "tensor parallel"), cluster, tp=4)
    assert inner.outside == 0
    assert inner.inside == pytest.approx(2 * 3 / 4 * 1e9)


def test_gather_sends_half_of_an_all_reduce_at_each_repetition():
    cluster = Cluster(H100, nodes=4, gpus_per_node=8)
    reduced = traffic(all_reduce(1e9), cluster, tp=1)
    gathered = traffic(replace(all_reduce(1e9), kind="all-gather", times=3), cluster, tp=1)
    assert gathered.inside == pytest.approx(1.5 * reduced.inside)
    assert gathered.seconds == pytest.approx(1.5 * reduced.seconds)


def test_every_call_adds_the_latency_of_its_rounds():
    slow = replace(H100, latency=1e-3)
    waiting = traffic(all_reduce(0.0, calls=5), Cluster(slow, nodes=2, gpus_per_node=8), tp=1)
    assert waiting.seconds == pytest.approx(5 * 4 * 1e-3)


ALONE = Workload(CASES["ZeRO 0"].shape, context=64, predictions=10, micro_batch=4)


def test_one_rank_sends_nothing():
    assert list(collectives(ALONE, zero_settings(1), dp=1, accumulation=4)) == []


@pytest.mark.parametrize(
    ("stage", "accumulated", "hidden"),
    [
        (1, 2, ["gradients"]),
        (1, 4, ["gradients"]),
        (2, 2, ["gradients"]),
        (2, 4, ["gradients"]),
        (3, 2, ["weights", "gradients"]),
    ],
)
def test_collectives_are_hidden_where_they_overlap_the_backward_pass(stage: int, accumulated: int, hidden: list[str]):
    engine = zero_settings(stage, overlap=True, accumulated=accumulated, max_live=10**9)
    assert [c.purpose for c in collectives(ALONE, engine, dp=2, accumulation=1) if c.is_hidden] == hidden


@pytest.mark.parametrize("bucket", [1, 500_000, 10**9])
def test_last_bucket_of_bf16_sums_is_exposed(bucket: int):
    """It has the embeddings at least: with one bucket for all, nothing overlaps."""
    engine = zero_settings(1, overlap=True, accumulated=4, reduce_bucket=bucket)
    sent = [c for c in collectives(ALONE, engine, dp=2, accumulation=2) if c.kind == "all-reduce"]
    numbers, embeddings = rank_parameters(ALONE), rank_parameters(ALONE, "embeddings.")
    assert sum(c.times * c.bytes for c in sent) == pytest.approx(2 * numbers)
    assert sum(c.bytes for c in sent if not c.is_hidden) == pytest.approx(2 * min(numbers, max(embeddings, bucket)))


def test_weights_above_max_live_are_gathered_twice():
    times = [
        next(iter(collectives(ALONE, zero_settings(3, max_live=live), dp=2, accumulation=3))).times
        for live in (10**9, 1000)
    ]
    assert times == [3, 6]
