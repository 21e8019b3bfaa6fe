"""Validation: held-out losses over all ranks, and masked texts filled in by the model."""

from collections.abc import Iterator

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from pmlm_dist.config import ObjectiveConfig
from pmlm_dist.data.batch import Batch
from pmlm_dist.metrics.run_log import Validation
from pmlm_dist.objectives import NUM_COUNTS, OBJECTIVES, LossMeans, LossSums, loss_sums, target_weights
from pmlm_dist.parallel.cross_entropy import vocab_parallel_argmax
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.vocabulary.vocabulary import Vocabulary


@torch.no_grad()
def validate(
    engine: DeepSpeedEngine,
    batches: Iterator[Batch],
    vocabulary: Vocabulary,
    topology: Topology,
    *,
    objective: ObjectiveConfig,
    fill_ins: int,
) -> Validation:
    """Evaluate `batches` (equally many on every rank) without dropout; fill in `fill_ins` samples of the first one."""
    engine.eval()
    counts = torch.zeros(NUM_COUNTS, dtype=torch.float64, device=topology.device)
    texts: list[str] = []
    for batch in batches:
        on_device = batch.to(topology.device)
        counts += forward_losses(engine, on_device, objective).counts
        if not texts and fill_ins:
            predicted_KMB = vocab_parallel_argmax(
                engine(inputs=on_device.inputs, objectives=OBJECTIVES[objective.kind])
            ).cpu()
            shown = range(min(fill_ins, len(batch.tokens_BT)))
            texts = [fill_in(batch, predicted_KMB, vocabulary, sample=i) for i in shown]
    engine.train()
    return Validation(LossMeans.from_counts(topology.all_reduce_dp(counts), objective), texts)


def forward_losses(engine: torch.nn.Module, batch: Batch, objective: ObjectiveConfig) -> LossSums:
    """Return the objectives' sums for `batch`, which is on the engine's device."""
    nll_KMB, correct_KMB = engine(
        inputs=batch.inputs, targets_BM=batch.targets_BM, objectives=OBJECTIVES[objective.kind]
    )
    weights_KBM, subsets = weights_of(batch, objective), {"masked_BM": batch.masked_BM, "prefix_BM": batch.prefix_BM}
    return loss_sums(nll_KMB, correct_KMB, weights_KBM, objective=objective, **subsets)


def weights_of(batch: Batch, objective: ObjectiveConfig) -> torch.Tensor:
    """Return `target_weights` of `batch`: [K, B, M]."""
    return target_weights(objective, batch.weights_BM, kept_BM=batch.kept_BM, prefix_BM=batch.prefix_BM)


def fill_in(batch: Batch, predicted_KMB: torch.Tensor, vocabulary: Vocabulary, *, sample: int) -> str:
    """Return the text of `sample` as Markdown, each predicted token as `truth -> AE / PAR`, bold where wrong.

    A prefix sample ends with its last predicted token, and has PAR's predictions alone.
    """
    words = [vocabulary.tokens[int(id)] for id in batch.tokens_BT[sample, : batch.num_context]]
    length = int(batch.valid_BT[sample, : batch.num_context].sum())
    for m in range(batch.num_predictions):
        if batch.weights_BM[sample, m] == 0:
            continue
        truth = vocabulary.tokens[int(batch.targets_BM[sample, m])]
        position, is_prefix = int(batch.predicted_BM[sample, m]), bool(batch.prefix_BM[sample, m])
        predictions = [vocabulary.tokens[int(id)] for id in predicted_KMB[-1 if is_prefix else 0 :, m, sample]]
        shown = " / ".join(token if token == truth else f"**{token}**" for token in predictions)
        words[position], length = f"[{truth} → {shown}]", max(length, position + 1)
    return " ".join(words[:length]).replace(" ##", "")
