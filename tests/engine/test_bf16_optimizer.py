"""fp32 accumulation of bf16 gradients equals that of DeepSpeed's own optimizer, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import Trained, run_config, start_run, take_steps, train, whole_weights, with_model
from support.worlds import run_world

from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import RunConfig

pytestmark = pytest.mark.distributed


def train_with_deepspeeds_optimizer(config: RunConfig) -> Trained:
    """`train` with DeepSpeed's own accumulation: sums zeroed, gradients added after the backward pass, averaged."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    from pmlm_dist.engine.bf16_optimizer import SummingBF16Optimizer
    from pmlm_dist.engine.deepspeed_config import EngineConfig
    from pmlm_dist.training.pretraining import build_engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummingBF16Optimizer, "replace", lambda *_: None)
        patch.setattr(EngineConfig, "for_deepspeed", lambda config: {"gradient_clipping": 0.0, **config.raw})
        run = start_run(config)
        engine: Any = build_engine(run)
    assert type(engine.optimizer) is BF16_Optimizer
    assert not engine.optimizer.immediate_grad_update
    assert engine.enable_backward_allreduce
    _, losses, norms = take_steps(run, engine, RunState(), steps=config.train.steps)
    return Trained(losses, norms, whole_weights(engine.module))


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {"micro_batch": 8}),
        (2, {"micro_batch": 4}),
        (2, {"micro_batch": 2}),
        (2, {"micro_batch": 1, "checkpointing": True}),
        (2, {"micro_batch": 8, "tp": 2}),
        (1, {"micro_batch": 2, "communication_data_type": "fp32"}),
        (2, {"micro_batch": 4, "communication_data_type": "fp32", "gradient_predivide_factor": 3.0}),
        (2, {"micro_batch": 4, "prescale_gradients": True}),
        (2, {"micro_batch": 4, "gradient_clipping": 0.05}),
        (2, {"micro_batch": 8, "tp": 2, "gradient_clipping": 0.05}),
    ],
    ids=lambda value: "-".join(f"{name}{value}" for name, value in value.items()) if isinstance(value, dict) else None,
)
def test_training_equals_deepspeeds_own_accumulation_bit_for_bit(
    small_corpus: Path, tmp_path: Path, ranks: int, settings: dict[str, Any]
):
    """With clipping to the rounding of the norm, whose squares are added in another order."""
    settings = dict(settings)
    checkpointing = settings.pop("checkpointing", False)
    config = run_config(small_corpus, tmp_path, precision="bf16", **settings)
    config = with_model(config, activation_checkpointing=checkpointing)
    own, deepspeeds = run_world(train, ranks, config), run_world(train_with_deepspeeds_optimizer, ranks, config)
    assert min(own[0].norms) > 0.05  # every step is clipped, if any
    is_clipped = "gradient_clipping" in settings
    for ours, reference in zip(own, deepspeeds, strict=True):
        assert ours.losses == pytest.approx(reference.losses, rel=5e-5 if is_clipped else 0.0, abs=0.0)
        assert ours.norms == pytest.approx(reference.norms, rel=1e-3 if is_clipped else 1e-6)
        for name, weight in reference.weights.items():
            rounding = 2**-7 if is_clipped else 0.0
            torch.testing.assert_close(ours.weights[name], weight, rtol=rounding, atol=1e-3 * rounding, msg=name)


def train_and_count(config: RunConfig) -> tuple[Trained, list[float], int]:
    """`train`, for each update the share of the sums whose all-reduce started in the backward pass, and the buckets."""
    from pmlm_dist.engine.bf16_optimizer import SummingBF16Optimizer

    shares, buckets = [], 0
    reduce_gradients = SummingBF16Optimizer.reduce_gradients

    def counted(self: Any, *args: Any, **settings: Any) -> None:
        nonlocal buckets
        sizes = [len(bucket.sums) for bucket in self._buckets]
        shares.append(sum(sizes[: self._num_reduced]) / sum(sizes))
        buckets = len(sizes)
        reduce_gradients(self, *args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummingBF16Optimizer, "reduce_gradients", counted)
        return train(config), shares, buckets


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"micro_batch": 4}),
        (2, {"micro_batch": 2, "gradient_clipping": 0.05}),
        (4, {"micro_batch": 1, "communication_data_type": "fp32"}),
        (4, {"micro_batch": 2, "tp": 2, "checkpointing": True}),
    ],
    ids=str,
)
def test_sums_averaged_during_the_backward_pass_equal_those_averaged_after_it(
    small_corpus: Path, tmp_path: Path, ranks: int, settings: dict[str, Any]
):
    """Only the last buckets are exposed: those of the embeddings, whose gradient is complete at the end."""
    settings = dict(settings)
    checkpointing = settings.pop("checkpointing", False)
    worlds = {}
    for overlap in (True, False):
        zero = {"stage": 1, "overlap_comm": overlap, "reduce_bucket_size": 2000, "allgather_bucket_size": 50_000}
        config = run_config(small_corpus, tmp_path / str(overlap), precision="bf16", zero_optimization=zero, **settings)
        config = with_model(config, activation_checkpointing=checkpointing)
        worlds[overlap] = run_world(train_and_count, ranks, config)
    for (during, shares, buckets), (after, no_shares, _) in zip(worlds[True], worlds[False], strict=True):
        assert during.losses == after.losses
        assert during.norms == after.norms
        assert all(torch.equal(weight, during.weights[name]) for name, weight in after.weights.items())
        assert len(shares) == len(no_shares) == len(after.losses)  # once an update
        assert buckets > 5
        assert min(shares) > 0.6
        assert set(no_shares) == {0.0}


def backward_without_the_head(config: RunConfig) -> dict[str, float]:
    """Maximum of each parameter's sum after a full step and a backward pass that does not reach the head."""
    from pmlm_dist.engine.bf16_optimizer import SummingBF16Optimizer
    from pmlm_dist.training.pretraining import build_engine

    run = start_run(config)
    engine: Any = build_engine(run)
    take_steps(run, engine, RunState(), steps=1)
    optimizer, model = engine.optimizer, engine.module
    assert type(optimizer) is SummingBF16Optimizer
    engine.backward(model.embeddings.token.weight.float().square().sum())
    assert all(parameter.grad is None for parameter in model.parameters())  # freed
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
    return {
        names[id(parameter)]: float(total.abs().max())
        for parameters, sums in groups
        for parameter, total in zip(parameters, sums, strict=True)
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_parameter_without_a_gradient_has_a_sum_of_zero(small_corpus: Path, tmp_path: Path, ranks: int):
    config = run_config(small_corpus, tmp_path, precision="bf16", micro_batch=8 // ranks)
    for largest in run_world(backward_without_the_head, ranks, config):
        assert largest.pop("embeddings.token.weight") > 0
        assert set(largest.values()) == {0.0}


def norms_around_a_nonfinite_step(
    config: RunConfig,
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Norms of a step, one with an infinite gradient, and one more; weights before and after the second."""
    from pmlm_dist.training.pretraining import PretrainJob, build_engine

    run = start_run(config)
    engine = build_engine(run)
    state, _, first = take_steps(run, engine, RunState(), steps=1)
    before = whole_weights(engine.module)
    scale = PretrainJob.loss_scale
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainJob, "loss_scale", lambda *args: scale(*args) * float("inf"))
        state, _, nonfinite = take_steps(run, engine, state, steps=1)
    after = whole_weights(engine.module)
    _, _, last = take_steps(run, engine, state, steps=1)
    return first + nonfinite + last, before, after


def test_nonfinite_gradient_has_no_effect_on_later_steps(small_corpus: Path, tmp_path: Path):
    config = run_config(small_corpus, tmp_path, precision="bf16", micro_batch=8)
    norms, before, after = run_world(norms_around_a_nonfinite_step, 1, config)[0]
    assert norms[1] == 0.0  # skipped
    assert 0 < norms[2] < 2 * norms[0]
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
