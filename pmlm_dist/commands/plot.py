"""`pmlm plot`: the losses of a run as a picture, from its `metrics.jsonl`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmlm_dist.config import ConfigError
from pmlm_dist.files import name_in_errors, raise_if_foreign
from pmlm_dist.metrics.run_log import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARK = b"pmlm_dist"
"""In the pictures of this package."""
_COLORS = {"ae": "#1f6feb", "par": "#d1490b"}
_NAMES = {"ae": "AE", "par": "PAR"}


@dataclass(frozen=True)
class PlotConfig:
    """Run to plot, and picture to write."""

    run_dir: Path = Path("runs/demo")
    """Folder of the run."""
    png: Path = Path("losses.png")
    """Picture to write."""


def plot_losses(config: PlotConfig) -> None:
    """Plot training and validation losses of both objectives by step, beside the unigram entropy of the corpus.

    Raises `ConfigError` when the run has not logged any step.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if not (config.run_dir / "metrics.jsonl").is_file():
        raise ConfigError([f"{config.run_dir} has no metrics.jsonl: pass the --run-dir of a run that has logged steps"])
    metrics = read_metrics(config.run_dir)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for objective, color in _COLORS.items():
        axes.plot(*_series(metrics, f"train/{objective}"), color=color, alpha=0.35, linewidth=1.2)
        validation = _series(metrics, f"validation/{objective}")
        axes.plot(*validation, color=color, marker="o", label=f"{_NAMES[objective]}, validation")
    steps, entropy = _series(metrics, "validation/unigram_entropy")
    if steps:
        axes.axhline(entropy[-1], color="#666666", linestyle="--", linewidth=1, label="unigram entropy of the corpus")
    axes.set(xlabel="step", ylabel="nats per predicted token (thin: training)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    save_picture(figure, config.png)
    plt.close(figure)


def save_picture(figure: Figure, path: Path, **options: Any) -> None:
    """Write a picture. Raises ConfigError for an existing file unless it is a PNG that this package has written."""
    raise_if_foreign(path, mark=_MARK)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Software": _MARK.decode()} if path.suffix in ("", ".png") else None
    with name_in_errors(path):
        figure.savefig(path, metadata=metadata, **options)


def _series(metrics: dict[int, dict[str, float]], name: str) -> tuple[list[int], list[float]]:
    present = {step: scalars[name] for step, scalars in metrics.items() if name in scalars}
    return list(present), list(present.values())
