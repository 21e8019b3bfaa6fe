"""Summary of several fine-tuning runs: mean and deviation over seeds, recipes ordered by validation score."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FinetuneRun:
    """One fine-tuning run with the scores of its best checkpoint, {split: {metric: value}}."""

    recipe: dict[str, Any]
    seed: int
    scores: dict[str, dict[str, float]]
    losses: dict[str, float]
    """Mean loss of each split."""
    folder: str


@dataclass(frozen=True)
class Spread:
    """A metric over seeds. `deviation`: sample standard deviation (n - 1); None for a single seed."""

    mean: float
    deviation: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class RecipeSummary:
    """The results of a recipe over seeds, {split: {metric: spread}}."""

    recipe: dict[str, Any]
    spreads: dict[str, dict[str, Spread]]
    losses: dict[str, float]
    """Mean loss of each split over seeds."""
    folders: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """All recipes, ordered by the mean of `metric` on `split`, best first; equal ones by the loss."""

    split: str
    metric: str
    recipes: tuple[RecipeSummary, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """Return a table for the console."""
        lines = [f"by {self.metric} on {self.split}, equal ones by the loss, best first (mean ± deviation over seeds):"]
        for entry in self.recipes:
            lines.append(f"recipe {json.dumps(entry.recipe)}, loss {entry.losses[self.split]:.4f}")
            lines += [
                f"  {split}: " + ", ".join(f"{metric} {_format_spread(spread)}" for metric, spread in metrics.items())
                for split, metrics in entry.spreads.items()
            ]
        return "\n".join(lines)


def _format_spread(spread: Spread) -> str:
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.4f}"
    return f"{spread.mean:.4f}{deviation} (n={len(spread.values)})"


def summarize(runs: Sequence[FinetuneRun], *, split: str, metric: str) -> Summary:
    """Group `runs` by recipe; all have equal splits and metrics. What is NaN comes last."""
    by_recipe: dict[str, list[FinetuneRun]] = {}
    for run in runs:
        by_recipe.setdefault(json.dumps(run.recipe), []).append(run)
    summaries = [_summarize_recipe(group) for group in by_recipe.values()]

    def rank(entry: RecipeSummary) -> list[float]:
        return [math.inf if math.isnan(x) else x for x in (-entry.spreads[split][metric].mean, entry.losses[split])]

    return Summary(split, metric, tuple(sorted(summaries, key=rank)))


def _summarize_recipe(runs: Sequence[FinetuneRun]) -> RecipeSummary:
    spreads = {
        split: {metric: _spread([run.scores[split][metric] for run in runs]) for metric in metrics}
        for split, metrics in runs[0].scores.items()
    }
    losses = {split: statistics.fmean(run.losses[split] for run in runs) for split in runs[0].losses}
    return RecipeSummary(runs[0].recipe, spreads, losses, tuple(run.folder for run in runs))


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values))
