"""`pmlm extend-positions`: add position embeddings to a model."""

from dataclasses import replace
from pathlib import Path

import torch

from pmlm_dist.config import raise_if_any
from pmlm_dist.conversion.pretrained import open_pretrained, save_pretrained
from pmlm_dist.planning.parameters import POSITIONS


def extend_positions(model: Path, /, *, positions: int, output: Path) -> None:
    """Write a model with more positions, for sources and targets longer than in pre-training.

    Args:
        model: A run folder, one of its checkpoints, or the output of `pmlm import`.
        positions: New number of positions. The added embeddings are copies of the first ones; fine-tuning adapts them.
        output: Folder to write; it must not exist.
    """
    pretrained = open_pretrained(model)
    before = pretrained.model.max_positions
    raise_if_any([] if positions > before else [f"--positions ({positions}) must exceed the model's {before}"])
    rows = torch.arange(positions) % before
    weights = pretrained.weights | {POSITIONS: pretrained.weights[POSITIONS][rows]}
    facts = pretrained.facts | {"format": "extended", "notes": [f"{before} positions before"]}
    config = replace(pretrained.model, max_positions=positions)
    save_pretrained(replace(pretrained, model=config, weights=weights, facts=facts), output)
    print(f"written: {output}, {positions} positions")
