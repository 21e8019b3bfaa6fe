"""Steps of the real training path, for benchmarks that vary model, engine and ranks."""

import dataclasses
import gc
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import pretrain_step
from random_text import random_corpus
from torch import nn

from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import DataConfig, MaskingConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from pmlm_dist.data.loader import training_batches
from pmlm_dist.devices import Device
from pmlm_dist.engine.deepspeed_config import EngineConfig, load_engine_config
from pmlm_dist.masking.blockwise import max_predictions
from pmlm_dist.metrics.meter import Stopwatch
from pmlm_dist.parallel import groups
from pmlm_dist.planning.communication import Cluster, collectives, traffic
from pmlm_dist.planning.memory import Memory, memory
from pmlm_dist.planning.model_states import Zero
from pmlm_dist.planning.step_time import StepTime, step_time
from pmlm_dist.planning.workload import Precision, Workload
from pmlm_dist.training.pretraining import PretrainJob, build_engine
from pmlm_dist.training.resolve import resolve

HOST = Device("cpu", 0.0, {}, 1.0, 1.0, 1.0, is_accelerator=False, slack=0.0)
"""A CPU for plans of memory only; its rates are placeholders."""


@dataclass(frozen=True)
class Shape:
    """Model, batch and parallelism of a training."""

    model: ModelConfig
    """Must have a `vocab_size`."""
    sequence_length: int
    micro_batch: int
    dp: int = 1
    tp: int = 1
    accumulation: int = 1
    engine: Mapping[str, Any] = field(default_factory=lambda: {"zero_optimization": {"stage": 0}})
    """DeepSpeed's JSON without batch sizes."""

    @property
    def engine_json(self) -> dict[str, Any]:
        """DeepSpeed's JSON."""
        return {
            "train_batch_size": self.micro_batch * self.dp * self.accumulation,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            **self.engine,
        }

    def write_corpus(self, folder: Path) -> Path:
        """Write a corpus of random tokens for this shape to `folder`."""
        assert self.model.vocab_size is not None
        return random_corpus(
            folder,
            vocabulary_size=self.model.vocab_size,
            samples=8 * self.micro_batch * self.dp * self.accumulation,
            sequence_length=self.sequence_length,
        )

    def run_config(self, corpus: Path) -> RunConfig:
        """The settings of a run on `corpus`; writes DeepSpeed's JSON to the folder of the corpus."""
        handle, ds_config = tempfile.mkstemp(dir=corpus, prefix="engine-", suffix=".json")
        with os.fdopen(handle, "w") as file:
            json.dump(self.engine_json, file)
        return RunConfig(
            corpus=corpus,
            run_dir=corpus / "run",
            ds_config=Path(ds_config),
            model=self.model,
            data=DataConfig(workers=0),
            optim=OptimConfig(peak_lr=1e-4, warmup_steps=10),
            parallel=ParallelConfig(tp=self.tp),
            train=TrainConfig(steps=10_000),
        )

    @property
    def precision(self) -> Precision:
        """Data type of weights and activations."""
        return self._engine_config().precision

    def planned_memory(self, device: Device = HOST) -> Memory:
        """Memory of a rank according to `pmlm plan`."""
        zero = Zero.from_engine(self._engine_config())
        return memory(self._workload(device), zero, dp=self.dp, accumulation=self.accumulation, device=device)

    def planned_time(self, device: Device) -> StepTime:
        """Time of a step on ranks of one machine according to `pmlm plan`."""
        work, zero = self._workload(device), Zero.from_engine(self._engine_config())
        machine = Cluster(device, nodes=1, gpus_per_node=self.dp * self.tp)
        split = {"dp": self.dp, "accumulation": self.accumulation}
        sent = [traffic(collective, machine, tp=self.tp) for collective in collectives(work, zero, **split)]
        return step_time(work, zero, device, **split, traffics=sent)

    def _workload(self, device: Device) -> Workload:
        return Workload(
            model=self.model,
            context=self.sequence_length,
            predictions=max_predictions(self.sequence_length, MaskingConfig()),
            micro_batch=self.micro_batch,
            tp=self.tp,
            precision=self.precision,
            on_accelerator=device.is_accelerator,
        )

    def _engine_config(self) -> EngineConfig:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "engine.json"
            path.write_text(json.dumps(self.engine_json))
            return load_engine_config(path, has_accelerator=True)


class Training:
    """A run on this rank with single steps; every rank of the world must construct one."""

    def __init__(self, config: RunConfig):
        topology = groups.init_process_groups(tp=config.parallel.tp)
        self.run = resolve(config, topology)
        self.engine = build_engine(self.run)
        self.batches = training_batches(
            self.run.source, lanes=self.run.lanes, share=self.run.share, loading=self.run.config.data
        )
        self._job, self._state, self._stopwatch = PretrainJob(self.run), RunState(), Stopwatch(topology.device)

    @property
    def module(self) -> nn.Module:
        """The model."""
        assert isinstance(self.engine.module, nn.Module)
        return self.engine.module

    def step(self) -> None:
        """One optimizer step."""
        self._state = pretrain_step(self._job, self.engine, self.batches, self._state, self._stopwatch)


def releasing_freed_memory(config: RunConfig) -> RunConfig:
    """`config` with freed memory released, so that resident memory equals the memory in use."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, keep_freed_memory=False))


def warm_up(config: RunConfig) -> None:
    """Run two steps of a small model with the same engine, so that libraries have allocated their own memory."""
    small = dataclasses.replace(config.model, hidden_size=128, num_layers=2, num_heads=2, ffn_size=256)
    training = Training(dataclasses.replace(config, model=small))
    for _ in range(2):
        training.step()
    del training
    gc.collect()
