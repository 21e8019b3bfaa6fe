"""Stall of the training by saving a checkpoint, compared with DeepSpeed's own synchronous save.

ours        `AsyncCheckpointer.save`, plus the time that the next update waits for the copy; a thread writes the files
DeepSpeed   `engine.save_checkpoint`, called between two steps, without flushing to the disk

Both save the same engine to the same disk, in turn, with training steps in between.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Report, pretrain_step
from random_text import random_corpus

from pmlm_dist.checkpoint.async_save import AsyncCheckpointer
from pmlm_dist.checkpoint.engine_state import EngineState
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from pmlm_dist.data.loader import training_batches
from pmlm_dist.metrics.meter import Stopwatch
from pmlm_dist.metrics.run_log import RunLog
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.layers import count_parameters
from pmlm_dist.training.pretraining import PretrainJob, build_engine
from pmlm_dist.training.resolve import resolve

ENGINES: dict[str, dict[str, Any]] = {
    "bf16, ZeRO 1": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000_000}},
    "fp32, ZeRO 0": {"zero_optimization": {"stage": 0}},
}


@dataclass(frozen=True)
class CheckpointOptions:
    """Model, batch and target of the saves."""

    hidden_size: int = 512
    """Hidden size; heads have size 64."""
    num_layers: int = 8
    """Number of layers."""
    vocabulary: int = 30_528
    """Size of the vocabulary."""
    batch: int = 4
    """Sequences of a step."""
    sequence_length: int = 256
    """Tokens of a sequence."""
    threads: int = 2
    """Torch threads."""
    repeats: int = 5
    """Measured saves of each kind."""
    folder: Path | None = None
    """Folder for the checkpoints. None: the system's folder for temporary files."""

    def quick(self) -> CheckpointOptions:
        """A smoke run."""
        return dataclasses.replace(self, hidden_size=64, num_layers=2, vocabulary=500, sequence_length=32, repeats=1)


def run(options: CheckpointOptions) -> Report:
    """Save with each engine in one process, a world of one rank."""
    torch.set_num_threads(options.threads)
    groups.init_process_groups()
    rows: dict[str, dict[str, float]] = {}
    for name, engine in ENGINES.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows |= {f"{name}: {row}": values for row, values in _compare(options, engine, Path(folder)).items()}
    shares = {name: rows[f"{name}: ours"]["share"] for name in ENGINES}
    figures = {
        "stall_share": max(shares.values()),
        "bytes_per_parameter": max(rows[f"{name}: ours"]["bytes a parameter"] for name in ENGINES),
    }
    return Report("checkpoint", {**dataclasses.asdict(options), "folder": str(options.folder)}, rows, figures)


@dataclass(frozen=True)
class _Round:
    """Seconds of one round."""

    step: float
    """A step without a save in progress."""
    stalled: float
    """Ours: stall of the training by a save."""
    lost: float
    """Ours: delay of the training when the checkpoint is on the disk: the stall and the slower steps meanwhile."""
    saved: float
    """DeepSpeed: duration of its save."""


def _compare(options: CheckpointOptions, engine: dict[str, Any], folder: Path) -> dict[str, dict[str, float]]:
    training = _Training(options, engine, folder)
    rounds = [_round(training) for _ in range(options.repeats + 1)][1:]  # the first one allocates buffers and moments
    return {
        "ours": {
            "stall s": statistics.median(r.stalled for r in rounds),
            "share": statistics.median(r.stalled / r.saved for r in rounds),
            "lost s": statistics.median(r.lost for r in rounds),
            "step s": statistics.median(r.step for r in rounds),
            "bytes a parameter": training.our_bytes() / training.parameters,
        },
        "DeepSpeed": {
            "stall s": statistics.median(r.saved for r in rounds),
            "share": 1.0,
            "bytes a parameter": training.deepspeed_bytes / training.parameters,
        },
    }


def _round(training: _Training) -> _Round:
    step = statistics.median(_seconds(training.step) for _ in range(3))
    stalled_before, start, steps = training.checkpointer.stalled_s, time.perf_counter(), 0
    training.save()
    while steps == 0 or training.is_writing():
        training.step()
        steps += 1
    lost = time.perf_counter() - start - steps * step
    training.checkpointer.close()
    stalled = training.checkpointer.stalled_s - stalled_before
    return _Round(step, stalled, lost, saved=training.save_with_deepspeed())


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class _Training:
    """A run of one rank with both kinds of saves."""

    def __init__(self, options: CheckpointOptions, engine: dict[str, Any], folder: Path):
        self._folder, self.state, self.deepspeed_bytes = folder, RunState(), 0
        config = _run_config(options, engine, folder)
        self._run = resolve(config, groups.init_process_groups())
        self._engine = build_engine(self._run)
        assert isinstance(self._engine.module, torch.nn.Module)
        self.parameters = count_parameters(self._engine.module, self._run.topology)
        loading = self._run.config.data
        self._batches = training_batches(
            self._run.source, lanes=self._run.lanes, share=self._run.share, loading=loading
        )
        self._checkpoints = CheckpointFolder(folder / "ours", keep=1)
        log = RunLog(folder, enabled=False, first_step=0)
        metadata = {"identity": self._run.identity(), "configuration": self._run.configuration()}
        engine_state = EngineState(self._engine, self._run.topology)
        self.checkpointer = AsyncCheckpointer(engine_state, self._checkpoints, log, metadata=metadata, timeout_s=600)
        self._job, self._stopwatch = PretrainJob(self._run), Stopwatch(self._run.topology.device)
        self._saved_step = 0

    def save(self) -> None:
        """Start an asynchronous save of ours."""
        self._saved_step = self.state.step
        self.checkpointer.save(self.state)

    def step(self) -> None:
        """One step of the training."""
        self.state = pretrain_step(self._job, self._engine, self._batches, self.state, self._stopwatch)

    def is_writing(self) -> bool:
        """Return True while the last checkpoint is neither on the disk nor abandoned."""
        self.checkpointer.log_finished()
        return self.checkpointer.failures == 0 and not self._checkpoints.folder(self._saved_step).exists()

    def our_bytes(self) -> int:
        """Size of our newest checkpoint."""
        return _size(self._checkpoints.steps()[-1])

    def save_with_deepspeed(self) -> float:
        """Seconds of DeepSpeed's own save; its files are removed afterwards."""
        target = self._folder / "deepspeed"
        seconds = _seconds(lambda: self._engine.save_checkpoint(str(target), tag="saved"))
        self.deepspeed_bytes = _size(target)
        shutil.rmtree(target)
        return seconds


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _run_config(options: CheckpointOptions, engine: dict[str, Any], folder: Path) -> RunConfig:
    corpus = random_corpus(
        folder / "corpus",
        vocabulary_size=options.vocabulary,
        samples=64 * options.batch,
        sequence_length=options.sequence_length,
    )
    ds_config = folder / "engine.json"
    batches = {"train_batch_size": options.batch, "train_micro_batch_size_per_gpu": options.batch}
    ds_config.write_text(json.dumps({**engine, **batches}))
    return RunConfig(
        corpus=corpus,
        run_dir=folder / "run",
        ds_config=ds_config,
        model=ModelConfig(
            hidden_size=options.hidden_size,
            num_layers=options.num_layers,
            num_heads=options.hidden_size // 64,
            ffn_size=4 * options.hidden_size,
        ),
        data=DataConfig(workers=0),
        optim=OptimConfig(peak_lr=1e-4, warmup_steps=10),
        train=TrainConfig(steps=100_000),
    )
