"""Guards: ranks that disagree are named; steps that are not finite change no weight and are bounded."""

import dataclasses
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import run_config, whole_weights, with_model, with_train
from support.worlds import run_world

from pmlm_dist.config import RunConfig
from pmlm_dist.training.guards import SkippedSteps

pytestmark = pytest.mark.distributed


def failure_of_check_batches(tp: int, fault: str) -> str:
    """What `check_batches` says on this rank about random batches of which rank 1's is wrong."""
    from support.batches import random_batch

    from pmlm_dist.parallel import groups
    from pmlm_dist.training.guards import GuardError, check_batches

    topology = groups.init_process_groups(tp=tp)
    batch = random_batch(seed=topology.dp_rank)
    ids = batch.sample_ids_B + 100 * topology.dp_rank
    if topology.rank == 1 and fault == "token":
        batch.tokens_BT[1, 2] += 1
    if topology.rank == 1 and fault == "sample of rank 0":
        ids[2] = 1
    try:
        check_batches([dataclasses.replace(batch, sample_ids_B=ids)], topology)
    except GuardError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("tp", "fault", "expected"),
    [
        (1, "none", ""),
        (2, "none", ""),
        (2, "token", "ranks 0 and 1 share one copy of the model (tensor parallel) but hold different batches"),
        (1, "sample of rank 0", "ranks 0 and 1 both read sample 1 of epoch 0"),
    ],
)
@pytest.mark.fault("F17")
def test_batches_that_differ_raise_guard_error(tp, fault, expected):
    for message in run_world(failure_of_check_batches, 2, tp, fault):
        assert message.startswith(expected)
        assert bool(message) is bool(expected)


def engine_of(config: RunConfig) -> tuple[Any, Any]:
    from pmlm_dist.parallel import groups
    from pmlm_dist.training.pretraining import build_engine
    from pmlm_dist.training.resolve import resolve

    topology = groups.init_process_groups(tp=config.parallel.tp)
    run = resolve(config, topology)
    return run, build_engine(run)


def failure_of_check_replicas(config: RunConfig, flipped: dict[int, str]) -> str:
    """What `check_replicas` says on this rank once one bit of a parameter is flipped on the ranks of `flipped`."""
    from pmlm_dist.training.guards import GuardError, check_replicas

    run, engine = engine_of(config)
    check_replicas(engine.module, run.topology)
    name = flipped.get(run.topology.rank)
    if name:
        parameter = dict(engine.module.named_parameters())[name]
        held = getattr(parameter, "ds_tensor", parameter.data)
        held.view(-1)[:1].view(torch.int32).bitwise_xor_(1)  # the lowest bit of a mantissa
    try:
        check_replicas(engine.module, run.topology)
    except GuardError as error:
        return str(error)
    return ""


NORM, HEADS = "layers.0.ffn_norm.weight", "layers.0.attention.query.weight"


@pytest.mark.parametrize(
    ("ranks", "tp", "zero", "flipped", "expected"),
    [
        (2, 1, 1, {1: NORM}, f"{NORM}: ranks 1 differ from ranks 0"),
        (2, 1, 2, {0: HEADS}, f"{HEADS}: ranks "),
        (2, 2, 1, {1: NORM}, f"{NORM}: ranks 1 differ from ranks 0"),
        (2, 2, 1, {1: HEADS}, ""),  # peers hold different heads, the difference is invisible
        (4, 2, 1, {3: HEADS}, f"{HEADS}: ranks 3 differ from ranks 1"),
        (4, 2, 3, {3: NORM}, f"{NORM}: ranks 3 differ from ranks 2"),
        (2, 1, 3, {1: NORM}, ""),  # ZeRO-3 has cut it: there is one copy
    ],
)
@pytest.mark.fault("F75")
def test_flipped_bit_of_a_replica_is_detected_and_named(small_corpus, tmp_path, *, ranks, tp, zero, flipped, expected):
    config = run_config(small_corpus, tmp_path, tp=tp, zero=zero, micro_batch=2)
    for message in run_world(failure_of_check_replicas, ranks, config, flipped):
        assert (expected in message) if expected else message == ""


def train_with_fault(config: RunConfig, step: int, fault: str) -> dict[str, Any]:
    """Train; in the attempt at `step` rank 1 of the world (or the only one) meets `fault`."""
    from pmlm_dist.checkpoint.resume import RunState
    from pmlm_dist.data.loader import training_batches
    from pmlm_dist.metrics.meter import Stopwatch
    from pmlm_dist.training import pretraining
    from pmlm_dist.training.step import train_step

    run, engine = engine_of(config)
    job = pretraining.PretrainJob(run)
    losses_of, state = pretraining.forward_losses, RunState()
    faulty = run.topology.rank == run.topology.world_size - 1

    def wrong(module: Any, batch: Any, objective: Any) -> Any:
        sums = losses_of(module, batch, objective)
        if not (faulty and state.step + 1 == step):
            return sums
        factor = math.nan if fault == "loss" else 1.0
        nll_K = sums.nll_K * factor
        if fault == "gradient":
            nll_K = nll_K + 0.0 * torch.sqrt(nll_K.detach() * 0.0 + 0.0 * nll_K)  # derivative: infinity times zero
        return dataclasses.replace(sums, nll_K=nll_K)

    pretraining.forward_losses = wrong
    batches = training_batches(run.source, lanes=run.lanes, share=run.share, loading=config.data)
    results, weights = [], []
    try:
        for _ in range(config.train.steps):
            micro_batches = list(islice(batches, run.engine.accumulation(run.topology.dp)))
            results.append(train_step(job, engine, micro_batches, state, Stopwatch(run.topology.device)))
            weights.append(whole_weights(engine.module))
            state = job.advance(state)
    finally:
        pretraining.forward_losses = losses_of
    return {
        "skipped": [result.skipped for result in results],
        "causes": [result.causes for result in results],
        "counts": [result.counts for result in results],
        "weights": weights,
    }


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("ranks", "zero", "precision"),
    [(1, 0, "fp32"), (2, 0, "fp32"), (2, 1, "fp32"), (2, 2, "fp32"), (2, 3, "fp32"), (2, 1, "bf16"), (2, 3, "bf16")],
)
@pytest.mark.fault("F71")
def test_nonfinite_step_is_skipped_on_all_ranks_and_diagnosed(small_corpus, tmp_path, *, ranks, zero, precision, fault):
    config = run_config(small_corpus, tmp_path, steps=4, zero=zero, precision=precision)
    answers = run_world(train_with_fault, ranks, config, 2, fault)
    for answer in answers:
        assert answer["skipped"] == [False, True, False, False]
        before, during, after, _ = answer["weights"]
        assert all(torch.equal(during[name], before[name]) for name in before)
        assert any(not torch.equal(after[name], before[name]) for name in before)
        assert all(bool(torch.isfinite(weight).all()) for weight in after.values())
        assert float(answer["counts"][1].abs().sum()) == 0.0
        assert answer["causes"] == answers[0]["causes"]
        assert not any(answer["causes"][step] for step in (0, 2, 3))
        (cause,) = answer["causes"][1]
        if fault == "loss":
            assert f"rank {ranks - 1}: loss of micro-batch 0, samples " in cause
        elif zero < 3:
            assert f"rank {ranks - 1}: gradients of embeddings.token.weight" in cause
        else:  # gradients cannot be taken again
            assert "everything is finite" in cause


def break_reduced_gradients(engine: Any, patch: pytest.MonkeyPatch) -> None:
    """Make one number NaN before the next update, after gradients were averaged: as an error of this rank's memory."""
    from pmlm_dist.training import step

    def poison(*_: Any) -> None:
        optimizer: Any = engine.optimizer
        if engine.zero_optimization_stage() == 0:
            held = next(engine.module.parameters()).grad
        elif hasattr(optimizer, "fp32_groups_gradient_flat_partition"):
            held = optimizer.fp32_groups_gradient_flat_partition[0]
        else:
            held = optimizer.averaged_gradients[0][0]
        held.view(-1)[0] = math.nan

    if engine.zero_optimization_stage() == 0:
        patch.setattr(step, "_fill_gradients", poison)
    else:
        take_step = engine.step
        patch.setattr(engine, "step", lambda: (poison(), take_step()))


def train_with_broken_memory(config: RunConfig) -> list[tuple[bool, tuple[str, ...]]]:
    """Whether each step was skipped, and why, where the last rank's averaged gradient is wrong at the second one."""
    from pmlm_dist.checkpoint.resume import RunState
    from pmlm_dist.data.loader import training_batches
    from pmlm_dist.metrics.meter import Stopwatch
    from pmlm_dist.training.pretraining import PretrainJob
    from pmlm_dist.training.step import train_step

    run, engine = engine_of(config)
    job, state, results = PretrainJob(run), RunState(), []
    batches = training_batches(run.source, lanes=run.lanes, share=run.share, loading=config.data)
    for step in range(config.train.steps):
        with pytest.MonkeyPatch.context() as patch:
            if step == 1 and run.topology.rank == run.topology.world_size - 1:
                break_reduced_gradients(engine, patch)
            result = train_step(job, engine, [next(batches)], state, Stopwatch(run.topology.device))
        results.append((result.skipped, result.causes))
        state = job.advance(state)
    return results


@pytest.mark.parametrize(
    ("ranks", "tp", "zero", "precision"),
    [
        (2, 1, 0, "fp32"),
        (4, 2, 0, "fp32"),
        (2, 1, 1, "bf16"),
        (4, 2, 1, "bf16"),
        (2, 1, 1, "fp32"),
        (2, 1, 2, "fp32"),
        (2, 1, 3, "fp32"),
    ],
)
@pytest.mark.fault("F71")
def test_gradient_wrong_on_one_rank_after_averaging_skips_the_step_on_all(
    small_corpus, tmp_path, *, ranks, tp, zero, precision
):
    """Ranks that decide by a norm of their own wait for each other in different collectives."""
    config = run_config(
        small_corpus, tmp_path, steps=3, zero=zero, precision=precision, tp=tp, micro_batch=8 * tp // ranks
    )
    config = with_train(config, collective_timeout_s=20)
    for steps in run_world(train_with_broken_memory, ranks, config):
        assert [skipped for skipped, _ in steps] == [False, True, False]
        assert steps[1][1] == ("computed again, everything is finite: a hardware or communication error",)


def test_nonfinite_step_with_activation_checkpointing_names_the_loss(small_corpus, tmp_path):
    config = with_model(run_config(small_corpus, tmp_path, steps=3), activation_checkpointing=True)
    (answer,) = run_world(train_with_fault, 1, config, 1, "loss")
    assert answer["skipped"] == [True, False, False]
    assert "rank 0: loss of micro-batch 0" in answer["causes"][0][0]


@pytest.mark.fault("F72")
def test_too_many_consecutive_skips_raise():
    skips = SkippedSteps(limit=3)
    for skipped in (True, True, False, True, True):
        skips.count(skipped=skipped, last_good=None)
    assert (skips.total, skips.in_a_row) == (4, 2)
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        skips.count(skipped=True, last_good=None)


def pretrain_with_broken_weights(config: RunConfig, step: int) -> tuple[str, list[str]]:
    """Pre-train while one weight becomes infinite before `step`; returns the error and the log."""
    from pmlm_dist.metrics.run_log import RunLog
    from pmlm_dist.training import loop
    from pmlm_dist.training.run import pretrain

    train_step, logged = loop.train_step, []

    def info(self: RunLog, text: str) -> None:
        logged.append(text)

    RunLog.info = info

    def broken(job: Any, engine: Any, micro_batches: Any, state: Any, stopwatch: Any, **begin: Any) -> Any:
        if state.step + 1 == step:
            engine.module.layers[0].ffn_in.weight.data[0, 0] = math.inf
        return train_step(job, engine, micro_batches, state, stopwatch, **begin)

    loop.train_step = broken
    try:
        pretrain(config)
    except FloatingPointError as error:
        return str(error), logged
    finally:
        loop.train_step = train_step
    return "", logged


@pytest.fixture
def breaking(small_corpus: Path, tmp_path: Path) -> RunConfig:
    """Six steps, a checkpoint after every second, at most three skips in a row."""
    config = run_config(small_corpus, tmp_path, steps=6, zero=1)
    return with_train(config, checkpoint_every=2, max_skipped_steps=3)


@pytest.mark.fault("F72")
def test_nonfinite_weights_end_the_run_and_name_the_last_good_checkpoint(breaking):
    ((message, logged),) = run_world(pretrain_with_broken_weights, 1, breaking, 4)
    assert message.startswith("3 steps in a row")
    assert message.endswith(f"the last good checkpoint is {breaking.run_dir / 'checkpoints' / 'step-00000002'}")
    expected = "step 4 was skipped, its gradient was not finite: rank 0: weights of layers.0.ffn_in.weight"
    assert any(text.startswith(expected) for text in logged)


def test_nonfinite_weights_are_not_saved_at_the_last_step(breaking):
    ((message, _),) = run_world(pretrain_with_broken_weights, 1, breaking, 6)
    assert message == "the weights of step 6 give logits that are not finite: not saved"
    kept = sorted(path.name for path in (breaking.run_dir / "checkpoints").glob("step-*"))
    assert kept == ["step-00000002", "step-00000004"]
    assert not (breaking.run_dir / "COMPLETE").exists()
