"""Planned bytes against those that torch allocates in the real training path, by model, engine and ranks.

Bytes between steps: the storage of all tensors reachable from Python. The rise within a step comes from torch's
profiler, which reports every allocation to the byte, and every release except those by gloo's threads. A pause after
each collective lets gloo release first, and the smallest rise of several steps counts. Python's garbage collector runs
between steps only.
"""

import math
from bisect import bisect_left, bisect_right
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.real_runs import BF16, BF16_SUMMED_IN_FP32, Case, selected_cases, zero, zero_settings
from support.worlds import run_world

from pmlm_dist.config import RunConfig
from pmlm_dist.devices import DEVICES, Device
from pmlm_dist.planning.memory import Memory, memory, moments
from pmlm_dist.planning.model_states import model_states
from pmlm_dist.planning.workload import Workload

STEPS = 3
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
RELEASE_S = 0.005
CPU = Device("cpu", math.inf, {}, 1.0, 1.0, 1.0, is_accelerator=False, slack=0.0)
LARGE = {"hidden_size": 192, "num_layers": 3, "num_heads": 4, "ffn_size": 768}
CUT_ALMOST_ALL = {"stage3_param_persistence_threshold": 1000}
CASES = {
    "plain": Case(),
    "wide batch": Case(micro_batch=16),
    "one sample": Case(micro_batch=1),
    "long": Case(sequence_length=192, micro_batch=2),
    "no relative positions": Case({"relative_bias": False}),
    "dropout": Case({"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "reference": Case({"attention": "reference"}),
    "dense, dropout": Case({"attention": "reference", "attention_dropout": 0.1}),
    "checkpointing": Case({"activation_checkpointing": True}),
    "one layer": Case({"num_layers": 1}),
    "accumulation": Case(accumulation=2),
    "ZeRO 1": Case(engine=zero(1)),
    "bf16, ZeRO 1": Case(engine={**zero(1), **BF16}),
    "bf16 in fp32, ZeRO 1": Case(engine={**zero(1), **BF16_SUMMED_IN_FP32}),
    "bf16 in fp32, ZeRO 1, accumulation": Case(engine={**zero(1), **BF16_SUMMED_IN_FP32}, accumulation=2),
    "bf16, ZeRO 2": Case(engine={**zero(2), **BF16}),
    "bf16, ZeRO 1, overlap": Case(engine={**zero(1, overlap_comm=True), **BF16}),
    "2 ranks": Case(dp=2),
    "2 ranks, ZeRO 1": Case(LARGE, zero(1), dp=2),
    "2 ranks, bf16, ZeRO 1": Case(LARGE, {**zero(1), **BF16}, dp=2),
    "2 ranks, bf16 in fp32, ZeRO 1": Case(LARGE, {**zero(1), **BF16_SUMMED_IN_FP32}, dp=2),
    "2 ranks, bf16, ZeRO 2": Case(LARGE, {**zero(2), **BF16}, dp=2),
    "2 ranks, bf16 in fp32, ZeRO 2, accumulation": Case(
        LARGE, {**zero(2), **BF16_SUMMED_IN_FP32}, dp=2, accumulation=2
    ),
    "2 ranks, bf16, ZeRO 3": Case(LARGE, {**zero(3, **CUT_ALMOST_ALL), **BF16}, dp=2, tolerance=0.08),
    "2 tensor-parallel ranks": Case(tp=2),
    "2 tensor-parallel ranks, bf16": Case(LARGE, {**zero(1), **BF16_SUMMED_IN_FP32}, tp=2),
}


def most_allocated(configs: list[RunConfig]) -> list[float]:
    """For each run the most bytes that torch has handed out at once in a step, those of the model included."""
    _wait_for_gloo_in_counted_steps()
    kept: list[Any] = []  # else the engines of earlier runs would be released while a later one is counted
    return [_most_of_a_run(config, kept) for config in configs]


_counting = False


def _wait_for_gloo_in_counted_steps() -> None:
    """Make collectives pause: gloo's thread releases the tensors that it worked on a moment after the collective."""
    import time

    import torch.distributed as dist

    def wrapped(collective: Any) -> Any:
        def then_wait(*args: Any, **settings: Any) -> Any:
            work = collective(*args, **settings)
            if work is not None:
                work.wait()
            if _counting:
                time.sleep(RELEASE_S)
            return work

        return then_wait

    for name in COLLECTIVES:
        setattr(dist, name, wrapped(getattr(dist, name)))


def _most_of_a_run(config: RunConfig, kept: list[Any]) -> float:
    import gc
    import time

    from support.small_runs import start_run, take_steps
    from torch.profiler import ProfilerActivity, profile, record_function

    from pmlm_dist.checkpoint.resume import RunState
    from pmlm_dist.training.pretraining import build_engine

    global _counting  # noqa: PLW0603
    gc.disable()
    gc.collect()
    others = _storage()
    run = start_run(config)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine = build_engine(run)
        kept.append(engine)
        state, *_ = take_steps(run, engine, RunState(), steps=2)
        _counting = True
        for _ in range(STEPS):
            gc.collect()
            time.sleep(10 * RELEASE_S)  # what the last step's collectives hold
            with record_function("counted"):
                state, *_ = take_steps(run, engine, state, steps=1)
        _counting = False
    gc.collect()
    rise = _rise(profiler.profiler.kineto_results.events())  # pyright: ignore[reportOptionalMemberAccess]
    return _storage() - others + rise


def _storage() -> float:
    """Bytes of all tensors that Python can reach."""
    import gc

    import torch

    storages = [tensor.untyped_storage() for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)]
    return float(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))


def _rise(events: Any) -> float:
    """Peak bytes during an event `counted` minus those at its start; the smallest of all such events."""
    ordered = sorted(events, key=lambda event: event.start_ns())
    counted = [(event.start_ns(), event.end_ns()) for event in ordered if event.name() == "counted"]
    live, times, totals = 0, [], []
    for event in ordered:
        if event.name() == "[memory]":
            live += event.nbytes()
            times.append(event.start_ns())
            totals.append(live)
    within = [(bisect_left(times, start), bisect_right(times, end)) for start, end in counted]
    return float(min(max(totals[first:past]) - totals[first - 1] for first, past in within))


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    """Planned and allocated bytes, by selected case; one world for all cases of its kind."""
    selected = selected_cases(request, CASES)
    folders = {name: tmp_path_factory.mktemp("run") for name in selected}
    results = {}
    for dp, tp in sorted({(case.dp, case.tp) for case in selected.values()}):
        names = [name for name, case in selected.items() if (case.dp, case.tp) == (dp, tp)]
        configs = [CASES[name].write(folders[name]) for name in names]
        by_rank = run_world(most_allocated, dp * tp, configs, timeout_s=600)
        for name, most in zip(names, map(max, zip(*by_rank, strict=True)), strict=True):
            results[name] = (planned_memory(CASES[name], folders[name]).allocated, most)
    return results


def planned_memory(case: Case, folder: Path) -> Memory:
    work, engine = case.planned(folder)
    return memory(work, engine, dp=case.dp, accumulation=case.accumulation, device=CPU)


@pytest.mark.serial  # a busy machine delays what gloo releases
@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_planned_bytes_equal_allocated_bytes(runs: dict[str, tuple[float, float]], name: str):
    planned, allocated = runs[name]
    assert planned == pytest.approx(allocated, rel=CASES[name].tolerance)


BASE = Workload(CASES["plain"].shape, context=64, predictions=10, micro_batch=4, precision="bf16")


@pytest.mark.parametrize(("stage", "theory"), [(1, (2, 0, 12)), (2, (2, 0, 12)), (3, (0, 2, 14))])
def test_permanent_bytes_follow_the_theory(stage: int, theory: tuple[int, int, int]):
    """ZeRO, section 3: replicated and partitioned bytes; gradients of stages 1 and 2 are temporary."""
    replicated, partitioned_weights, partitioned = theory
    parameters = model_states(BASE, zero_settings(stage), dp=1).weights / 2
    for dp in (1, 4, 64):
        states = model_states(BASE, zero_settings(stage), dp=dp)
        permanent = states.weights + states.optimizer + states.gradients
        assert permanent == pytest.approx(
            parameters * (replicated + (partitioned if stage < 3 else partitioned_weights + 12 + 2) / dp)
        )


def test_offload_moves_the_optimizer_to_the_host():
    for stage in (1, 2, 3):
        here = memory(BASE, zero_settings(stage), dp=2, accumulation=1, device=DEVICES["a100-40gb"])
        there = memory(BASE, zero_settings(stage, offload=True), dp=2, accumulation=1, device=DEVICES["a100-40gb"])
        assert here.host == 0
        assert there.host >= here.optimizer > 0
        assert there.optimizer == 0
        assert there.device < here.device


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_peak_is_the_highest_moment(stage: int):
    states = model_states(BASE, zero_settings(stage), dp=2)
    planned = memory(BASE, zero_settings(stage), dp=2, accumulation=1, device=CPU)
    highest = max(moment.total for moment in moments(BASE, states, accumulation=1))
    assert planned.allocated == pytest.approx(states.weights + states.optimizer + states.host + highest)
    assert planned.between_steps < planned.allocated


def test_memory_depends_on_batch_and_parallelism_as_expected():
    def needed(work: Workload, stage: int = 1, dp: int = 8) -> float:
        return memory(work, zero_settings(stage), dp=dp, accumulation=1, device=CPU).allocated

    wide = replace(BASE, micro_batch=64, model=replace(BASE.model, attention="fused"))
    assert needed(wide) > needed(BASE)
    assert needed(replace(wide, tp=2)) < needed(wide)
    assert needed(replace(wide, model=replace(wide.model, activation_checkpointing=True))) < needed(wide)
    assert needed(wide, stage=3) < needed(wide, stage=1) < needed(wide, stage=1, dp=1)
    assert needed(replace(wide, model=replace(wide.model, attention="triton"))) < needed(wide)
    assert needed(wide) < needed(replace(wide, model=replace(wide.model, attention="reference")))
