"""Several fine-tunings side by side: mean and deviation over seeds, the best recipe by validation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FinetuneRun:
    """One fine-tuning and the scores of its best checkpoint: {split: {metric: value}}."""

    recipe: dict[str, Any]
    seed: int
    scores: dict[str, dict[str, float]]
    folder: str


@dataclass(frozen=True)
class Spread:
    """A metric over seeds. `deviation` is the sample's (n - 1); None for a single seed."""

    mean: float
    deviation: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class RecipeSummary:
    """What a recipe has reached: {split: {metric: spread}}."""

    recipe: dict[str, Any]
    spreads: dict[str, dict[str, Spread]]
    folders: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """All recipes, the best by the mean of `metric` on `split` first."""

    split: str
    metric: str
    recipes: tuple[RecipeSummary, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def table(self) -> str:
        """For people: a recipe a paragraph."""
        lines = [f"by {self.metric} on {self.split}, best first (mean ± deviation over seeds):"]
        for entry in self.recipes:
            lines.append(f"recipe {json.dumps(entry.recipe)}")
            lines += [
                f"  {split}: " + ", ".join(f"{metric} {_shown(spread)}" for metric, spread in metrics.items())
                for split, metrics in entry.spreads.items()
            ]
        return "\n".join(lines)


def _shown(spread: Spread) -> str:
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.4f}"
    return f"{spread.mean:.4f}{deviation} (n={len(spread.values)})"


def summarise(trials: Sequence[FinetuneRun], *, split: str, metric: str) -> Summary:
    """Group `trials` by recipe; every one has the same splits and metrics."""
    by_recipe: dict[str, list[FinetuneRun]] = {}
    for trial in trials:
        by_recipe.setdefault(json.dumps(trial.recipe), []).append(trial)
    found = [_summary(of_recipe) for of_recipe in by_recipe.values()]
    return Summary(split, metric, tuple(sorted(found, key=lambda entry: -entry.spreads[split][metric].mean)))


def _summary(trials: Sequence[FinetuneRun]) -> RecipeSummary:
    spreads = {
        split: {metric: _spread([trial.scores[split][metric] for trial in trials]) for metric in metrics}
        for split, metrics in trials[0].scores.items()
    }
    return RecipeSummary(trials[0].recipe, spreads, tuple(trial.folder for trial in trials))


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values))
