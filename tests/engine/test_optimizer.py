"""Learning rate schedule, weight decay groups, and the gradient norm over several ranks."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_runs import MODEL
from support.worlds import run_world
from torch import nn

from pmlm_dist.config import OptimConfig
from pmlm_dist.engine.optimizer import learning_rate, parameter_groups, set_learning_rate


def rates(*, steps: int, warmup: int, peak: float) -> list[float]:
    optim = OptimConfig(peak_lr=peak, warmup_steps=warmup)
    return [learning_rate(step, steps=steps, optim=optim) for step in range(1, steps + 1)]


def test_schedule_of_a_short_run_equals_hand_computed_rates():
    by_hand = [0.3, 0.6, 0.9, 1.2, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates(steps=10, warmup=4, peak=1.2) == pytest.approx(by_hand)


def test_first_step_without_warmup_has_the_peak_rate():
    assert rates(steps=4, warmup=0, peak=1.0) == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_published_schedule_at_its_corners():
    optim, steps = OptimConfig(), 500_000
    assert learning_rate(1, steps=steps, optim=optim) == pytest.approx(6e-4 / 24_000)
    assert learning_rate(24_000, steps=steps, optim=optim) == 6e-4
    assert learning_rate(262_001, steps=steps, optim=optim) == pytest.approx(3e-4)
    assert 0.0 < learning_rate(steps, steps=steps, optim=optim) < 2e-9


@given(st.integers(1, 300), st.data())
def test_learning_rate_is_positive_and_at_most_the_peak(steps: int, data: st.DataObject):
    warmup = data.draw(st.integers(0, steps - 1))
    schedule = rates(steps=steps, warmup=warmup, peak=2.0)
    assert all(0.0 < rate <= 2.0 for rate in schedule)
    assert max(schedule) == 2.0
    assert schedule[: warmup + 1] == sorted(schedule[: warmup + 1])
    assert schedule[warmup:] == sorted(schedule[warmup:], reverse=True)


def test_learning_rate_after_the_last_step_is_zero():
    assert learning_rate(12, steps=10, optim=OptimConfig(warmup_steps=2)) == 0.0


def test_set_learning_rate_sets_every_group():
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(2))]} for _ in range(2)], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def small_model(**changes: Any) -> nn.Module:
    """The model of the small runs, initialized; needs process groups."""
    from dataclasses import replace

    from pmlm_dist.model.transformer import build_model
    from pmlm_dist.parallel import seeding

    seeding.seed_initialization(3)
    return build_model(replace(MODEL, vocab_size=125, **changes), padded_vocab_size=128)


def groups_by_name(relative_bias: bool) -> dict[str, tuple[float, list[str]]]:
    """Weight decay and parameter names of each group."""
    from pmlm_dist.parallel import groups

    groups.init_process_groups()
    model = small_model(relative_bias=relative_bias)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        group["name"]: (group["weight_decay"], sorted(names[p] for p in group["params"]))
        for group in parameter_groups(model, weight_decay=0.25)
    }


@pytest.mark.parametrize("relative_bias", [True, False])
def test_only_matrices_have_weight_decay(relative_bias: bool):
    (parameters,) = run_world(groups_by_name, 1, relative_bias)
    layer = ["attention.query", "attention.key_value", "attention.output", "ffn_in", "ffn_out"]
    norms = ["attention_norm", "ffn_norm"]
    matrices = [
        *(f"embeddings.{table}.weight" for table in ("token", "position", "segment")),
        *(f"layers.{number}.{name}.weight" for number in range(MODEL.num_layers) for name in layer),
        "head.dense.weight",
    ]
    vectors = [
        *(f"layers.{number}.{name}.bias" for number in range(MODEL.num_layers) for name in [*layer, *norms]),
        *(f"layers.{number}.{name}.weight" for number in range(MODEL.num_layers) for name in norms),
        *("embeddings.norm.weight", "embeddings.norm.bias"),
        *("head.dense.bias", "head.norm.weight", "head.norm.bias", "head.bias"),
    ]
    if relative_bias:
        vectors.append("relative_bias.weight")
    assert parameters == {"decayed": (0.25, sorted(matrices)), "plain": (0.0, sorted(vectors))}


def norms_of_weights(tp: int) -> tuple[float, float]:
    """`gradient_norm` with every parameter as its own gradient, and the 2-norm of this rank's shards alone."""
    from pmlm_dist.engine.optimizer import gradient_norm
    from pmlm_dist.parallel import groups

    topology = groups.init_process_groups(tp=tp)
    model = small_model()
    squares = 0.0
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
        squares += float(parameter.grad.double().square().sum())
    return gradient_norm(model, topology), math.sqrt(squares)


@pytest.mark.distributed
def test_gradient_norm_over_tensor_parallel_ranks_equals_that_of_one_rank():
    ((single, by_hand),) = run_world(norms_of_weights, 1, 1)
    assert single == pytest.approx(by_hand, rel=1e-6)  # summed in fp32, as in DeepSpeed
    for tp, ranks in ((2, 2), (2, 4)):
        answers = run_world(norms_of_weights, ranks, tp)
        assert [norm for norm, _ in answers] == pytest.approx([single] * ranks, rel=1e-6)
        assert all(part < 0.999 * single for _, part in answers)  # one rank alone has less
