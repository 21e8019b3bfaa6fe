"""`pmlm finetune`: one job for each recipe and seed, trained by the loop of pre-training.

    checkpoint, DeepSpeed's JSON, rows   --prepare: all problems at once, on all ranks-->   FinetuneData
    FinetuneData + recipe + seed         --train_job-->   a folder each: checkpoint, vocabulary, scores, predictions
    several recipes or seeds             --summarize-->   OUTPUT/summary.json: mean and deviation

An interrupted command resumes: complete jobs are read, the others start from their newest checkpoint.
"""

import dataclasses
import gc
import json
from collections.abc import Sequence

from pmlm_dist.checkpoint.folder import newest_valid_at
from pmlm_dist.config import raise_if_any
from pmlm_dist.console import print_safely
from pmlm_dist.downstream.job import SCORES, FinetuneJob
from pmlm_dist.downstream.preparation import FinetuneData, engine_config_for_batch, prepare, task_model_config
from pmlm_dist.downstream.settings import UNFINISHED, FinetuneConfig, Recipe, check, recipes
from pmlm_dist.downstream.summary import FinetuneRun, summarize
from pmlm_dist.files import write_atomically
from pmlm_dist.parallel.groups import run_on_all_ranks
from pmlm_dist.relations import problems_of_model
from pmlm_dist.supervision.heartbeat import Heartbeat
from pmlm_dist.supervision.signals import StopSignals
from pmlm_dist.training.attempt import Attempt, open_attempt
from pmlm_dist.training.run import train_job

SUMMARY = "summary.json"


def finetune(
    config: FinetuneConfig, heartbeat: Heartbeat | None = None, signals: StopSignals | None = None
) -> list[FinetuneRun]:
    """Fine-tune as `config` says, once for each recipe and seed; every rank calls this and gets the same result.

    Raises `ConfigError` on every rank, before anything is computed or written, with all problems; `FolderInUse` if
    another attempt is active in the folder; `Stopped`, with a checkpoint saved, after a signal or a file `STOP`.
    """
    check(config)
    with open_attempt(
        config.output,
        tp=config.parallel.tp,
        collective_timeout_s=config.collective_timeout_s,
        grace_s=config.grace_s,
        watchdog=config.watchdog,
        signals=signals,
        heartbeat=heartbeat,
    ) as attempt:
        return _finetune(config, attempt)


def _finetune(config: FinetuneConfig, attempt: Attempt) -> list[FinetuneRun]:
    topology = attempt.topology
    data = run_on_all_ranks(topology, lambda: prepare(config, topology))
    jobs = run_on_all_ranks(topology, lambda: _jobs(data))
    if topology.is_rank_zero:
        (config.output / UNFINISHED).touch()
    runs = [_complete_run(job) or _train(job, attempt) for job in jobs]
    if len(jobs) > 1:
        summary = summarize(runs, split=data.scored[0].name, metric=data.task.metric)
        if topology.is_rank_zero:
            write_atomically(config.output / SUMMARY, json.dumps(summary.as_json(), indent=2) + "\n")
            print_safely(summary.table())
    if topology.is_rank_zero:
        (config.output / UNFINISHED).unlink()
    return runs


def _train(job: FinetuneJob, attempt: Attempt) -> FinetuneRun:
    """Train one job, from the pre-trained model or its newest checkpoint; every rank calls."""
    folder, newest = attempt.open_checkpoints(job.output, keep=1, is_kept=lambda step: step == job.progress.kept)
    if newest:
        job.check_identity(newest)
        job.progress.restore(newest)
    run = train_job(job, attempt, folder=folder, newest=newest)
    gc.collect()  # an engine is full of reference cycles; the next one needs its memory
    return run


def _complete_run(job: FinetuneJob) -> FinetuneRun | None:
    """Return the result of a job that an earlier attempt completed; every rank calls."""

    def read() -> FinetuneRun | None:
        if not job.topology.is_rank_zero or not (job.output / SCORES).is_file():
            return None
        job.check_identity(newest_valid_at(job.output))
        summary = json.loads((job.output / SCORES).read_text(encoding="utf-8"))
        recipe = dataclasses.asdict(job.recipe)
        return FinetuneRun(recipe, job.seed, summary["scores"], summary["losses"], str(job.output))

    return job.topology.broadcast_object(run_on_all_ranks(job.topology, read))


def _jobs(data: FinetuneData) -> list[FinetuneJob]:
    """Return one job for each recipe and seed. Raises `ConfigError`."""
    config, topology = data.config, data.topology
    chosen = recipes(config)
    several = len(chosen) > 1 or config.seeds > 1
    jobs = []
    for recipe in chosen:
        engine = engine_config_for_batch(
            config.ds_config, topology, batch=recipe.batch, micro=config.batch.micro, zero=config.zero
        )
        model = task_model_config(data.start.model, dropout=recipe.dropout)
        raise_if_any(problems_of_model(model, tp=config.parallel.tp))
        for seed in range(config.seed, config.seed + config.seeds):
            output = config.output / _name_of(recipe, seed, varied=_varied(chosen)) if several else config.output
            jobs.append(FinetuneJob(data, recipe, seed=seed, output=output, engine_config=engine, model_config=model))
    return jobs


def _varied(chosen: Sequence[Recipe]) -> list[str]:
    names = [field.name for field in dataclasses.fields(Recipe)]
    return [name for name in names if len({getattr(recipe, name) for recipe in chosen}) > 1]


def _name_of(recipe: Recipe, seed: int, *, varied: Sequence[str]) -> str:
    return "-".join([*(f"{name}={getattr(recipe, name):g}" for name in varied), f"seed={seed}"])
