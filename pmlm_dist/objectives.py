"""Autoencoding (AE) and partially autoregressive (PAR) losses on the same predicted positions.

AE reads position m at its [M] slot in the corrupted text; PAR reads it at its pseudo mask, which sees the originals of
earlier factorization steps. Each is the mean negative log-likelihood over the predicted positions of the whole step;
the loss is their unweighted sum (UniLMv2, equation 6). Pure: tensors in, tensors out.

Legend: B batch, M predictions a sample, V vocabulary rows of this rank; the leading 2 is (AE, PAR).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

OBJECTIVES = ("ae", "par")


@dataclass(frozen=True)
class LossSums:
    """Sums over the predicted positions of some micro-batches; fp32 tensors, detached but for `loss`.

    `loss` is the scalar to differentiate: the sum of both objectives' negative log-likelihoods. `nll_2` and `correct_2`
    are per objective; `masked_correct` and `masked_nll` count PAR on those slots alone that hold [MASK] (PAR reads the
    answer of a kept token, so only these tell learning). `predictions` and `masked_predictions` are the counts.
    `likely_2MB` are the most likely ids themselves.
    """

    loss: Tensor
    nll_2: Tensor
    correct_2: Tensor
    predictions: Tensor
    masked_nll: Tensor
    masked_correct: Tensor
    masked_predictions: Tensor
    likely_2MB: Tensor

    def counts(self) -> Tensor:
        """The detached sums as one vector [8], in the order that `LossMeans.from_counts` reads."""
        rest = [self.predictions, self.masked_nll, self.masked_correct, self.masked_predictions]
        return torch.cat([self.nll_2, self.correct_2, torch.stack(rest)])


@dataclass(frozen=True)
class LossMeans:
    """Means per predicted position: losses in nats, accuracies as shares. `par_masked_*`: on [MASK] slots alone."""

    total: float
    ae: float
    par: float
    ae_accuracy: float
    par_accuracy: float
    par_masked: float
    par_masked_accuracy: float

    @classmethod
    def from_counts(cls, counts: Tensor) -> LossMeans:
        """Means from a vector [8] of sums (see `LossSums.counts`), added up over micro-batches and ranks."""
        ae, par, ae_correct, par_correct, n, masked, masked_correct, masked_n = counts.double().tolist()
        return cls(
            total=(ae + par) / n,
            ae=ae / n,
            par=par / n,
            ae_accuracy=ae_correct / n,
            par_accuracy=par_correct / n,
            par_masked=masked / max(masked_n, 1.0),
            par_masked_accuracy=masked_correct / max(masked_n, 1.0),
        )


def loss_sums(
    logits_2MBV: Tensor,
    targets_BM: Tensor,
    weights_BM: Tensor,
    masked_BM: Tensor,
    *,
    token_nll: Callable[[Tensor, Tensor], Tensor],
    most_likely: Callable[[Tensor], Tensor],
) -> LossSums:
    """Both objectives' sums for one micro-batch.

    `weights_BM` is 0 for unused predictions, `masked_BM` tells which [M] slots hold [MASK]. `token_nll(logits [..., V],
    targets [...])` and `most_likely(logits)` know how the vocabulary is split; the first may overwrite the logits.
    """
    targets_2MB = targets_BM.t().expand(2, -1, -1)
    weights_MB = weights_BM.t()
    masked_MB = weights_MB * masked_BM.t()
    likely_2MB = most_likely(logits_2MBV.detach())
    correct_2MB = (likely_2MB == targets_2MB).float()
    nll_2MB = token_nll(logits_2MBV, targets_2MB)
    weighted_2MB = nll_2MB * weights_MB
    return LossSums(
        loss=weighted_2MB.sum(),
        nll_2=weighted_2MB.detach().sum(dim=(1, 2)),
        correct_2=(correct_2MB * weights_MB).sum(dim=(1, 2)),
        predictions=weights_MB.sum(),
        masked_nll=(nll_2MB[1].detach() * masked_MB).sum(),
        masked_correct=(correct_2MB[1] * masked_MB).sum(),
        masked_predictions=masked_MB.sum(),
        likely_2MB=likely_2MB,
    )
