"""Losses and accuracies against a loop over all predictions, for every objective of the paper's Table 6."""

import math

import pytest
import torch
import torch.nn.functional as F

from pmlm_dist.config import ObjectiveConfig
from pmlm_dist.objectives import NUM_COUNTS, OBJECTIVES, LossMeans, LossSums, loss_scales, loss_sums, target_weights

B, M, V = 3, 5, 11
CASES = [
    *(ObjectiveConfig(kind=kind) for kind in ("ae+par", "ae", "par", "ar", "ae+ar")),
    ObjectiveConfig(ae_weight=0.3, par_weight=2.0),
    ObjectiveConfig(drop_kept=True),
    ObjectiveConfig(kind="par", drop_kept=True),
]


def example(objective: ObjectiveConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    weights_BM = torch.ones(B, M)
    weights_BM[1, 3:] = 0.0
    prefix_BM = torch.zeros(B, M, dtype=torch.bool)
    prefix_BM[2] = True
    masked_BM = (torch.rand(B, M, generator=random) < 0.6) & ~prefix_BM
    return {
        "logits_KMBV": 3 * torch.randn(len(OBJECTIVES[objective.kind]), M, B, V, generator=random),
        "targets_BM": torch.randint(V, (B, M), generator=random),
        "weights_BM": weights_BM,
        "masked_BM": masked_BM,
        "kept_BM": ~masked_BM & (torch.rand(B, M, generator=random) < 0.5) & ~prefix_BM,
        "prefix_BM": prefix_BM,
    }


def sums_of(
    objective: ObjectiveConfig, *, logits_KMBV, targets_BM, weights_BM, masked_BM, kept_BM, prefix_BM
) -> LossSums:
    targets_KMB = targets_BM.t().expand(len(logits_KMBV), -1, -1)
    return loss_sums(
        F.cross_entropy(logits_KMBV.permute(0, 3, 1, 2), targets_KMB, reduction="none"),
        logits_KMBV.argmax(-1) == targets_KMB,
        target_weights(objective, weights_BM, kept_BM=kept_BM, prefix_BM=prefix_BM),
        masked_BM=masked_BM,
        prefix_BM=prefix_BM,
        objective=objective,
    )


def longhand_means(
    objective: ObjectiveConfig, *, logits_KMBV, targets_BM, weights_BM, masked_BM, kept_BM, prefix_BM
) -> LossMeans:
    """A loop over objectives, samples and predictions."""
    entries: dict[str, list[tuple[float, bool, str]]] = {}
    for k, name in enumerate(OBJECTIVES[objective.kind]):
        for b in range(B):
            for m in range(M):
                dropped = name == "par" and objective.drop_kept and kept_BM[b, m]
                if weights_BM[b, m] == 0 or dropped or (name == "ae" and prefix_BM[b, m]):
                    continue
                kind = "prefix" if prefix_BM[b, m] else "masked" if masked_BM[b, m] else "other"
                row = logits_KMBV[k, m, b].double()
                target = int(targets_BM[b, m])
                loss = float(torch.logsumexp(row, 0) - row[target])
                entries.setdefault(name, []).append((loss, int(row.argmax()) == target, kind))

    def mean(name: str, column: int, *kinds: str) -> float | None:
        values = [float(entry[column]) for entry in entries.get(name, []) if entry[2] in kinds]
        return sum(values) / len(values) if values else None

    base = ("masked", "other")
    ae, par, of_both = mean("ae", 0, *base), mean("par", 0, *base), mean("par", 0, *base, "prefix")
    return LossMeans(
        total=objective.ae_weight * (ae or 0.0) + objective.par_weight * (of_both or 0.0),
        ae=ae,
        par=par,
        ae_accuracy=mean("ae", 1, *base),
        par_accuracy=mean("par", 1, *base),
        par_masked=mean("par", 0, "masked"),
        par_masked_accuracy=mean("par", 1, "masked"),
        prefix=mean("par", 0, "prefix"),
        prefix_accuracy=mean("par", 1, "prefix"),
    )


@pytest.mark.parametrize("objective", CASES, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_means_equal_longhand(objective, seed):
    tensors = example(objective, seed)
    expected = longhand_means(objective, **tensors)
    actual = LossMeans.from_counts(sums_of(objective, **tensors).counts, objective)
    for name, value in vars(expected).items():
        if value is None:
            assert getattr(actual, name) is None, name
        else:
            assert math.isclose(getattr(actual, name), value, rel_tol=1e-5), name


@pytest.mark.parametrize("objective", CASES, ids=str)
def test_scaled_sums_equal_weighted_means_in_value_and_gradient(objective):
    tensors = example(objective)
    logits = tensors["logits_KMBV"].requires_grad_()
    kinds = {name: tensors[name] for name in ("kept_BM", "prefix_BM")}
    targets_K = target_weights(objective, tensors["weights_BM"], **kinds).sum(dim=(1, 2))
    sums = sums_of(objective, **tensors)
    loss = (sums.nll_K * loss_scales(objective, targets_K)).sum()
    loss.backward()
    assert math.isclose(float(loss.detach()), longhand_means(objective, **tensors).total, rel_tol=1e-5)
    probabilities = logits.detach().softmax(-1)
    one_hot = F.one_hot(tensors["targets_BM"].t().expand(len(logits), -1, -1), V)
    for k, name in enumerate(OBJECTIVES[objective.kind]):
        weights = tensors["weights_BM"].clone()
        if name == "par" and objective.drop_kept:
            weights[tensors["kept_BM"]] = 0.0
        if name == "ae":
            weights[tensors["prefix_BM"]] = 0.0
        weight = objective.ae_weight if name == "ae" else objective.par_weight
        expected = (probabilities[k] - one_hot[k]) * (weights * weight / weights.sum()).t()[:, :, None]
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad[k], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objective", CASES, ids=str)
def test_sums_of_micro_batches_add_up_to_sums_of_batch(objective):
    tensors = example(objective)
    halves = [
        {name: tensor[..., part, :] if name == "logits_KMBV" else tensor[part] for name, tensor in tensors.items()}
        for part in (slice(0, 1), slice(1, B))
    ]
    added = sum((sums_of(objective, **half).counts for half in halves), torch.zeros(NUM_COUNTS))
    torch.testing.assert_close(added, sums_of(objective, **tensors).counts, rtol=1e-6, atol=1e-6)
