"""Autoencoding (AE) and partially autoregressive (PAR) losses on the same predicted positions.

AE predicts the token of position m at its base slot in the corrupted text. PAR predicts it at its pseudo mask, which
attends to the originals of earlier factorization steps. Each loss is the mean negative log-likelihood over the
predicted positions of the whole step. The total is their weighted sum; both weights are 1 in the paper (UniLMv2,
equation 6). Pure functions of tensors.

    nll, correct [K, M, B] --weights--> LossSums --summed over micro-batches and ranks--> LossMeans

Legend: B batch, M predictions a sample, K objectives (AE before PAR).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pmlm_dist.config import ObjectiveConfig

OBJECTIVES = {"ae+par": ("ae", "par"), "ae": ("ae",), "par": ("par",), "ar": ("par",), "ae+ar": ("ae", "par")}
"""Losses of each kind of objective. AR is PAR over spans of one token."""

NUM_COUNTS = 12
"""Length of `LossSums.counts`."""


def target_weights(objective: ObjectiveConfig, weights_BM: Tensor, *, kept_BM: Tensor, prefix_BM: Tensor) -> Tensor:
    """1 for every target that counts, else 0: [K, B, M].

    `weights_BM` is 0 for unused prediction slots. `kept_BM` is True where the base slot holds the original token; PAR
    skips these targets with `drop_kept`. `prefix_BM` is True where there is no base slot; AE skips these.
    """
    par_BM = weights_BM * ~kept_BM if objective.drop_kept else weights_BM
    by_name = {"ae": weights_BM * ~prefix_BM, "par": par_BM}
    return torch.stack([by_name[name] for name in OBJECTIVES[objective.kind]])


def loss_scales(objective: ObjectiveConfig, targets_K: Tensor) -> Tensor:
    """Factor [K] of each objective's summed negative log-likelihood: its weight / its number of targets `targets_K`."""
    by_name = {"ae": objective.ae_weight, "par": objective.par_weight}
    weights = [by_name[name] for name in OBJECTIVES[objective.kind]]
    # A step without targets has a sum of 0; dividing by 0 would make it NaN. Weights stay numbers of the host: copying
    # them to a device would wait for it.
    return torch.stack([weight / targets for weight, targets in zip(weights, targets_K.clamp(min=1.0), strict=True)])


@dataclass(frozen=True)
class LossSums:
    """Sums over the targets of some micro-batches, in fp32."""

    nll_K: Tensor
    """Negative log-likelihood of each objective, differentiable."""
    counts: Tensor
    """Detached sums [12], the argument of `LossMeans.from_counts`."""


@dataclass(frozen=True)
class LossMeans:
    """Means per target: losses in nats, accuracies as shares; None for an objective that is not trained.

    PAR can copy a kept token from its base slot. The `par_masked*` values, over base slots that hold [MASK], measure
    prediction alone. The other `par*` values leave out prefix samples, which have the `prefix*` values. `total` is the
    weighted sum that training minimizes, in which PAR's mean is over both.
    """

    total: float
    ae: float | None
    par: float | None
    ae_accuracy: float | None
    par_accuracy: float | None
    par_masked: float | None
    par_masked_accuracy: float | None
    prefix: float | None
    prefix_accuracy: float | None

    @classmethod
    def from_counts(cls, counts: Tensor, objective: ObjectiveConfig) -> Self:
        """Means from `LossSums.counts`, summed over micro-batches and ranks."""
        sums = counts.double().tolist()
        ae, par, ae_correct, par_correct, ae_n, par_n, masked, masked_correct, masked_n, *of_prefix = sums
        prefix, prefix_correct, prefix_n = of_prefix
        weighted = objective.ae_weight * ae / max(ae_n, 1.0) + objective.par_weight * par / max(par_n, 1.0)
        return cls(
            total=weighted,
            ae=_mean(ae, ae_n),
            par=_mean(par - prefix, par_n - prefix_n),
            ae_accuracy=_mean(ae_correct, ae_n),
            par_accuracy=_mean(par_correct - prefix_correct, par_n - prefix_n),
            par_masked=_mean(masked, masked_n),
            par_masked_accuracy=_mean(masked_correct, masked_n),
            prefix=_mean(prefix, prefix_n),
            prefix_accuracy=_mean(prefix_correct, prefix_n),
        )


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def loss_sums(
    nll_KMB: Tensor,
    correct_KMB: Tensor,
    weights_KBM: Tensor,
    *,
    masked_BM: Tensor,
    prefix_BM: Tensor,
    objective: ObjectiveConfig,
) -> LossSums:
    """Sums of the objectives for one micro-batch.

    `nll_KMB` are the losses of the targets, `correct_KMB` is True where argmax is the target, `weights_KBM` is the
    result of `target_weights`. `masked_BM` is True where the base slot holds [MASK], `prefix_BM` where there is none.
    """
    weights_KMB = weights_KBM.transpose(1, 2)
    correct_KMB = correct_KMB * weights_KMB
    nll_KMB = nll_KMB * weights_KMB
    nll_K = nll_KMB.sum(dim=(1, 2))
    names = OBJECTIVES[objective.kind]
    by_name = {
        name: torch.stack([nll_K[k].detach(), correct_KMB[k].sum(), weights_KMB[k].sum()])
        for k, name in enumerate(names)
    }
    # One vector for all counts needs a single all-reduce; it has zeros for an objective that is not trained.
    zeros_3 = torch.zeros(3, device=nll_K.device)
    subsets = [zeros_3, zeros_3]
    if "par" in names:
        par = [nll_KMB[-1].detach(), correct_KMB[-1], weights_KMB[-1]]
        subsets = [torch.stack([(values * of_BM.t()).sum() for values in par]) for of_BM in (masked_BM, prefix_BM)]
    pairs_32 = torch.stack([by_name.get("ae", zeros_3), by_name.get("par", zeros_3)], dim=1)
    return LossSums(nll_K=nll_K, counts=torch.cat([pairs_32.flatten(), *subsets]))
