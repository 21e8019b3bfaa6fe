"""The one-operation attention equals the plain one under autograd: outputs and gradients, with and without dropout."""

from __future__ import annotations

import pytest
import torch

from pmlm_dist.model.attention import QueryGroup, attend_at_once, attend_plainly

Z, D, S, M = 6, 8, 10, 3
T = S + 2 * M


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    q, kv = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((T, Z, D), (T, Z, 2, D)))
    biases = [torch.randn(Z, *shape, generator=random, dtype=torch.float64) for shape in ((S, S), (2 * M, T))]
    for bias in biases:
        bias[torch.rand(bias.shape, generator=random) < 0.3] = float("-inf")
        bias[:, :, 0] = 0.0
    return q.to(dtype), kv.to(dtype), [bias.to(dtype) for bias in biases]


def outcome(attend, dtype: torch.dtype, dropout: float) -> list[torch.Tensor]:
    q, kv, biases = inputs(dtype)
    leaves = [tensor.requires_grad_() for tensor in (q, kv, *biases)]
    context, appended, everything = slice(0, S), slice(S, T), slice(0, T)
    groups = (QueryGroup(context, context, biases[0]), QueryGroup(appended, everything, biases[1]))
    torch.manual_seed(5)
    mixed = attend(q, kv, groups, dropout=dropout)
    weights = torch.linspace(-1, 1, mixed.numel(), dtype=dtype).view_as(mixed)
    return [mixed, *torch.autograd.grad((mixed * weights).sum(), leaves)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equals_plain_attention_in_double_precision(dropout):
    for found, expected in zip(
        outcome(attend_at_once, torch.float64, dropout), outcome(attend_plainly, torch.float64, dropout), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_dropout_draws_something():
    kept, dropped = (outcome(attend_at_once, torch.float64, rate)[0] for rate in (0.0, 0.4))
    assert (kept - dropped).abs().max() > 0.1


def test_bf16_stays_within_its_rounding():
    """bf16 keeps 8 bits; sums of 16 terms of size about 1 are good to some hundredths."""
    for found, expected in zip(
        outcome(attend_at_once, torch.bfloat16, 0.0), outcome(attend_plainly, torch.float64, 0.0), strict=True
    ):
        torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)
