"""The demo's two tasks side by side: their data, and their scores beside baselines.

data/demo/python-docs.jsonl  --write_data-->  data/demo-tasks/{package,summary}, held-out.jsonl
pmlm prepare-corpus --decontaminate held-out.jsonl, train.py  -->  a model that has read no text of validation or test
pmlm finetune, twice a task (pre-trained, --untrained; see the Makefile)  -->  runs/demo-{package,summary}[-untrained]
write_table  -->  a table for people
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pmlm_dist.config import ConfigError
from pmlm_dist.downstream.demo import package_task, summary_task
from pmlm_dist.downstream.demo.package_task import PackageTaskConfig, write_package_task
from pmlm_dist.downstream.demo.summary_task import SummaryTaskConfig, write_summary_task

Scores = dict[str, dict[str, float]]
_HELD_OUT = ("validation", "test")


@dataclass(frozen=True)
class DemoTask:
    """How one of them is made and what it is compared with."""

    write: Callable[[Path, Path], dict[str, int]]
    """From the docstrings' file and a folder to the sizes of the splits."""
    baselines: Callable[[Path], Scores]
    metrics: tuple[str, ...]


DEMO_TASKS = {
    "package": DemoTask(
        lambda source, output: write_package_task(PackageTaskConfig(source, output)),
        package_task.baseline_scores,
        ("accuracy", "macro_f1"),
    ),
    "summary": DemoTask(
        lambda source, output: write_summary_task(SummaryTaskConfig(source, output)),
        summary_task.baseline_scores,
        ("rouge1", "rouge2", "rougeL", "bleu", "nll"),
    ),
}


def write_data(source: Path = Path("data/demo/python-docs.jsonl"), output: Path = Path("data/demo-tasks")) -> None:
    """Write the data of both tasks, those that are not there yet, and the docstrings that pre-training must not read.

    Args:
        source: Docstrings, as `pmlm prepare-corpus --source python-docs` writes them beside its corpus.
        output: Where a folder for each task is written, and `held-out.jsonl`: the docstrings, whole and as they are,
            that validation and test of either task are made from.
    """
    for name, task in DEMO_TASKS.items():
        if not (output / name).exists():
            sizes = task.write(source, output / name)
            print(f"{output / name}: " + ", ".join(f"{size:,} {split}" for split, size in sizes.items()))
    held_out = {
        row["id"] for name in DEMO_TASKS for split in _HELD_OUT for row in _rows(output / name / f"{split}.jsonl")
    }
    texts = [{"text": row["text"]} for row in _rows(source) if row["name"] in held_out]
    lines = (json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    (output / "held-out.jsonl").write_text("".join(lines), encoding="utf-8")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_table(data: Path = Path("data/demo-tasks"), runs: Path = Path("runs")) -> None:
    """Print the scores of what was fine-tuned on the test split, beside baselines.

    Args:
        data: What `write_data` wrote.
        runs: Where the fine-tunings demo-TASK and demo-TASK-untrained lie.
    """
    for name, task in DEMO_TASKS.items():
        found = task.baselines(data / name)
        for label, folder in {"untrained network": f"demo-{name}-untrained", "pre-trained": f"demo-{name}"}.items():
            found[label] = _test_scores(runs / folder / "scores.json")
        shown = [metric for metric in task.metrics if metric in found["pre-trained"]]
        print(f"\n{name}, test{'':12}" + "".join(f"{metric:>12}" for metric in shown))
        for label, scores in found.items():
            print(f"{label:25}" + "".join(_cell(scores, metric) for metric in shown))


def _cell(scores: dict[str, float], metric: str) -> str:
    return f"{scores[metric]:12.3f}" if metric in scores else f"{'':12}"  # a rule knows no likelihood


def _test_scores(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise ConfigError([f"there is no {path}: fine-tune first, `make demo-tasks` does all of it"])
    return json.loads(path.read_text(encoding="utf-8"))["scores"]["test"]
