"""Kernels of the slot-by-slot parts of a layer against operations of torch, in Triton's interpreter."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.batches import model_of, random_batch
from torch import Tensor

from pmlm_dist.model import elementwise, elementwise_kernels
from pmlm_dist.model.elementwise import ResidualNorm, bias_gelu, residual_norm

EPS = 1e-6


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program has several rows, and a row several blocks of columns."""
    monkeypatch.setattr(elementwise, "PROGRAMS", 3)
    monkeypatch.setattr(elementwise, "GELU_PROGRAMS", 3)
    monkeypatch.setattr(elementwise_kernels, "BLOCK", 16)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def check_equal(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Compare values and gradients."""
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad((actual * weights).sum(), inputs, retain_graph=True),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [24, 32])
@pytest.mark.parametrize("uses", ["product", "residual", "both"])
def test_residual_norm_equals_torch(size, uses):
    """The gradients of both uses of the result are added in the kernel."""
    x, update, *vectors = inputs = tensors((5, 2, size), (5, 2, size), *[(size,)] * 3)
    first, second = residual_norm(*inputs, eps=EPS, dropout=0.0)
    expected = F.layer_norm(x + update + vectors[0], (size,), vectors[1], vectors[2], EPS)
    assert torch.equal(first, second)
    if uses == "both":
        check_equal(first + 2 * second, 3 * expected, inputs)
    else:
        check_equal(first if uses == "product" else second, expected, inputs)


def test_residual_norm_drops_the_same_numbers_in_both_directions():
    size = 24
    x, update, *vectors = inputs = tensors((40, size), (40, size), *[(size,)] * 3)
    torch.manual_seed(1)
    actual, _ = residual_norm(*inputs, eps=EPS, dropout=0.3)
    ones = [torch.zeros(40, size), torch.ones(40, size), torch.zeros(size), torch.ones(size), torch.zeros(size)]
    torch.manual_seed(1)
    normalized, _ = residual_norm(*ones, eps=0.0, dropout=0.3)
    is_kept = normalized > 0  # a row of ones and zeros, of which ones are above the mean
    assert 0.6 < float(is_kept.float().mean()) < 0.8
    kept_update = (update + vectors[0]) * is_kept / 0.7
    check_equal(actual, F.layer_norm(x + kept_update, (size,), vectors[1], vectors[2], EPS), inputs)


def test_rows_do_not_drop_the_same_numbers():
    ones = [torch.zeros(8, 64), torch.ones(8, 64), torch.zeros(64), torch.ones(64), torch.zeros(64)]
    out, _ = residual_norm(*ones, eps=0.0, dropout=0.5)
    assert len({tuple(row) for row in (out > 0).tolist()}) == 8


def test_bias_gelu_equals_torch():
    x, bias = inputs = tensors((5, 2, 40), (40,))
    check_equal(bias_gelu(x, bias), F.gelu(x + bias), inputs)


def test_low_precision_is_rounded_once():
    x, bias = (tensor.detach().half().requires_grad_() for tensor in tensors((50, 40), (40,)))
    exact = torch.autograd.grad(F.gelu(x.float() + bias.float()).sum(), bias)[0].float()
    gradient = torch.autograd.grad(bias_gelu(x, bias).float().sum(), bias)[0]
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient.float(), exact, rtol=1e-3, atol=1e-3)


def test_model_by_kernels_equals_model_by_torch(monkeypatch: pytest.MonkeyPatch):
    """What a GPU computes: attention, residual norms and GELU of all layers by kernels, products without bias."""
    make = partial(model_of, num_heads=2, num_layers=2, dtype=torch.float32)
    batch = random_batch(batch=2)

    def outcome(model: Any) -> dict[str, Tensor]:
        states = model.encode(batch.inputs)
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        return {"states": states.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    expected = outcome(make(attention="reference"))
    monkeypatch.setattr(elementwise, "_by_kernels", lambda _: True)
    actual = outcome(make(attention="triton"))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()), msg=name)
    assert isinstance(make().get_submodule("layers.0.ffn_norm"), ResidualNorm)
