"""`pmlm evaluate`: predict and score splits with a fine-tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pmlm_dist.checkpoint.engine_state import EngineState
from pmlm_dist.checkpoint.files import CheckpointReader
from pmlm_dist.config import ConfigError, OptimConfig, problems_of_model, raise_if_any
from pmlm_dist.console import print_safely
from pmlm_dist.conversion.pretrained import PretrainedModel, find_pretrained
from pmlm_dist.downstream.prediction import Evaluation, Split, evaluate, predictions_file, score_line, write_predictions
from pmlm_dist.downstream.preparation import build_task_engine, engine_config_for_batch, read_split, task_model_config
from pmlm_dist.downstream.settings import UNFINISHED, EvaluateConfig
from pmlm_dist.downstream.tasks.registry import TASKS
from pmlm_dist.downstream.tasks.task import Task
from pmlm_dist.engine.deepspeed_config import EngineConfig
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.groups import Topology, run_on_all_ranks


def evaluate_saved(config: EvaluateConfig) -> dict[str, Evaluation]:
    """Predict and score splits with a fine-tuned model; every rank calls this and gets the same result."""
    topology = groups.init_process_groups(tp=config.parallel.tp, timeout_s=config.collective_timeout_s)
    start, task, splits, engine_config = run_on_all_ranks(topology, lambda: _prepare(config, topology))
    if topology.is_rank_zero:
        is_complete = not (start.folder.parent.parent / UNFINISHED).exists()
        print_safely(f"model: {start.folder}{'' if is_complete else ' (its fine-tuning is not complete)'}")
    model = task_model_config(start.model, dropout=None)
    engine = build_task_engine(task, model, engine=engine_config, optim=OptimConfig(), topology=topology, seed=0)
    with CheckpointReader(start.folder) as reader:
        EngineState(engine, topology).load_weights(reader)
    evaluations = {}
    for split in splits:
        evaluations[split.name] = evaluate(engine, task, split, topology, micro_batch=engine_config.micro_batch)
        if topology.is_rank_zero:
            print_safely(score_line(split.name, evaluations[split.name].scores))
            if config.predictions is not None:
                write_predictions(predictions_file(config.predictions, split.name), evaluations[split.name].predictions)
    return evaluations


def _prepare(config: EvaluateConfig, topology: Topology) -> tuple[PretrainedModel, Task, list[Split], EngineConfig]:
    start = find_pretrained(config.model)
    saved = start.state["configuration"].get("task")
    if not isinstance(saved, dict) or saved.get("kind") not in TASKS:
        raise ConfigError(
            [f"{start.folder} has no head of a task, it is a pre-trained model: run `pmlm finetune` first"]
        )
    kind = TASKS[saved["kind"]]
    task = kind.restore(saved["settings"], start.vocabulary)
    source = config.data or saved["data"]
    splits = [read_split(task, name, source) for name in config.split or kind.validation]
    engine = engine_config_for_batch(config.ds_config, topology, batch=None)
    raise_if_any(problems_of_model(start.model, tp=config.parallel.tp))
    if config.predictions is not None and topology.is_rank_zero:
        _prepare_predictions(config.predictions, splits)
    return start, task, splits, engine


def _prepare_predictions(folder: Path, splits: Sequence[Split]) -> None:
    existing = [file for split in splits if (file := predictions_file(folder, split.name)).exists()]
    raise_if_any([f"--predictions: {file} exists already, and nothing is overwritten" for file in existing])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"--predictions ({folder}) cannot be made: {error}; name another folder"]) from error
