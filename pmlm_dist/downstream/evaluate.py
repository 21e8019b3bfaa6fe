"""`pmlm evaluate` and `pmlm predict`: a fine-tuned model on splits of a data set, or on a file of new inputs.

    checkpoint --open_task--> SavedTask --load--> module, in its own precision, sharded over tensor-parallel ranks
    rows --> Split --evaluate--> predictions, scores;  what is written is kept as it comes (results.py)

Neither needs DeepSpeed.
"""

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from pmlm_dist.checkpoint.files import read_weights, sha256_of
from pmlm_dist.checkpoint.manifest import MANIFEST, CorruptCheckpoint
from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.console import print_safely
from pmlm_dist.conversion.pretrained import PretrainedModel, fill_weights, find_pretrained
from pmlm_dist.downstream.prediction import Evaluation, Split, batches_of, evaluate, predictions_file, score_line
from pmlm_dist.downstream.preparation import read_split, split_of, task_model_config
from pmlm_dist.downstream.results import ResultsFile, digest_of, open_results
from pmlm_dist.downstream.rows import read_file
from pmlm_dist.downstream.settings import UNFINISHED, EvaluateConfig, InferenceConfig, PredictConfig
from pmlm_dist.downstream.tasks.registry import TASKS
from pmlm_dist.downstream.tasks.task import Task, TaskKind
from pmlm_dist.files import json_line
from pmlm_dist.model.transformer import PseudoMaskedLM
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.groups import Topology, run_on_all_ranks
from pmlm_dist.ranges import range_problems
from pmlm_dist.relations import problems_of_model

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class SavedTask:
    """A fine-tuned model whose weights have not been loaded, and its task."""

    start: PretrainedModel
    kind: TaskKind
    task: Task
    data: str
    """The data that it was fine-tuned on."""
    precision: str


def evaluate_saved(config: EvaluateConfig) -> dict[str, Evaluation]:
    """Predict and score splits with a fine-tuned model; every rank calls this and gets the same result."""
    topology = groups.init_process_groups(tp=config.parallel.tp, timeout_s=config.collective_timeout_s)

    def prepare() -> tuple[SavedTask, list[Split]]:
        saved = open_task(config, topology)
        names = dict.fromkeys(config.split or saved.kind.validation)
        return saved, [read_split(saved.task, name, config.data or saved.data) for name in names]

    saved, splits = run_on_all_ranks(topology, prepare)
    outputs = {split.name: config.predictions and predictions_file(config.predictions, split.name) for split in splits}
    evaluations = {}
    with _Outputs(saved, config, topology, option="--predictions") as files:
        for split in splits:  # all, before anything is computed
            files.open(split, outputs[split.name])
        model = _load(saved, topology)
        if topology.is_rank_zero:
            print_safely(_model_line(saved))
        for split in splits:
            evaluations[split.name] = evaluation = files.evaluate(model, split)
            if topology.is_rank_zero:
                print_safely(score_line(split.name, evaluation))
        files.finish()
    return evaluations


def predict_file(config: PredictConfig) -> list[dict[str, Any]]:
    """Predict every row of a file, without labels; rank 0 writes or prints the predictions, all ranks return them."""
    topology = groups.init_process_groups(tp=config.parallel.tp, timeout_s=config.collective_timeout_s)

    def prepare() -> tuple[SavedTask, Split]:
        saved, origin = open_task(config, topology), f"--input {config.input}"
        if not config.input.is_file():
            raise ConfigError([f"--input ({config.input}): no such file"])
        rows = read_file(config.input)
        raise_if_any([] if rows else [f"--input ({config.input}) is empty"])
        return saved, split_of(saved.task, "input", rows, labeled=False, origin=origin)

    saved, split = run_on_all_ranks(topology, prepare)
    with _Outputs(saved, config, topology, option="--output") as files:
        files.open(split, config.output)
        model = _load(saved, topology)
        if topology.is_rank_zero:
            print_safely(_model_line(saved), to_stderr=True)
        predictions = files.evaluate(model, split).predictions
        files.finish()
    if topology.is_rank_zero and config.output is None:
        sys.stdout.flush()
        sys.stdout.buffer.writelines(map(json_line, predictions))
        sys.stdout.flush()
    elif topology.is_rank_zero:
        print_safely(f"written: {config.output}, {len(predictions):,} predictions")
    return predictions


class _Outputs:
    """The files of the splits of one command; their final forms are written when all splits have been computed."""

    def __init__(self, saved: SavedTask, config: InferenceConfig, topology: Topology, *, option: str):
        self._saved, self._config, self._topology, self._option = saved, config, topology, option
        self._stack = contextlib.ExitStack()
        self._files: dict[str, ResultsFile] = {}
        self._predictions: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def open(self, split: Split, path: Path | None) -> None:
        """Open the file of a split; nothing without `path`."""
        build = partial(self._results_file, split, path)
        file = self._stack.enter_context(open_results(self._topology, path, build))
        if file is not None:
            self._files[split.name] = file

    def _results_file(self, split: Split, path: Path | None) -> ResultsFile:
        assert path is not None
        saved, config = self._saved, self._config
        identity = {
            "model": sha256_of(saved.start.folder / MANIFEST),
            "task": saved.task.as_json(),
            "inputs": digest_of(map(dataclasses.asdict, split.examples)),
            "precision": saved.precision,
            "batch": config.batch,
            "parallel.tp": config.parallel.tp,
            "device": self._topology.device.type,
        }
        batches = batches_of(saved.task, split, batch=config.batch)
        return ResultsFile(path, identity, batches=batches, option=self._option)

    def evaluate(self, model: PseudoMaskedLM, split: Split) -> Evaluation:
        """Predict and score a split."""
        file, batch = self._files.get(split.name), self._config.batch
        evaluation = evaluate(model, self._saved.task, split, self._topology, batch=batch, file=file)
        self._predictions[split.name] = evaluation.predictions
        return evaluation

    def finish(self) -> None:
        """Write the files; every rank must call."""

        def write() -> None:
            for name, file in self._files.items():
                file.write(self._predictions[name])
            for file in self._files.values():
                file.remove_part()

        run_on_all_ranks(self._topology, write)


def open_task(config: InferenceConfig, topology: Topology) -> SavedTask:
    """Return the fine-tuned model at `config.model`. Raises `ConfigError`."""
    raise_if_any(range_problems(config, prefix="--"))
    start = find_pretrained(config.model)
    saved = start.state["configuration"].get("task")
    if not isinstance(saved, dict) or saved.get("kind") not in TASKS:
        raise ConfigError(
            [f"{start.folder} has no head of a task, it is a pre-trained model: run `pmlm finetune` first"]
        )
    raise_if_any(problems_of_model(start.model, tp=config.parallel.tp))
    precision = config.precision or start.state["identity"].get("precision", "fp32")
    if precision == "fp16" and topology.device.type == "cpu":
        raise ConfigError([f"{start.folder} was fine-tuned in fp16, which needs a GPU: pass --precision fp32"])
    kind = TASKS[saved["kind"]]
    return SavedTask(start, kind, kind.restore(saved["settings"], start.vocabulary), saved["data"], precision)


def _load(saved: SavedTask, topology: Topology) -> PseudoMaskedLM:
    """Return the module with this rank's part of the weights; every rank must call."""

    def load() -> PseudoMaskedLM:
        start = saved.start
        model = saved.task.build_model(
            task_model_config(start.model, dropout=None), padded_vocab_size=start.vocabulary.padded_size()
        )
        try:
            weights = {name: torch.from_numpy(array) for name, array in read_weights(start.folder).items()}
        except CorruptCheckpoint as error:
            raise ConfigError([str(error)]) from error
        fill_weights(model, weights, origin=start.folder)
        return model.to(device=topology.device, dtype=_DTYPES[saved.precision]).eval()

    return run_on_all_ranks(topology, load)


def _model_line(saved: SavedTask) -> str:
    folder = saved.start.folder
    is_complete = not (folder.parent.parent / UNFINISHED).exists()
    return f"model: {folder}, {saved.precision}{'' if is_complete else ' (its fine-tuning is not complete)'}"
