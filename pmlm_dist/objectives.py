"""Autoencoding (AE) and partially autoregressive (PAR) losses on the same predicted positions.

AE reads position m at its [M] slot in the corrupted text; PAR reads it at its pseudo mask, which sees the originals of
earlier factorization steps. Each is the mean negative log-likelihood over the predicted positions of the whole step;
the loss is their weighted sum, both weights 1 in the paper (UniLMv2, equation 6). Pure: tensors in, tensors out.

Legend: B batch, M predictions a sample, K objectives read (AE before PAR).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pmlm_dist.config import ObjectiveConfig

OBJECTIVES = {"ae+par": ("ae", "par"), "ae": ("ae",), "par": ("par",), "ar": ("par",), "ae+ar": ("ae", "par")}
"""What each objective reads: AR is PAR over spans of one token."""

NUM_COUNTS = 9


def target_weights(objective: ObjectiveConfig, weights_BM: Tensor, kept_BM: Tensor) -> Tensor:
    """1 for every target that counts, else 0: [K, B, M].

    `weights_BM` is 0 for unused prediction slots; `kept_BM` tells where the [M] slot shows the original token, targets
    that PAR leaves out with `drop_kept`.
    """
    par_BM = weights_BM * ~kept_BM if objective.drop_kept else weights_BM
    by_name = {"ae": weights_BM, "par": par_BM}
    return torch.stack([by_name[name] for name in OBJECTIVES[objective.kind]])


def loss_scales(objective: ObjectiveConfig, targets_K: Tensor) -> Tensor:
    """Factor [K] of each objective's summed negative log-likelihood: its weight / its number of targets `targets_K`."""
    by_name = {"ae": objective.ae_weight, "par": objective.par_weight}
    weights_K = torch.tensor([by_name[name] for name in OBJECTIVES[objective.kind]], device=targets_K.device)
    return weights_K / targets_K.clamp(min=1.0)


@dataclass(frozen=True)
class LossSums:
    """Sums over the targets of some micro-batches, in fp32.

    `nll_K` [K] are the negative log-likelihoods by objective, to differentiate. `counts` [9] are the detached sums
    that `LossMeans.from_counts` reads.
    """

    nll_K: Tensor
    counts: Tensor


@dataclass(frozen=True)
class LossMeans:
    """Means per target: losses in nats, accuracies as shares; None for an objective that was not read.

    PAR reads the answer of a kept token, so `par_masked*`, on slots that hold [MASK] alone, tell learning. `total` is
    the weighted sum that is minimised.
    """

    total: float
    ae: float | None
    par: float | None
    ae_accuracy: float | None
    par_accuracy: float | None
    par_masked: float | None
    par_masked_accuracy: float | None

    @classmethod
    def from_counts(cls, counts: Tensor, objective: ObjectiveConfig) -> LossMeans:
        """Means from a vector [9] of sums (see `LossSums.counts`), added up over micro-batches and ranks."""
        ae, par, ae_right, par_right, ae_n, par_n, masked, masked_right, masked_n = counts.double().tolist()
        weighted = objective.ae_weight * ae / max(ae_n, 1.0) + objective.par_weight * par / max(par_n, 1.0)
        return cls(
            total=weighted,
            ae=_mean(ae, ae_n),
            par=_mean(par, par_n),
            ae_accuracy=_mean(ae_right, ae_n),
            par_accuracy=_mean(par_right, par_n),
            par_masked=_mean(masked, masked_n),
            par_masked_accuracy=_mean(masked_right, masked_n),
        )


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def loss_sums(
    nll_KMB: Tensor, right_KMB: Tensor, weights_KBM: Tensor, masked_BM: Tensor, *, objective: ObjectiveConfig
) -> LossSums:
    """The objectives' sums for one micro-batch.

    `nll_KMB` are the targets' losses, `right_KMB` tells which targets won; `weights_KBM` as `target_weights` gives
    them; `masked_BM` tells which [M] slots hold [MASK].
    """
    weights_KMB = weights_KBM.transpose(1, 2)
    right_KMB = right_KMB * weights_KMB
    nll_KMB = nll_KMB * weights_KMB
    nll_K = nll_KMB.sum(dim=(1, 2))
    names = OBJECTIVES[objective.kind]
    by_name = {
        name: torch.stack([nll_K[k].detach(), right_KMB[k].sum(), weights_KMB[k].sum()]) for k, name in enumerate(names)
    }
    nothing = torch.zeros(3, device=nll_K.device)
    masked = nothing
    if "par" in names:
        masked_MB = masked_BM.t()
        par = [nll_KMB[-1].detach(), right_KMB[-1], weights_KMB[-1]]
        masked = torch.stack([(values * masked_MB).sum() for values in par])
    pairs_32 = torch.stack([by_name.get("ae", nothing), by_name.get("par", nothing)], dim=1)
    return LossSums(nll_K=nll_K, counts=torch.cat([pairs_32.flatten(), masked]))
