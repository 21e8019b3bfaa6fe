"""Fused attention against the reference under autograd: outputs and gradients, with and without dropout."""

import pytest
import torch
from support.long_rows import errors_of_fused

from pmlm_dist.model import fused_attention
from pmlm_dist.model.attention import QueryGroup, attention_fused, attention_reference

B, H, D, S, M = 3, 2, 8, 10, 3
T = S + 2 * M


def leaves(dtype: torch.dtype, *, shared: bool) -> list[torch.Tensor]:
    """Queries, keys and values, bias of the context (`shared`: the same for all samples) and of the appended slots."""
    random = torch.Generator().manual_seed(0)
    shapes = [(T, B, H, D), (T, B, H, 2, D), (H, 1 if shared else B, S, S), (H, B, 2 * M, T)]
    tensors = [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes]
    for bias in tensors[2:]:
        bias[torch.rand(bias.shape, generator=random) < 0.3] = float("-inf")
        bias[..., 0] = 0.0
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def outcome(attend, dtype: torch.dtype, *, dropout: float = 0.0, shared: bool = True) -> list[torch.Tensor]:
    q, kv, *biases = tensors = leaves(dtype, shared=shared)
    context, appended, everything = slice(0, S), slice(S, T), slice(0, T)
    padding = torch.zeros(B, S, dtype=dtype)
    padding[1, 7:] = float("-inf")
    groups = (QueryGroup(context, context, biases[0], padding), QueryGroup(appended, everything, biases[1]))
    torch.manual_seed(5)
    mixed = attend(q, kv, groups, dropout=dropout)
    weights = torch.linspace(-1, 1, mixed.numel(), dtype=dtype).view_as(mixed)
    return [mixed, *torch.autograd.grad((mixed * weights).sum(), tensors)]


@pytest.mark.parametrize("pairs", [1, 2 * S * S, 2**20], ids=["one sample", "two samples", "several heads"])
@pytest.mark.parametrize("shared", [True, False])
def test_outputs_and_gradients_equal_reference_in_fp64(monkeypatch, shared, pairs):
    monkeypatch.setattr(fused_attention, "_SCORES_PER_THREAD", pairs // torch.get_num_threads())
    actual, expected = (
        outcome(attend, torch.float64, shared=shared) for attend in (attention_fused, attention_reference)
    )
    for own, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_with_dropout_equal_finite_differences(shared):
    """The same seed drops the same pairs in every evaluation."""

    def attend(q, kv, *biases):
        torch.manual_seed(7)
        keys = slice(0, T)
        groups = [QueryGroup(slice(0, S), slice(0, S), biases[0]), QueryGroup(slice(S, T), keys, biases[1])]
        return attention_fused(q, kv, tuple(groups), dropout=0.4)

    q, kv, *biases = leaves(torch.float64, shared=shared)
    finite = [bias.detach().clamp(min=-3.0).requires_grad_() for bias in biases]
    assert torch.autograd.gradcheck(attend, (q, kv, *finite), fast_mode=True)


def test_dropout_keeps_mean_and_has_variance():
    q, kv, *_ = leaves(torch.float64, shared=True)
    group = (QueryGroup(slice(0, T), slice(0, T), None),)
    torch.manual_seed(0)
    draws = torch.stack([attention_fused(q, kv, group, dropout=0.4) for _ in range(400)])
    expected = attention_reference(q, kv, group, dropout=0.0)
    assert draws.std(dim=0).min() > 0.01
    error = (draws.mean(dim=0) - expected) / (draws.std(dim=0) / 20)
    assert error.abs().max() < 6  # standard errors, of 1,536 values


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
def test_error_on_rows_of_2048_is_that_of_rounding(dtype, tolerance):
    for name, error in errors_of_fused(2048, dtype, torch.device("cpu")).items():
        assert error < tolerance, name


def test_bf16_error_is_that_of_rounding():
    """bf16 has 8 bits: sums of 16 terms of magnitude 1 have errors of some hundredths."""
    actual, expected = outcome(attention_fused, torch.bfloat16), outcome(attention_reference, torch.float64)
    for own, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(own.double(), reference, rtol=0.05, atol=0.05)
