"""Collectives of a training step, and the sockets of the process groups, by the number of ranks."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from random_text import random_corpus

from pmlm_dist.checkpoint.engine_state import EngineState
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import DataConfig, OptimConfig, RunConfig, TrainConfig, WatchdogConfig
from pmlm_dist.metrics.run_log import RunLog
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.groups import PendingMaxima, Topology
from pmlm_dist.training.attempt import open_attempt
from pmlm_dist.training.job import TrainingSession
from pmlm_dist.training.loop import _Loop
from pmlm_dist.training.pretraining import PretrainJob
from pmlm_dist.training.resolve import resolve
from scale.counting import Collectives
from scale.simulated import MODEL, created_groups, join

_LOGGED, _STEPS = 4, 6


def count(ranks: int, folder: Path) -> dict[str, dict[str, float]]:
    """Rows: sockets by kind of device; a step, and one that is logged."""
    rows = {
        "groups on CPUs": {"sockets": _sockets(ranks)},
        "groups on GPUs": {"sockets": ranks - 1.0 + _on_gpus(ranks)},
    }
    collectives, waited_for = _train(ranks, folder)
    for name, step in (("a step", _LOGGED - 1), ("a logged step", _LOGGED)):
        rows[name] = {
            "collectives": collectives.count[step],
            "bytes": collectives.bytes[step],
            "agreements": collectives.host[step],
            "waited for": waited_for[step],
        }
    return rows


def _sockets(ranks: int) -> float:
    """Connections of rank 0 in a world of gloo, whose groups connect every rank with every other."""
    with created_groups() as created:
        join(ranks)
    return ranks - 1.0 + sum(size - 1 for size, backend in created if backend != "nccl")


def _on_gpus(ranks: int) -> float:
    """Connections of rank 0's groups beside the world's, if the devices are GPUs."""
    groups.parallel_state.destroy_model_parallel()
    with created_groups() as created, mock.patch.object(groups, "_device", return_value=torch.device("cuda")):
        join(ranks)
    groups.parallel_state.destroy_model_parallel()
    join(ranks)
    return float(sum(size - 1 for size, backend in created if backend != "nccl"))


def _train(ranks: int, folder: Path) -> tuple[Collectives, dict[int, int]]:
    """Take some steps of the real loop; returns its collectives, and by step those that the host has waited for."""
    collectives = Collectives()
    started: dict[int, tuple[PendingMaxima, int]] = {}
    deferred = dict.fromkeys(range(_STEPS + 1), 0)
    start, wait = Topology.start_all_reduce_max, PendingMaxima.wait

    def start_recorded(*args: Any) -> PendingMaxima:
        pending = start(*args)
        started[id(pending)] = pending, collectives.step
        deferred[collectives.step] += 1
        return pending

    def wait_recorded(pending: PendingMaxima) -> list[int]:
        began = started[id(pending)][1]
        deferred[began] -= began == collectives.step
        return wait(pending)

    with (
        mock.patch.object(Topology, "start_all_reduce_max", start_recorded),
        mock.patch.object(PendingMaxima, "wait", wait_recorded),
    ):
        _take_steps(ranks, folder, collectives)
    return collectives, {step: collectives.host[step] - deferred[step] for step in deferred}


def _take_steps(ranks: int, folder: Path, collectives: Collectives) -> None:
    topology, config = join(ranks), _run_config(ranks, folder)
    job = PretrainJob(resolve(config, topology))
    job.settings = dataclasses.replace(job.settings, guard_every=None)  # the batches of all ranks are those of rank 0
    with open_attempt(config.run_dir, tp=1, collective_timeout_s=300, grace_s=60, watchdog=WatchdogConfig()) as attempt:
        engine = job.build_engine()
        log = RunLog(config.run_dir, enabled=False, first_step=0)
        checkpoints = CheckpointFolder(config.run_dir / "checkpoints", keep=1)
        session = TrainingSession(attempt, engine, EngineState(engine, topology), log, checkpoints)
        job.start(session, RunState())
        loop = _Loop(job, session, RunState())
        with collectives:
            for step in range(1, _STEPS + 1):
                collectives.step = step
                loop.between_steps()
                loop.step()
        job.close()


def _run_config(ranks: int, folder: Path) -> RunConfig:
    assert MODEL.vocab_size is not None
    corpus = random_corpus(
        folder / "corpus", vocabulary_size=MODEL.vocab_size, samples=8 * ranks, sequence_length=32, shards=ranks
    )
    ds_config = folder / "engine.json"
    engine = {"train_batch_size": ranks, "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    ds_config.write_text(json.dumps(engine))
    return RunConfig(
        corpus=corpus,
        run_dir=folder / "run",
        ds_config=ds_config,
        model=MODEL,
        data=DataConfig(workers=0),
        optim=OptimConfig(peak_lr=1e-4, warmup_steps=10),
        train=TrainConfig(steps=1000, log_every=_LOGGED, allow_slow_steps=True),
    )
