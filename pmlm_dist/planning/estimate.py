"""A job and its possible layouts: memory and time of each, and which of them fit.

Job (model, batch, cluster)  +  Layout (tensor-parallel size, ZeRO stage, micro-batch, recomputation)  ->  Estimate
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pmlm_dist.config import ModelConfig
from pmlm_dist.engine.deepspeed_config import EngineConfig
from pmlm_dist.planning.communication import Cluster, Traffic, collectives, traffic
from pmlm_dist.planning.memory import Memory, memory
from pmlm_dist.planning.model_states import Zero
from pmlm_dist.planning.step_time import StepTime, step_time
from pmlm_dist.planning.workload import VOCABULARY_MULTIPLE, Workload
from pmlm_dist.relations import divisors


@dataclass(frozen=True)
class Layout:
    """How a job is distributed over the ranks: `zero` is the ZeRO stage, `recompute` activation checkpointing."""

    tp: int
    zero: int
    micro_batch: int
    recompute: bool = False

    @property
    def options(self) -> str:
        """The layout as options of `pmlm plan` and train.py alike."""
        text = f"--parallel.tp {self.tp} --zero {self.zero} --batch.micro {self.micro_batch}"
        return f"{text} --model.activation-checkpointing" if self.recompute else text


@dataclass(frozen=True)
class Job:
    """Model, batch and cluster of a run."""

    model: ModelConfig
    context: int
    predictions: int
    objectives: tuple[str, ...]
    engine: EngineConfig
    cluster: Cluster

    def workload(self, layout: Layout) -> Workload:
        """One micro-batch on one rank."""
        return Workload(
            model=replace(self.model, activation_checkpointing=layout.recompute),
            context=self.context,
            predictions=self.predictions,
            micro_batch=layout.micro_batch,
            objectives=self.objectives,
            tp=layout.tp,
            precision=self.engine.precision,
            on_accelerator=self.cluster.device.is_accelerator,
        )

    def estimate(self, layout: Layout) -> Estimate:
        """Memory and time of `layout`; a global batch that it does not divide is rounded up to the next multiple."""
        dp = self.cluster.gpus // layout.tp
        accumulation = math.ceil(self.engine.global_batch / (dp * layout.micro_batch))
        work, device = self.workload(layout), self.cluster.device
        zero = Zero.from_engine(self.engine, stage=layout.zero)
        sent = tuple(
            traffic(collective, self.cluster, tp=layout.tp)
            for collective in collectives(work, zero, dp=dp, accumulation=accumulation)
        )
        return Estimate(
            job=self,
            layout=layout,
            work=work,
            zero=zero,
            dp=dp,
            accumulation=accumulation,
            memory=memory(work, zero, dp=dp, accumulation=accumulation, device=device),
            time=step_time(work, zero, device, dp=dp, accumulation=accumulation, traffics=sent),
            traffics=sent,
        )

    def micro_batches(self, tp: int) -> list[int]:
        """Micro-batches that divide the global batch over the data-parallel ranks; empty when none does."""
        per_rank, rest = divmod(self.engine.global_batch, self.cluster.gpus // tp)
        return [] if rest else divisors(per_rank)

    @property
    def stages(self) -> tuple[int, ...]:
        """ZeRO stages with correct training: DeepSpeed's stage 0 is correct in fp32 only."""
        return (0, 1, 2, 3) if self.engine.precision == "fp32" else (1, 2, 3)

    @property
    def tensor_parallel_sizes(self) -> list[int]:
        """Sizes that stay inside a node and divide heads, feed-forward network and vocabulary."""
        sizes = (self.model.num_heads, self.model.ffn_size, VOCABULARY_MULTIPLE)
        return [tp for tp in divisors(self.cluster.gpus_per_node) if not any(size % tp for size in sizes)]

    def alternatives(self, layout: Layout) -> list[Estimate]:
        """The fastest fitting layout of each ZeRO stage, fastest first.

        The search changes as little as possible: first with the tensor-parallel size and the recomputation of `layout`,
        then with recomputation, then with other tensor-parallel sizes from the smallest. The first fit ends it.
        """
        best = []
        for stage in self.stages:
            candidates = self._candidates(replace(layout, zero=stage))
            best += [fastest for fastest in (_fastest(estimates) for estimates in candidates) if fastest][:1]
        return sorted(best, key=lambda estimate: estimate.time.total)

    def _candidates(self, layout: Layout) -> Iterator[list[Estimate]]:
        sizes = [layout.tp, *(tp for tp in self.tensor_parallel_sizes if tp != layout.tp)]
        for tp in sizes:
            for recompute in (True,) if layout.recompute else (False, True):
                yield [
                    self.estimate(Layout(tp, layout.zero, micro_batch, recompute))
                    for micro_batch in self.micro_batches(tp)
                ]


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a layout of a job, on every rank."""

    job: Job
    layout: Layout
    work: Workload
    zero: Zero
    dp: int
    accumulation: int
    memory: Memory
    time: StepTime
    traffics: tuple[Traffic, ...]

    @property
    def fits(self) -> bool:
        return self.memory.device <= self.job.cluster.device.memory

    @property
    def global_batch(self) -> int:
        """Sequences of a step: DeepSpeed's `train_batch_size`, rounded up to a multiple of dp * micro_batch."""
        return self.dp * self.accumulation * self.layout.micro_batch

    @property
    def flops(self) -> float:
        """Model FLOPs of a step over all ranks, without recomputation."""
        return 3.0 * self.work.sample_flops * self.global_batch

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: fraction of the devices' peak."""
        cluster, precision = self.job.cluster, self.job.engine.precision
        return self.flops / self.time.total / (cluster.gpus * cluster.device.peak[precision])


def _fastest(estimates: list[Estimate]) -> Estimate | None:
    return min((estimate for estimate in estimates if estimate.fits), key=lambda e: e.time.total, default=None)
