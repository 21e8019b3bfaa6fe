"""A part of `ablation.py`, in a process of its own: what a trained model or its run says of losses and FLOPs.

    python benchmarks/ablation/losses.py curves|losses MODEL OUTPUT.json ARGUMENTS_OF_TRAIN

curves   validation losses by step, as the run logged them; FLOPs a step
losses   held-out losses of MODEL on the same samples for every row: AE, PAR, AR (one token a step), left to right
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from pmlm_dist.cli import run_config
from pmlm_dist.config import MaskingConfig, ObjectiveConfig
from pmlm_dist.conversion.pretrained import load_model, open_pretrained
from pmlm_dist.data.loader import validation_batches
from pmlm_dist.files import write_atomically
from pmlm_dist.metrics.run_log import read_metrics
from pmlm_dist.objectives import NUM_COUNTS, LossMeans
from pmlm_dist.parallel import groups
from pmlm_dist.training.resolve import ResolvedRun, resolve
from pmlm_dist.training.validation import forward_losses

MASKINGS = {
    "AE": ("ae", MaskingConfig()),
    "PAR": ("par", MaskingConfig()),
    "AR": ("par", MaskingConfig(span_probability=0.0)),
    "left to right": ("prefix", MaskingConfig(prefix_share=1.0)),
}


def curves(run: ResolvedRun, _: Path) -> dict[str, Any]:
    """Return the validation losses by step, and the model FLOPs of a step."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, scalars in read_metrics(run.config.run_dir).items():
        for name in ("ae", "par"):
            if (value := scalars.get(f"validation/{name}")) is not None:
                found.setdefault(name.upper(), []).append((step, value))
    return {
        "validation": found,
        "steps": run.config.train.steps,
        "tokens": run.config.train.steps * run.engine.global_batch * run.manifest.sequence_length,
        "flops_per_step": run.sample_flops * run.engine.global_batch,
    }


@torch.no_grad()
def losses(run: ResolvedRun, path: Path) -> dict[str, float]:
    """Return the held-out losses of the model at `path`, in nats a token."""
    model, objective, found = load_model(open_pretrained(path), "fp32"), ObjectiveConfig(), {}
    for name, (loss, masking) in MASKINGS.items():
        counts = torch.zeros(NUM_COUNTS, dtype=torch.float64, device=run.topology.device)
        source = dataclasses.replace(run.source, masking=masking)
        for batch in validation_batches(source, samples=run.config.train.validation_samples, share=run.share):
            counts += forward_losses(model, batch.to(run.topology.device), objective).counts
        found[name] = getattr(LossMeans.from_counts(counts, objective), loss)
    return found


if __name__ == "__main__":
    what, model, output, *arguments = sys.argv[1:]
    resolved = resolve(run_config(arguments), groups.init_process_groups())
    result = {"curves": curves, "losses": losses}[what](resolved, Path(model))
    write_atomically(Path(output), json.dumps(result) + "\n")
