"""All readings of the visibility rule on a GPU, forward and backward, against `reference` in fp64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from support.batches import MODEL, logits_of, model_of, random_batch
from torch import Tensor

from pmlm_dist.config import MaskingConfig
from pmlm_dist.data.batch import Batch
from pmlm_dist.model.attention import ATTENTION_BACKENDS

pytestmark = pytest.mark.gpu

SHAPE = replace(MODEL, hidden_size=128, num_heads=2, ffn_size=256, max_positions=300, initializer_range=0.1)
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Kernels of earlier tests do not count towards torch's limit of compiled shapes."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@cache
def batch() -> Batch:
    """S = 300, T = 480: blocks that are full, mixed and empty, the last one cut; two shorter samples."""
    return random_batch(length=300, masking=MaskingConfig(rate=0.3))


def outcome(
    attention: str, dtype: torch.dtype, device: torch.device, *, computed: torch.dtype, **changes: bool
) -> dict[str, Tensor]:
    """Logits and gradients, as fp64 on the CPU, of a model with weights rounded to `dtype`, `computed` in another."""
    model = model_of(SHAPE, dtype=dtype, attention=attention, **changes).to(device, computed)
    logits = logits_of(model, batch().to(device))[..., : SHAPE.vocab_size]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (logits * weights.to(device, computed)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return {name: tensor.detach().double().cpu() for name, tensor in {"logits": logits, **found}.items()}


@cache
def truth(dtype: torch.dtype, *, relative_bias: bool) -> dict[str, Tensor]:
    """What the model with weights rounded to `dtype` computes without further rounding."""
    return outcome("reference", dtype, torch.device("cpu"), computed=torch.float64, relative_bias=relative_bias)


def errors(attention: str, dtype: torch.dtype, *, relative_bias: bool, checkpointing: bool = False) -> dict[str, float]:
    """Root mean square error of logits and each gradient over the root mean square of the true one."""
    expected = truth(dtype, relative_bias=relative_bias)
    found = outcome(
        attention, dtype, DEVICE, computed=dtype, relative_bias=relative_bias, activation_checkpointing=checkpointing
    )
    return {
        name: float((found[name] - expected[name]).square().mean().sqrt() / expected[name].square().mean().sqrt())
        for name in expected
    }


@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("attention", sorted(ATTENTION_BACKENDS))
def test_fp32_errs_by_its_rounding_alone(attention, relative_bias):
    """On a CPU the largest of these errors is 3e-6."""
    for name, error in errors(attention, torch.float32, relative_bias=relative_bias).items():
        assert error < 5e-5, name


@pytest.mark.parametrize("attention", sorted(set(ATTENTION_BACKENDS) - {"reference"}))
def test_bf16_errs_about_as_much_as_dense_does(attention):
    """bf16 keeps 8 bits: on a CPU `reference` is off by up to 10 % of a gradient, the others by up to 1.9 times as much."""
    of_dense = errors("reference", torch.bfloat16, relative_bias=True)
    assert max(of_dense.values()) < 0.2
    for name, error in errors(attention, torch.bfloat16, relative_bias=True).items():
        assert error < 3.0 * of_dense[name] + 1e-3, name


def test_flex_computes_the_same_again_under_activation_checkpointing():
    for name, error in errors("flex", torch.float32, relative_bias=True, checkpointing=True).items():
        assert error < 5e-5, name


@pytest.mark.parametrize("objectives", [("ae", "par"), ("ae",), ("par",)], ids=str)
def test_flex_evaluates_on_a_gpu_as_it_trains(objectives):
    """Without gradients torch may choose another kernel, above all for few queries."""
    model = model_of(SHAPE, dtype=torch.float32, attention="flex").to(DEVICE)
    inputs = batch().to(DEVICE).inputs
    trained = model(**inputs, objectives=objectives)[..., : SHAPE.vocab_size].detach()
    with torch.no_grad():
        evaluated = model(**inputs, objectives=objectives)[..., : SHAPE.vocab_size]
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-4)
