"""Log of a run: console, TensorBoard, `metrics.jsonl`. Only rank 0 writes.

RUN_DIR/tensorboard/     scalars, and configuration and fill-ins as text
RUN_DIR/metrics.jsonl    the same scalars, one JSON object a line; after a resume the last line of a step is valid
"""

import contextlib
import json
import resource
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch
from torch.utils.tensorboard.writer import SummaryWriter

from pmlm_dist.console import print_safely
from pmlm_dist.files import write_atomically
from pmlm_dist.metrics.stragglers import RankTimes
from pmlm_dist.objectives import LossMeans

_RANKS_SHOWN = 64

CONFIGURATION, METRICS = "config.json", "metrics.jsonl"
"""Files in the folder of a run."""


@dataclass(frozen=True)
class Progress:
    """One logging interval. Rates are of all ranks together, seconds of this rank for one step."""

    step: int
    steps: int
    losses: LossMeans
    learning_rate: float
    gradient_norm: float | None
    loss_scale: float | None
    skipped_steps: int
    """Since this attempt started."""
    tokens_per_s: float
    slots_per_s: float
    mfu: float | None
    seconds: dict[str, float]
    eta_s: float


@dataclass(frozen=True)
class Validation:
    """Means over the validation samples, and some samples with the model's predictions filled in."""

    means: LossMeans
    fill_ins: list[str]
    """Markdown, one text a sample."""


class RunLog:
    """Writes the log of a run; on ranks other than 0 every method does nothing."""

    def __init__(self, run_dir: Path, *, enabled: bool, first_step: int):
        self.enabled = enabled
        self.lost_lines = 0
        """Lines that could not be written."""
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        threading.excepthook = _report_thread
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self._lines = _open_lines(run_dir / METRICS)

    def info(self, text: str) -> None:
        """Print `text`, on rank 0 alone. A closed terminal or a full disk does not end training."""
        if self.enabled and not print_safely(text):
            self.lost_lines += 1

    def scalars(self, scalars: Mapping[str, float | None], *, step: int) -> None:
        """Write the scalars that are not None."""
        if not self.enabled:
            return
        present = {name: value for name, value in scalars.items() if value is not None}
        with self._losing_lines():
            for name, value in present.items():
                self._writer.add_scalar(name, value, step)
        with self._losing_lines():
            self._lines.write(json.dumps({"step": step, **present}) + "\n")
            self._lines.flush()

    def write_configuration(self, configuration: dict[str, Any]) -> None:
        """Write the resolved configuration to RUN_DIR/config.json and as TensorBoard text."""
        if self.enabled:
            text = json.dumps(configuration, indent=2)
            write_atomically(self._run_dir / CONFIGURATION, f"{text}\n", durable=False)
            self._writer.add_text("configuration", f"```json\n{text}\n```")

    def progress(self, progress: Progress, device: torch.device) -> None:
        """Write a console line and the training scalars of an interval."""
        scalars = {
            "log/lost_lines": self.lost_lines or None,
            **{f"train/{name}": value for name, value in vars(progress.losses).items()},
            **{f"seconds/{name}": value for name, value in progress.seconds.items()},
            "train/learning_rate": progress.learning_rate,
            "train/gradient_norm": progress.gradient_norm,
            "train/loss_scale": progress.loss_scale,
            "train/skipped_steps": progress.skipped_steps,
            "speed/text_tokens_per_s": progress.tokens_per_s,
            "speed/slots_per_s": progress.slots_per_s,
            "speed/mfu": progress.mfu,
            "memory/peak_gib": peak_memory_gib(device),
        }
        self.scalars(scalars, step=progress.step)
        self.info(_console_line(progress))

    def validation(self, validation: Validation, *, step: int, unigram_entropy: float) -> None:
        """Write validation losses beside the unigram entropy of the corpus, and the fill-ins."""
        if not self.enabled:
            return
        means = validation.means
        scalars = {f"validation/{name}": value for name, value in vars(means).items()}
        self.scalars({**scalars, "validation/unigram_entropy": unigram_entropy}, step=step)
        with self._losing_lines():
            for number, text in enumerate(validation.fill_ins):
                self._writer.add_text(f"fill_in/{number}", text, step)
            self._writer.flush()
        parts = [
            *_objective("AE", means.ae, means.ae_accuracy),
            *_objective("PAR", means.par, means.par_accuracy),
            *_objective("PAR on [MASK] slots", means.par_masked, means.par_masked_accuracy),
            *_objective("PAR of prefix samples", means.prefix, means.prefix_accuracy),
            f"unigram entropy {unigram_entropy:6.3f}",
        ]
        self.info(f"validation at step {step}:  {'  '.join(parts)}")

    def probe(self, result: Mapping[str, Any], *, method: str, step: int) -> None:
        """Write the accuracies on minimal pairs (likelihood/minimal_pairs.py)."""
        if not self.enabled:
            return
        terms = {f"probe/{method}/{term}": accuracy for term, accuracy in result["terms"].items()}
        self.scalars({f"probe/{method}": result["accuracy"], **terms}, step=step)
        self.info(f"probe at step {step}:  {method} {result['accuracy']:.2%} of {result['pairs']:,} pairs")
        self._writer.flush()

    def ranks(self, per_rank: Sequence[RankTimes], *, step: int) -> None:
        """Write data, compute and step time of each rank; in a large world only median and maximum."""
        scalars: dict[str, float | None] = {}
        for name in ("data_s", "compute_s", "step_s"):
            values = [getattr(times, name) for times in per_rank]
            scalars |= {f"ranks/{name}/median": median(values), f"ranks/{name}/max": max(values)}
            if len(values) <= _RANKS_SHOWN:
                scalars |= {f"ranks/{name}/{rank}": value for rank, value in enumerate(values)}
        self.scalars(scalars, step=step)

    def close(self) -> None:
        if self.enabled:
            with self._losing_lines():
                self._writer.close()
            with contextlib.suppress(OSError):
                self._lines.close()

    @contextlib.contextmanager
    def _losing_lines(self) -> Iterator[None]:
        """Count what cannot be written: a full disk does not end training. TensorBoard's thread raises here, too."""
        try:
            yield
        except OSError:
            self.lost_lines += 1


def _report_thread(failure: threading.ExceptHookArgs) -> None:
    """Print one line for a full disk in TensorBoard's thread, a traceback for anything else."""
    if isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard."):
        print_safely(f"warning: no more events for TensorBoard are written: {failure.exc_value}", to_stderr=True)
    else:
        threading.__excepthook__(failure)


def _open_lines(path: Path) -> TextIO:
    """Open `path` for appending lines; a partial line of a killed run is terminated first."""
    is_partial = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    lines = path.open("a", encoding="utf-8")
    lines.write("\n" if is_partial else "")
    return lines


def read_metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return all scalars of a run by ascending step; of a step logged again after a resume, the last values."""
    by_step: dict[int, dict[str, float]] = {}
    with (run_dir / METRICS).open(encoding="utf-8") as lines:
        for line in lines:
            try:
                scalars = json.loads(line)
            except (ValueError, RecursionError):  # partial line of a killed run, or no line of this program
                continue
            by_step.setdefault(int(scalars.pop("step")), {}).update(scalars)
    return dict(sorted(by_step.items()))


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this rank in GiB: allocated on the accelerator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def format_duration(seconds: float) -> str:
    """Return `1:02:03` for 3723 seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _objective(name: str, loss: float | None, accuracy: float | None) -> list[str]:
    return [] if loss is None or accuracy is None else [f"{name} {loss:6.3f} ({accuracy:5.1%})"]


def _console_line(progress: Progress) -> str:
    losses = progress.losses
    parts = [
        f"step {progress.step:>{len(str(progress.steps))}}/{progress.steps}",
        f"loss {losses.total:6.3f}",
        *_objective("AE", losses.ae, losses.ae_accuracy),
        *_objective("PAR", losses.par, losses.par_accuracy),
        f"lr {progress.learning_rate:.2e}",
    ]
    if progress.gradient_norm is not None:
        parts.append(f"grad {progress.gradient_norm:.2f}")
    if progress.loss_scale is not None:
        parts.append(f"scale {progress.loss_scale:g}")
    if progress.skipped_steps:
        parts.append(f"skipped {progress.skipped_steps}")
    parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    if progress.mfu is not None:
        parts.append(f"mfu {progress.mfu:.1%}")
    parts.append(f"ETA {format_duration(progress.eta_s)}")
    return "  ".join(parts)
