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


def test_gradient_of_a_frequent_target_is_rounded_once():
    """In bf16 a sum of equal addends stops growing at 256 times its addends."""
    groups.init_process_groups()
    x, weight = torch.full((1000, 4), 1.0).to(torch.bfloat16), torch.zeros(50, 4).to(torch.bfloat16)
    targets = torch.full((1000,), 3)
    targets[::10] = torch.arange(100) % 50
    bias = torch.zeros(50, dtype=torch.bfloat16)
    nll, _ = tied_cross_entropy(x, weight.requires_grad_(), bias.requires_grad_(), targets)
    actual = torch.autograd.grad(nll.sum(), (weight, bias))
    expected = 1000 / 50 - torch.bincount(targets, minlength=50).float()
    for gradient in (*actual[0].unbind(1), actual[1]):
        torch.testing.assert_close(gradient.float(), expected, rtol=2**-8, atol=2**-4)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("targets", [1, 3, 200])
def test_sums_by_target_equal_index_add(rows, targets):
    """Targets within a block of 128 rows, at its edges, and over several blocks."""
    random = torch.Generator().manual_seed(rows)
    targets_N = torch.randint(targets, (rows,), generator=random)
    addends_NE = torch.randn(rows, 3, generator=random, dtype=torch.float64)
    sorted_N, sums_NE = cross_entropy._sums_by_target(targets_N, addends_NE)
    expected = torch.zeros(targets, 3, dtype=torch.float64).index_add_(0, targets_N, addends_NE)
    assert torch.equal(sorted_N, targets_N.sort().values)
    torch.testing.assert_close(sums_NE, expected[sorted_N], rtol=0, atol=1e-12)


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


def test_kernel_of_the_exponentials_equals_torch(monkeypatch: pytest.MonkeyPatch):
    """In Triton's interpreter: a target elsewhere, rows that pad the vocabulary, a rank that holds padding only."""
    from pmlm_dist.parallel import cross_entropy_kernel
    from pmlm_dist.parallel.cross_entropy import _exponentiate

    monkeypatch.setattr(cross_entropy_kernel, "BLOCK", 32)
    torch.manual_seed(0)
    logits, bias, own = torch.randn(6, 100), torch.randn(100), torch.randint(0, 90, (6,))
    elsewhere = torch.tensor([False, False, True, False, True, False])
    bias[-9:] = float("-inf")
    for used in (bias, torch.full_like(bias, float("-inf"))):
        if used is not bias:
            elsewhere[:] = True
        ours, theirs = logits.clone(), logits.clone()
        actual = cross_entropy_kernel.exponentiate(ours, used, own, elsewhere)
        expected = _exponentiate(theirs, used, own, elsewhere)
        for one, other in zip((*actual, ours), (*expected, theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
