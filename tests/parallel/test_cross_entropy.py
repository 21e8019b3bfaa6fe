"""The fused loss against torch's cross entropy of full logits, in loss and gradients, in several precisions."""

import pytest
import torch
import torch.nn.functional as F

from pmlm_dist.parallel import cross_entropy, groups
from pmlm_dist.parallel.cross_entropy import tied_cross_entropy, tied_logits


def reference(x, weight, bias, targets, gradient):
    """Loss and gradients in fp64 through `tied_logits`."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    logits = tied_logits(*inputs)
    nll = F.cross_entropy(logits, targets, reduction="none")
    return nll.detach(), logits.argmax(-1) == targets, torch.autograd.grad(nll, inputs, gradient.double())


@pytest.mark.parametrize("spread", [0.1, 5.0, 40.0])  # of the logits: nearly uniform, as trained, nearly one-hot
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_loss_and_gradients_equal_reference(monkeypatch, dtype, tolerance, spread):
    groups.init_process_groups()
    monkeypatch.setattr(cross_entropy, "_CHUNK_ON_CPU", 3 * 37)  # several chunks, the last one smaller
    random = torch.Generator().manual_seed(1)
    x = (spread * torch.randn(20, 8, generator=random)).to(dtype).requires_grad_()
    weight = (torch.randn(37, 8, generator=random) / 8**0.5).to(dtype).requires_grad_()
    bias = torch.randn(37, generator=random).to(dtype)
    bias[-3:] = float("-inf")
    bias.requires_grad_()
    targets = torch.randint(34, (20,), generator=random)
    targets[:10] = tied_logits(x, weight, bias).argmax(-1)[:10]
    gradient = torch.rand(20, generator=random)
    expected_nll, expected_correct, expected = reference(x, weight, bias, targets, gradient)
    nll, correct = tied_cross_entropy(x, weight, bias, targets)
    actual = torch.autograd.grad(nll, (x, weight, bias), gradient.to(nll.dtype))
    assert nll.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(nll.double(), expected_nll, rtol=tolerance, atol=tolerance * max(1.0, spread))
    if dtype != torch.bfloat16:  # rounded logits may tie or change their order
        assert torch.equal(correct, expected_correct)
    for gradient, expected_gradient in zip(actual, expected, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - expected_gradient).norm() <= tolerance * max(1.0, expected_gradient.norm())


def test_leading_dimensions_are_kept_and_padding_has_no_gradient():
    groups.init_process_groups()
    x, weight, bias = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True), torch.zeros(7)
    bias[5:] = float("-inf")
    targets = torch.randint(5, (2, 3))
    nll, correct = tied_cross_entropy(x, weight, bias, targets)
    assert nll.shape == correct.shape == (2, 3)
    nll.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad[5:], torch.zeros(2, 4))
    assert (weight.grad[:5] != 0).any(dim=1).all()


def test_tie_is_not_correct():
    groups.init_process_groups()
    weight = torch.tensor([[1.0], [1.0], [0.5]])
    _, correct = tied_cross_entropy(torch.ones(3, 1), weight, torch.zeros(3), torch.tensor([0, 1, 2]))
    assert not correct.any()
    _, correct = tied_cross_entropy(torch.full((1, 1), -1.0), weight, torch.zeros(3), torch.tensor([2]))
    assert correct.all()
