"""All attention backends on a GPU, forward and backward, against `reference` in fp64 on the CPU."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from support.batches import MODEL, logits_of, model_of, random_batch
from support.long_rows import errors_of_fused
from torch import Tensor

from pmlm_dist.config import MaskingConfig
from pmlm_dist.data.batch import Batch
from pmlm_dist.model.attention import ATTENTION_BACKENDS
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.cross_entropy import tied_cross_entropy

pytestmark = pytest.mark.gpu

SHAPE = replace(MODEL, hidden_size=128, num_heads=2, ffn_size=256, max_positions=300, initializer_range=0.1)
DEVICE = torch.device("cuda", 0)


@cache
def batch() -> Batch:
    """S = 300, T = 480: full, mixed and empty blocks, a partial last block, two shorter samples."""
    return random_batch(length=300, masking=MaskingConfig(rate=0.3))


def outcome(
    attention: str, dtype: torch.dtype, device: torch.device, *, computed: torch.dtype, **changes: bool
) -> dict[str, Tensor]:
    """Logits and gradients, in fp64 on the CPU, of a model with weights rounded to `dtype`, in precision `computed`."""
    model = model_of(SHAPE, dtype=dtype, attention=attention, **changes).to(device, computed)
    logits = logits_of(model, batch().to(device))[..., : SHAPE.vocab_size]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (logits * weights.to(device, computed)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return {name: tensor.detach().double().cpu() for name, tensor in {"logits": logits, **gradients}.items()}


@cache
def exact(dtype: torch.dtype, *, relative_bias: bool) -> dict[str, Tensor]:
    """Outcome with weights rounded to `dtype` and no further rounding."""
    return outcome("reference", dtype, torch.device("cpu"), computed=torch.float64, relative_bias=relative_bias)


def errors(attention: str, dtype: torch.dtype, *, relative_bias: bool, checkpointing: bool = False) -> dict[str, float]:
    """Root mean square errors of logits and gradients, relative to the root mean square of the exact values."""
    expected = exact(dtype, relative_bias=relative_bias)
    actual = outcome(
        attention, dtype, DEVICE, computed=dtype, relative_bias=relative_bias, activation_checkpointing=checkpointing
    )
    return {
        name: float((actual[name] - expected[name]).square().mean().sqrt() / expected[name].square().mean().sqrt())
        for name in expected
    }


@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("attention", sorted(ATTENTION_BACKENDS))
def test_fp32_error_is_that_of_rounding(attention, relative_bias):
    """On a CPU the largest of these errors is 3e-6."""
    for name, error in errors(attention, torch.float32, relative_bias=relative_bias).items():
        assert error < 5e-5, name


@pytest.mark.parametrize("attention", sorted(set(ATTENTION_BACKENDS) - {"reference"}))
def test_bf16_error_is_comparable_to_reference(attention):
    """bf16 has 8 bits. On a CPU `reference` has errors up to 10 % of a gradient, the others up to 1.9 times that."""
    reference = errors("reference", torch.bfloat16, relative_bias=True)
    assert max(reference.values()) < 0.2
    for name, error in errors(attention, torch.bfloat16, relative_bias=True).items():
        assert error < 3.0 * reference[name] + 1e-3, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
@pytest.mark.parametrize("length", [1024, 2048])
def test_fused_error_on_long_rows_is_that_of_rounding(length, dtype, tolerance):
    """Its softmax is in place, and torch has another kernel for rows longer than 1,024. On a CPU: 1e-6 and 0.01."""
    for name, error in errors_of_fused(length, dtype, DEVICE).items():
        assert error < tolerance, name


def test_triton_error_with_activation_checkpointing_is_that_of_rounding():
    for name, error in errors("triton", torch.float32, relative_bias=True, checkpointing=True).items():
        assert error < 5e-5, name


@pytest.mark.parametrize("objectives", [("ae", "par"), ("ae",), ("par",)], ids=str)
def test_triton_evaluation_equals_training(objectives):
    """Without gradients torch may choose another kernel, in particular for few queries."""
    model = model_of(SHAPE, dtype=torch.float32, attention="triton").to(DEVICE)
    inputs = batch().to(DEVICE).inputs
    trained = model(inputs=inputs, objectives=objectives)[..., : SHAPE.vocab_size].detach()
    with torch.no_grad():
        evaluated = model(inputs=inputs, objectives=objectives)[..., : SHAPE.vocab_size]
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-4)


def test_gradients_of_the_loss_repeat_bit_for_bit():
    """Targets repeat as in text; the gradient of a frequent one has many addends."""
    groups.init_process_groups()
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=random).to(DEVICE, torch.bfloat16) for shape in ((3000, 64), (500, 64)))
    bias = torch.zeros(500, dtype=torch.bfloat16, device=DEVICE)
    targets = (torch.rand(3000, generator=random) ** 4 * 500).long().to(DEVICE)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    runs = [torch.autograd.grad(tied_cross_entropy(x, weight, bias, targets)[0].sum(), inputs) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(gradient, again) for gradient, again in zip(runs[0], other, strict=True))
