"""The rows of the paper's Table 6 are one override away: what each objective reads, masks and learns from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import Trained, run_config, train
from support.worlds import run_world

from pmlm_dist.config import ObjectiveConfig, RunConfig
from pmlm_dist.objectives import OBJECTIVES

pytestmark = pytest.mark.distributed


def with_objective(config: RunConfig, kind: Any, *, relative_bias: bool = True) -> RunConfig:
    model = replace(config.model, relative_bias=relative_bias)
    return replace(config, objective=ObjectiveConfig(kind=kind), model=model)


def first_batch(config: RunConfig) -> dict[str, Any]:
    """The spans of the first micro-batch, and the gradient that reaches the context's and the appended slots."""
    from pmlm_dist.data.loader import training_batches
    from pmlm_dist.model.transformer import build_model
    from pmlm_dist.parallel import groups
    from pmlm_dist.training.resolve import resolve
    from pmlm_dist.training.validation import forward_losses

    run = resolve(config, groups.init_process_groups())
    batch = next(training_batches(run.source, lanes=run.lanes, share=run.share, loading=config.data))
    model = build_model(run.config.model, padded_vocab_size=run.vocabulary.padded_size())
    slots: list[torch.Tensor] = []

    def keep(_module, _inputs, output):
        slots.append(output.detach().requires_grad_())
        return slots[-1]

    model.embeddings.register_forward_hook(keep)
    sums = forward_losses(model, batch, run.config.objective)
    sums.nll_K.sum().backward()
    assert slots[0].grad is not None
    S = batch.num_context
    steps_BM = batch.order_BT[:, S : S + batch.num_predictions]
    return {
        "spans": [int(row.max()) for row in steps_BM],
        "predictions": batch.num_predictions,
        "slots": len(slots[0]),
        "context": S,
        "counts": sums.counts.tolist(),
        "appended_gradient": float(slots[0].grad[S:].abs().sum()),
        "context_gradient": float(slots[0].grad[:S].abs().sum()),
    }


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_objective_predicts_at_its_own_slots(small_corpus: Path, tmp_path: Path, kind):
    (found,) = run_world(first_batch, 1, with_objective(run_config(small_corpus, tmp_path), kind))
    samples = len(found["spans"])
    ae_targets, par_targets = found["counts"][4:6]
    assert ae_targets == (samples * found["predictions"] if "ae" in OBJECTIVES[kind] else 0)
    assert par_targets == (samples * found["predictions"] if "par" in OBJECTIVES[kind] else 0)
    single = all(spans == found["predictions"] for spans in found["spans"])
    assert single == (kind in ("ar", "ae+ar"))
    if "par" in OBJECTIVES[kind]:
        assert found["slots"] == found["context"] + 2 * found["predictions"]
        assert found["appended_gradient"] > 0
    else:
        assert found["slots"] == found["context"]
    assert found["context_gradient"] > 0  # with PAR alone too: the [M] slots stay as context


@pytest.mark.parametrize(
    ("kind", "relative_bias"),
    [("ae+par", True), ("ae+par", False), ("ae+ar", False), ("ae", False), ("par", False), ("ar", False)],
)
def test_every_row_of_table_6_trains_equally_on_one_and_two_ranks(small_corpus, tmp_path, kind, relative_bias):
    def trained(ranks: int, **engine: Any) -> Trained:
        config = run_config(small_corpus, tmp_path / str(ranks), steps=4, **engine)
        return run_world(train, ranks, with_objective(config, kind, relative_bias=relative_bias))[0]

    single, double = trained(1, zero=0, micro_batch=8), trained(2, zero=1, tp=2, micro_batch=4)
    torch.testing.assert_close(double.losses, single.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(double.norms, single.norms, rtol=1e-4, atol=0)
    assert ("relative_bias.weight" in single.weights) == relative_bias
