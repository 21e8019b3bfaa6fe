"""Losses and accuracies against a loop over every prediction."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pmlm_dist.objectives import LossMeans, LossSums, loss_sums
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.cross_entropy import most_likely, token_nll

B, M, V = 3, 5, 11


def example(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    weights_BM = torch.ones(B, M)
    weights_BM[1, 3:] = 0.0
    return {
        "logits_2MBV": 3 * torch.randn(2, M, B, V, generator=random),
        "targets_BM": torch.randint(V, (B, M), generator=random),
        "weights_BM": weights_BM,
        "masked_BM": torch.rand(B, M, generator=random) < 0.7,
    }


def sums_of(tensors: dict[str, torch.Tensor]) -> LossSums:
    groups.start()
    return loss_sums(**tensors, token_nll=token_nll, most_likely=most_likely)


def by_hand(logits_2MBV, targets_BM, weights_BM, masked_BM) -> LossMeans:
    nll, right, masked_nll, masked_right, n, masked_n = [0.0, 0.0], [0, 0], 0.0, 0, 0, 0
    for b in range(B):
        for m in range(M):
            if weights_BM[b, m] == 0:
                continue
            target = int(targets_BM[b, m])
            losses, hits = [], []
            for objective in range(2):
                row = logits_2MBV[objective, m, b].double()
                losses.append(float(torch.logsumexp(row, 0) - row[target]))
                hits.append(int(row.argmax()) == target)
            nll = [total + loss for total, loss in zip(nll, losses, strict=True)]
            right = [total + hit for total, hit in zip(right, hits, strict=True)]
            n += 1
            if masked_BM[b, m]:
                masked_nll, masked_right, masked_n = masked_nll + losses[1], masked_right + hits[1], masked_n + 1
    return LossMeans(
        total=sum(nll) / n,
        ae=nll[0] / n,
        par=nll[1] / n,
        ae_accuracy=right[0] / n,
        par_accuracy=right[1] / n,
        par_masked=masked_nll / masked_n,
        par_masked_accuracy=masked_right / masked_n,
    )


@pytest.mark.parametrize("seed", range(3))
def test_means_equal_a_loop_over_predictions(seed):
    tensors = example(seed)
    expected = by_hand(**tensors)
    found = LossMeans.from_counts(sums_of(tensors).counts())
    for name, value in vars(expected).items():
        assert math.isclose(getattr(found, name), value, rel_tol=1e-5), name


def test_loss_is_the_sum_of_both_objectives_and_has_their_gradient():
    tensors = example()
    logits = tensors["logits_2MBV"].requires_grad_()
    sums = sums_of(tensors)
    sums.loss.backward()
    assert torch.allclose(sums.loss, sums.nll_2.sum())
    probabilities = logits.detach().softmax(-1)
    targets = F.one_hot(tensors["targets_BM"].t().expand(2, -1, -1), V)
    expected = (probabilities - targets) * tensors["weights_BM"].t()[None, :, :, None]
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-6)


def test_sums_of_parts_add_up_to_the_sums_of_the_whole():
    tensors = example()
    halves = [
        {name: tensor[..., part, :] if name == "logits_2MBV" else tensor[part] for name, tensor in tensors.items()}
        for part in (slice(0, 1), slice(1, B))
    ]
    added = sum((sums_of(half).counts() for half in halves), torch.zeros(8))
    torch.testing.assert_close(added, sums_of(tensors).counts(), rtol=1e-6, atol=1e-6)
