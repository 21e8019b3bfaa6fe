"""The two demo tasks: their data, and their scores beside baselines.

data/demo/python-docs.jsonl  --write_data-->  data/demo-tasks/{package,summary}, held-out.jsonl
pmlm prepare-corpus --decontaminate held-out.jsonl, train.py  -->  a model trained without the validation and test texts
pmlm finetune, twice per task (pre-trained, --untrained; see the Makefile)  -->  runs/demo-{package,summary}[-untrained]
write_table  -->  a table on the console
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pmlm_dist.config import ConfigError
from pmlm_dist.downstream.demo import package_task, summary_task
from pmlm_dist.downstream.demo.splits import HELD_OUT, read_rows
from pmlm_dist.files import json_line, raise_if_foreign, write_atomically

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class DemoTask:
    """A demo task: data, baselines, metrics."""

    write: Callable[[Path, Path], dict[str, int]]
    """(file of docstrings, output folder) -> {split: examples}."""
    baselines: Callable[[Path], Scores]
    metrics: tuple[str, ...]


DEMO_TASKS = {
    "package": DemoTask(package_task.write_package_task, package_task.baseline_scores, ("accuracy", "macro_f1")),
    "summary": DemoTask(
        summary_task.write_summary_task, summary_task.baseline_scores, ("rouge1", "rouge2", "rougeL", "bleu", "nll")
    ),
}

_HELD_OUT_FILE = "held-out.jsonl"


def write_data(source: Path = Path("data/demo/python-docs.jsonl"), output: Path = Path("data/demo-tasks")) -> None:
    """Write the data of both tasks unless they exist, and the docstrings to exclude from pre-training.

    Args:
        source: Docstrings, written by `pmlm prepare-corpus --source python-docs` beside its corpus.
        output: Folder for the tasks, one folder each, and for `held-out.jsonl`: the full docstrings from which the
            validation and test splits of both tasks are made.
    """
    for name, task in DEMO_TASKS.items():
        if not (output / name).exists():
            sizes = task.write(source, output / name)
            print(f"{output / name}: " + ", ".join(f"{size:,} {split}" for split, size in sizes.items()))
    held_out = {
        row["id"] for name in DEMO_TASKS for split in HELD_OUT for row in read_rows(output / name / f"{split}.jsonl")
    }
    lines = b"".join(json_line({"text": row["text"]}) for row in read_rows(source) if row["name"] in held_out)
    raise_if_foreign(output / _HELD_OUT_FILE, mark=lines[:4096])
    write_atomically(output / _HELD_OUT_FILE, lines, durable=False)


def write_table(data: Path = Path("data/demo-tasks"), runs: Path = Path("runs")) -> None:
    """Print the test scores of the fine-tuned models beside the baselines.

    Args:
        data: Folder that `pmlm demo-tasks data` wrote.
        runs: Folder with the fine-tuning runs demo-TASK and demo-TASK-untrained.
    """
    for name, task in DEMO_TASKS.items():
        results = task.baselines(data / name)
        for label, folder in {"untrained network": f"demo-{name}-untrained", "pre-trained": f"demo-{name}"}.items():
            results[label] = _test_scores(runs / folder / "scores.json")
        metrics = [metric for metric in task.metrics if metric in results["pre-trained"]]
        print(f"\n{name}, test{'':12}" + "".join(f"{metric:>12}" for metric in metrics))
        for label, scores in results.items():
            print(f"{label:25}" + "".join(_format_cell(scores, metric) for metric in metrics))


def _format_cell(scores: dict[str, float], metric: str) -> str:
    return f"{scores[metric]:12.3f}" if metric in scores else f"{'':12}"  # baselines have no likelihood


def _test_scores(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise ConfigError([f"there is no {path}: fine-tune first, `make demo-tasks` runs all steps"])
    return json.loads(path.read_text(encoding="utf-8"))["scores"]["test"]
