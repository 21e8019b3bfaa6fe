"""The table of an ablation: means and deviations over seeds, and differences from the first row paired by seed."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def figures(result: dict[str, Any], *, budget: float) -> dict[str, float]:
    """Return the figures of a run's results by the title of their column."""
    found: dict[str, float] = {}
    found |= {f"loss {name}": value for name, value in result.get("losses", {}).items()}
    found |= {f"BLiMP {method}": 100 * of["accuracy"] for method, of in result.get("blimp", {}).items()}
    for name, of in result.items():
        if name.startswith("finetune/"):
            is_loss = of["metric"] == "nll"
            mean = statistics.mean(of["values"])
            found[f"{name.removeprefix('finetune/')} {of['metric']}"] = mean if is_loss else 100 * mean
    if "curves" in result:
        found |= {f"{name} at equal FLOPs": value for name, value in at_budget(result["curves"], budget).items()}
    return found


def at_budget(curves: dict[str, Any], budget: float) -> dict[str, float]:
    """Return each validation loss after `budget` FLOPs, interpolated between the validations around it."""
    found = {}
    for name, points in curves["validation"].items():
        steps, values = zip(*points, strict=True)
        found[name] = float(np.interp(budget / curves["flops_per_step"], steps, values))
    return found


def table(results: Sequence[dict[str, Any]], titles: Mapping[str, str]) -> str:
    """Return two tables in Markdown for the rows of `titles`, of which the first is compared with the others."""
    totals = [r["curves"]["flops_per_step"] * r["curves"]["steps"] for r in results if "curves" in r]
    budget = min(totals, default=0.0)
    by_row: dict[str, dict[int, dict[str, float]]] = {}
    for result in results:
        by_row.setdefault(result["row"], {})[result["seed"]] = figures(result, budget=budget)
    columns = list(dict.fromkeys(name for seeds in by_row.values() for of in seeds.values() for name in of))
    rows, first = [row for row in titles if row in by_row], next(iter(titles))
    lines = ["## Means ± sample standard deviation over pre-training seeds", ""]
    lines += ["| | " + " | ".join(titles[row] for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    lines.append("| seeds | " + " | ".join(str(len(by_row[row])) for row in rows) + " |")
    for column in columns:
        cells = [_mean([of[column] for of in by_row[row].values() if column in of]) for row in rows]
        lines.append(f"| {column} | " + " | ".join(cells) + " |")
    lines += ["", f"## Differences from {titles[first]}, paired by seed: mean ± standard error", ""]
    others = [row for row in rows if row != first]
    lines += ["| | " + " | ".join(titles[row] for row in others) + " |", "|---" * (len(others) + 1) + "|"]
    base = by_row.get(first, {})
    for column in columns:
        cells = []
        for row in others:
            both = [seed for seed, of in by_row[row].items() if column in of and column in base.get(seed, {})]
            cells.append(_difference([by_row[row][seed][column] - base[seed][column] for seed in both]))
        lines.append(f"| {column} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _difference(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.3f}{spread}"
