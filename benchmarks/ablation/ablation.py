"""`make ablation`: what each objective is worth at equal text tokens, and where the losses stand at equal FLOPs.

    recipes/ablation/scale-SCALE.json   corpus, model, training, evaluation
    recipes/ablation/ROW.json           what differs in one row of the table
        --> OUTPUT/ROW-SEED/...         a run of `train.py` (or of hf_bert.py), and its evaluation
        --> RESULTS/ROW-SEED.json       its figures; RESULTS/table.md: means, deviations, differences from the first row

A run whose results are there is not repeated, an interrupted one resumes: training from its checkpoint, evaluation
after its last finished part. `--minutes` stops in time for a machine that is lent for as long; call it again. `--pack`
writes what a machine without the data needs as one file, `--packed` reads it.
"""

import argparse
import concurrent.futures
import json
import lzma
import math
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from table import table

from pmlm_dist.files import write_atomically

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
RECIPES = ROOT / "recipes" / "ablation"
PYTHON = sys.executable
UNFINISHED = 75
"""Exit code for a stop by `--minutes`: the same call continues."""
ROWS = ("ae-par", "ae", "par", "ar", "no-relative-bias", "prefix", "hf-bert")


class OutOfTime(Exception):
    """`--minutes` are over."""


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    row: str
    seed: int
    recipe: dict[str, Any]
    scale: dict[str, Any]
    work: Path
    """Folder of the ablation: corpus, task data, runs."""
    results: Path
    threads: int
    deadline: float = math.inf
    """Time, as of `time.monotonic`, at which the run stops."""

    @property
    def name(self) -> str:
        """ROW-SEED."""
        return f"{self.row}-{self.seed}"

    @property
    def folder(self) -> Path:
        """Folder of this run."""
        return self.work / self.name

    @property
    def run_dir(self) -> Path:
        """Run folder of the training."""
        return self.folder / "training"

    @property
    def model(self) -> Path:
        """The trained model, for the commands that evaluate."""
        return self.run_dir / "model" if self.is_comparator else self.run_dir

    @property
    def is_comparator(self) -> bool:
        """Is it the Hugging Face BERT?"""
        return self.recipe.get("trainer") == "hugging-face"

    @property
    def arguments(self) -> list[str]:
        """Arguments of the training."""
        return [
            *("--corpus", str(self.work / "corpus"), "--run-dir", str(self.run_dir), "--train.seed", str(self.seed)),
            *shlex.split(self.scale["train"]),
            *shlex.split(self.recipe["train"]),
        ]

    def call(self, *command: str) -> None:
        """Run a command; its output goes to log.txt. Raises RuntimeError with the last lines if it fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": str(ROOT)}
        log = self.folder / "log.txt"
        with log.open("a") as file:
            print("$", *command, file=file, flush=True)
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
            try:
                code = process.wait(None if self.deadline == math.inf else max(0.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                process.terminate()  # training and fine-tuning save a checkpoint
                process.wait()
                raise OutOfTime(self.name) from error
        if code:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{self.name}: {' '.join(command)} ended with {code}, see {log}:\n{tail}")

    def pmlm(self, *arguments: str) -> None:
        """Run a command of `pmlm`."""
        self.call(PYTHON, "-m", "pmlm_dist.cli", *arguments)


# -------------------------------------------------------------------------------------------------------------- pieces


def train(run: Run) -> dict[str, Any]:
    """Train; return the validation curves of the run, and its FLOPs a step."""
    if run.is_comparator:
        run.call(PYTHON, str(HERE / "hf_bert.py"), *run.arguments)
    else:
        run.call(PYTHON, str(ROOT / "train.py"), *run.arguments)
    return measured(run, "curves")


def measured(run: Run, what: str) -> dict[str, Any]:
    """Return the result of losses.py, which reads corpus and model in a process of its own."""
    output = run.folder / f"{what}.json"
    run.call(PYTHON, str(HERE / "losses.py"), what, str(run.model), str(output), *run.arguments)
    return json.loads(output.read_text())


def losses(run: Run) -> dict[str, Any]:
    """Held-out losses of all rows on the same samples and masks: AE, PAR, AR, left to right."""
    return measured(run, "losses")


def blimp(run: Run) -> dict[str, Any]:
    """Accuracies on minimal pairs by both methods, in all and by linguistic term."""
    folder = run.folder / "blimp"
    if not (folder / "scores.json").exists():
        pairs = ["--pairs", str(run.scale["blimp_pairs"])] if run.scale.get("blimp_pairs") else []
        data = ["--data", str(run.work / "BLiMP.zip"), "--predictions", str(folder)]
        run.pmlm("evaluate", "--suite", "blimp", "--model", str(run.model), *data, *pairs)
    scores = json.loads((folder / "scores.json").read_text())
    return {method: {"accuracy": of["accuracy"], "terms": of["terms"]} for method, of in scores.items()}


def finetune(run: Run, task: str) -> dict[str, Any]:
    """Fine-tune on one task with several seeds; return the scores of the reported split by seed."""
    settings, folder = run.scale["tasks"][task], run.folder / f"finetune-{task}"
    summary = folder / "summary.json"
    if not summary.exists():
        data = ["--data", str(run.work / "tasks" / task), "--output", str(folder)]
        seeds = ["--seeds", str(run.scale["finetune_seeds"])]
        run.pmlm(
            "finetune",
            "--model",
            str(run.model),
            *data,
            *seeds,
            *shlex.split(run.scale["finetune"]),
            *shlex.split(settings["finetune"]),
        )
    spreads = json.loads(summary.read_text())["recipes"][0]["spreads"][settings["split"]]
    result = {"metric": settings["metric"], "values": spreads[settings["metric"]]["values"]}
    for path in folder.glob("*/checkpoints"):
        shutil.rmtree(path)
    return result


def pieces(run: Run) -> dict[str, Any]:
    """Return the pieces of a run by name, in their order."""
    tasks = {f"finetune/{task}": lambda task=task: finetune(run, task) for task in run.scale["tasks"]}
    return {"curves": lambda: train(run), "losses": lambda: losses(run), "blimp": lambda: blimp(run), **tasks}


def run_all(run: Run) -> None:
    """Do what is missing of a run, piece by piece."""
    path = run.results / f"{run.name}.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"row": run.row, "seed": run.seed}
    for name, piece in pieces(run).items():
        if name not in done:
            done[name] = piece()
            write_atomically(path, json.dumps(done, indent=1) + "\n")
            print(f"{run.name}: {name} done", flush=True)
    shutil.rmtree(run.folder, ignore_errors=True)  # the results are all that is needed of it


# ---------------------------------------------------------------------------------------------------------------- data


def prepare(scale: dict[str, Any], data: Path, work: Path) -> None:
    """Prepare corpus, minimal pairs and the data of the tasks, unless they are there."""
    if not (work / "BLiMP.zip").exists():
        work.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / "blimp" / "BLiMP.zip", work / "BLiMP.zip")
    if not (work / "corpus" / "manifest.json").exists():
        source = str(data / "text" / "train.jsonl.xz")
        command = [PYTHON, "-m", "pmlm_dist.cli", "prepare-corpus", "--source", source]
        command += ["--output", str(work / "corpus"), *shlex.split(scale["prepare"])]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for task, settings in scale["tasks"].items():
        folder = work / "tasks" / task
        if folder.exists():
            continue
        temporary = folder.with_name(f".{task}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if task == "continuation":
            continuation(data / "text" / "held-out.jsonl.xz", temporary, examples=scale["finetune_examples"])
        else:
            for split in ("train", settings["split"]):
                lines = (data / "tasks" / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
                most = scale["finetune_examples"] if split == "train" else len(lines)
                (temporary / f"{split}.jsonl").write_text("".join(lines[:most]), encoding="utf-8")
        temporary.rename(folder)


def pack(work: Path, file: Path) -> None:
    """Write what `prepare` made as one .tar.xz, without the texts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:xz") as archive:
        for name in ("corpus", "tasks", "BLiMP.zip"):
            archive.add(work / name, arcname=name)
    print(f"written: {file}, {file.stat().st_size / 2**20:.1f} MiB")


def unpack(file: Path, work: Path) -> None:
    """Inverse of `pack`, unless it was done before."""
    if not (work / "corpus" / "manifest.json").exists():
        with tarfile.open(file) as archive:
            archive.extractall(work, filter="data")


def continuation(source: Path, folder: Path, *, examples: int) -> None:
    """Write pairs from texts that no model has read: 40 words, and the 12 that follow. Every fifth text is held out."""
    rows: dict[str, list[str]] = {"train": [], "validation": []}
    with lzma.open(source, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            words, split = json.loads(line)["text"].split(), "train" if number % 5 else "validation"
            for start in range(0, len(words) - 52, 52):
                pair = {
                    "source": " ".join(words[start : start + 40]),
                    "target": " ".join(words[start + 40 : start + 52]),
                }
                rows[split].append(json.dumps(pair))
    for split, most in (("train", examples), ("validation", 500)):
        step = max(1, len(rows[split]) // most)
        chosen = rows[split][::step][:most]
        (folder / f"{split}.jsonl").write_text("".join(f"{row}\n" for row in chosen), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> int:
    """Do all runs, `--jobs` at a time; a failed run does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu", help="size of the models and runs")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, help="folder with text/, blimp/ and tasks/")
    source.add_argument("--packed", type=Path, help="file that --pack wrote")
    parser.add_argument("--pack", type=Path, help="write corpus and task data as .tar.xz, and end")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many minutes, to be continued")
    parser.add_argument("--output", type=Path, help="folder of corpus and runs (runs/ablation-SCALE)")
    parser.add_argument("--results", type=Path, help="folder of the results (docs/reports/ablation-SCALE)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="rows to run")
    parser.add_argument("--seeds", nargs="+", type=int, help="pre-training seeds (those of the scale)")
    parser.add_argument("--jobs", type=int, help="runs at a time (those of the scale)")
    parser.add_argument("--table", action="store_true", help="write the table from the results that are there")
    options = parser.parse_args()
    scale = json.loads((RECIPES / f"scale-{options.scale}.json").read_text())
    recipes = {row: json.loads((RECIPES / f"{row}.json").read_text()) for row in ROWS}
    work = (options.output or ROOT / "runs" / f"ablation-{options.scale}").absolute()
    results = (options.results or ROOT / "docs" / "reports" / f"ablation-{options.scale}").absolute()
    results.mkdir(parents=True, exist_ok=True)
    if options.packed:
        unpack(options.packed, work)
    elif options.data:
        prepare(scale, options.data.absolute(), work)
    elif not options.table:
        parser.error("--data or --packed is needed, or --table")
    if options.pack:
        pack(work, options.pack)
        return 0
    failed = [] if options.table else train_all(options, scale, recipes, work=work, results=results)
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    write_atomically(results / "table.md", table(found, {row: recipe["title"] for row, recipe in recipes.items()}))
    print(f"table: {results / 'table.md'}")
    for error in failed:
        print(error, file=sys.stderr)
    if any(isinstance(error, OutOfTime) for error in failed):
        print("stopped in time: call it again to continue")
        return UNFINISHED
    return 1 if failed else 0


def train_all(
    options: argparse.Namespace, scale: dict[str, Any], recipes: dict[str, Any], *, work: Path, results: Path
) -> list[Exception]:
    """Run all rows and seeds, seed by seed, so that an interrupted ablation compares whole seeds; return the errors."""
    jobs, deadline = options.jobs or scale["jobs"], time.monotonic() + 60 * options.minutes
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    runs = [
        Run(row, seed, recipes[row], scale, work, results, threads, deadline)
        for seed in options.seeds or scale["seeds"]
        for row in options.rows
    ]
    failed: list[Exception] = []
    lock = threading.Lock()

    def attempt(run: Run) -> None:
        try:
            if time.monotonic() >= deadline:
                raise OutOfTime(run.name)
            run_all(run)
        except (OutOfTime, RuntimeError, OSError, ValueError) as error:
            with lock:
                failed.append(error)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(attempt, runs))
    return failed


if __name__ == "__main__":
    sys.exit(main())
