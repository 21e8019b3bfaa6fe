"""A job and the ways to lay it out: what each takes in memory and time, and which of them fit.

Job (model, batch, cluster)  +  Layout (tensor-parallel size, ZeRO stage, micro-batch, recomputation)  ->  Estimate
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pmlm_dist.config import ModelConfig, divisors
from pmlm_dist.engine.deepspeed_config import EngineConfig
from pmlm_dist.planning.communication import Cluster, Traffic, collectives, traffic
from pmlm_dist.planning.memory import Memory, memory
from pmlm_dist.planning.model_states import Zero
from pmlm_dist.planning.step_time import StepTime, step_time
from pmlm_dist.planning.workload import VOCABULARY_MULTIPLE, Workload


@dataclass(frozen=True)
class Layout:
    """How a job is cut."""

    tp: int
    zero: int
    """ZeRO stage."""
    micro_batch: int
    recompute: bool = False
    """Activation checkpointing."""

    @property
    def options(self) -> str:
        """As the command line says it."""
        text = f"--tp {self.tp} --zero {self.zero} --micro-batch {self.micro_batch}"
        return f"{text} --model.activation-checkpointing" if self.recompute else text


@dataclass(frozen=True)
class Job:
    """What is to be computed, and where."""

    model: ModelConfig
    context: int
    predictions: int
    objectives: tuple[str, ...]
    engine: EngineConfig
    cluster: Cluster

    def work(self, layout: Layout) -> Workload:
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
        """What `layout` takes; a global batch that it does not divide is raised to the next multiple."""
        dp = self.cluster.gpus // layout.tp
        accumulation = math.ceil(self.engine.global_batch / (dp * layout.micro_batch))
        work, zero, device = self.work(layout), Zero.from_engine(self.engine, stage=layout.zero), self.cluster.device
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
        share, rest = divmod(self.engine.global_batch, self.cluster.gpus // tp)
        return [] if rest else divisors(share)

    @property
    def stages(self) -> tuple[int, ...]:
        """ZeRO stages that train rightly: DeepSpeed's stage 0 does so in fp32 only."""
        return (0, 1, 2, 3) if self.engine.precision == "fp32" else (1, 2, 3)

    @property
    def tensor_parallel_sizes(self) -> list[int]:
        """Sizes that stay inside a node and divide heads, feed-forward network and vocabulary."""
        sizes = (self.model.num_heads, self.model.ffn_size, VOCABULARY_MULTIPLE)
        return [tp for tp in divisors(self.cluster.gpus_per_node) if not any(size % tp for size in sizes)]

    def alternatives(self, layout: Layout) -> list[Estimate]:
        """For each ZeRO stage the fastest way that fits, fastest first.

        It is looked for where the least is changed: with the tensor-parallel size and the recomputation of `layout`,
        else with recomputation, else with the smallest other tensor-parallel size that has one.
        """
        found = []
        for stage in self.stages:
            ways = self._ways(replace(layout, zero=stage))
            found += [best for best in (_fastest(estimates) for estimates in ways) if best][:1]
        return sorted(found, key=lambda estimate: estimate.time.total)

    def _ways(self, layout: Layout) -> Iterator[list[Estimate]]:
        sizes = [layout.tp, *(tp for tp in self.tensor_parallel_sizes if tp != layout.tp)]
        for tp in sizes:
            for recompute in (True,) if layout.recompute else (False, True):
                yield [
                    self.estimate(Layout(tp, layout.zero, micro_batch, recompute))
                    for micro_batch in self.micro_batches(tp)
                ]


@dataclass(frozen=True)
class Estimate:
    """What a layout of a job takes on every rank."""

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
        """Whether the device has the memory."""
        return self.memory.device <= self.job.cluster.device.memory

    @property
    def global_batch(self) -> int:
        """Sequences of a step: those of DeepSpeed's JSON, or the next multiple of what the ranks take at a time."""
        return self.dp * self.accumulation * self.layout.micro_batch

    @property
    def flops(self) -> float:
        """Model FLOPs of a step, over all ranks."""
        return 3.0 * self.work.sample_flops * self.global_batch

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: of the devices' peak."""
        cluster, precision = self.job.cluster, self.job.engine.precision
        return self.flops / self.time.total / (cluster.gpus * cluster.device.peak[precision])


def _fastest(estimates: list[Estimate]) -> Estimate | None:
    return min((estimate for estimate in estimates if estimate.fits), key=lambda e: e.time.total, default=None)
