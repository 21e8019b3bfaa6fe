"""The plan of a run: everything that `pmlm plan` prints, including warnings.

PlanConfig + DeepSpeed's JSON + device  ->  Job  ->  Estimate  ->  Plan
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.devices import DEVICES, Device
from pmlm_dist.engine.deepspeed_config import EngineConfig, load_engine_config
from pmlm_dist.masking.blockwise import max_predictions
from pmlm_dist.objectives import OBJECTIVES
from pmlm_dist.planning.advice import advice
from pmlm_dist.planning.communication import Cluster
from pmlm_dist.planning.estimate import Estimate, Job, Layout
from pmlm_dist.planning.parameters import total_parameters
from pmlm_dist.planning.reliability import Checkpoints, checkpoints, writers
from pmlm_dist.planning.settings import PlanConfig

DAY = 86_400


@dataclass(frozen=True)
class Plan:
    """Memory, time, communication and checkpoints of a run; seconds, bytes and FLOPs."""

    config: PlanConfig
    cluster: Cluster
    estimate: Estimate
    parameters: int
    """Of the whole model, including the rows that pad the vocabulary."""
    checkpoints: Checkpoints
    alternatives: tuple[Estimate, ...]
    """For each ZeRO stage the fastest layout that fits, fastest first."""
    warnings: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of all steps, without failures and checkpoints."""
        return self.config.steps * self.estimate.time.total

    @property
    def days(self) -> float:
        """From start to end, including failures and checkpoints; infinite if no step is ever completed."""
        return self.seconds / self.checkpoints.effective / DAY if self.checkpoints.effective else float("inf")

    @property
    def slots(self) -> int:
        """Slots of a step, over all ranks."""
        return self.estimate.work.slots * self.estimate.global_batch

    def as_dict(self) -> dict[str, Any]:
        estimate = self.estimate
        return {
            "nodes": self.cluster.nodes,
            "gpus_per_node": self.cluster.gpus_per_node,
            "device": {**dataclasses.asdict(self.cluster.device), "peak": dict(self.cluster.device.peak)},
            "parameters": self.parameters,
            **_summary(estimate),
            "global_batch": estimate.global_batch,
            "precision": estimate.job.engine.precision,
            "sequence_length": estimate.work.context,
            "predictions": estimate.work.predictions,
            "flops": estimate.flops,
            "slots": self.slots,
            "memory": {**dataclasses.asdict(estimate.memory), "device": estimate.memory.device},
            "time": dataclasses.asdict(estimate.time),
            "traffic": [
                dataclasses.asdict(sent.collective)
                | {"inside": sent.inside, "outside": sent.outside, "s": sent.seconds}
                for sent in estimate.traffics
            ],
            "steps": self.config.steps,
            "days": self.days,
            "checkpoints": {**dataclasses.asdict(self.checkpoints), "effective": self.checkpoints.effective},
            "warnings": list(self.warnings),
            "alternatives": [_summary(alternative) for alternative in self.alternatives],
        }


def _summary(estimate: Estimate) -> dict[str, Any]:
    return {
        "tp": estimate.layout.tp,
        "dp": estimate.dp,
        "zero": estimate.layout.zero,
        "micro_batch": estimate.layout.micro_batch,
        "accumulation": estimate.accumulation,
        "activation_checkpointing": estimate.layout.recompute,
        "memory_per_gpu": estimate.memory.device,
        "fits": estimate.fits,
        "step_s": estimate.time.total,
        "mfu": estimate.mfu,
    }


def make_plan(config: PlanConfig, *, measured: Device | None = None) -> Plan:
    """The plan of `config`, on its device or on the `measured` one.

    Raises `ConfigError` with all problems of the settings.
    """
    problems = config.problems()
    device = measured or DEVICES.get(config.device)
    engine = _engine(config, problems, has_accelerator=device is None or device.is_accelerator)
    if engine is not None and device is not None and engine.precision not in device.peak:
        problems.append(
            f"{device.name} has no {engine.precision} products: use a DeepSpeed JSON with one of "
            f"{', '.join(sorted(device.peak))} (--ds-config)"
        )
    raise_if_any(problems)
    assert engine is not None
    assert device is not None
    job = Job(
        model=config.model,
        context=config.context,
        predictions=max_predictions(config.context, config.masking),
        objectives=OBJECTIVES[config.objective.kind],
        engine=engine,
        cluster=Cluster(config.assumed(device), config.nodes, config.in_node),
    )
    layout = Layout(config.parallel.tp, engine.zero_stage, engine.micro_batch, config.model.activation_checkpointing)
    alternatives, estimate = job.alternatives(layout), job.estimate(layout)
    parameters = total_parameters(estimate.work)
    saving = checkpoints(
        parameters,
        gpus=config.gpus,
        writers=writers(zero_stage=layout.zero, tp=layout.tp, dp=config.gpus // layout.tp),
        gpu_hours=config.assume.failure_hours,
        bytes_per_s=1e9 * config.assume.storage_gb_per_s,
        restart_s=60 * config.assume.restart_minutes,
        step_s=estimate.time.total,
    )
    warnings = advice(estimate, saving, alternatives, checkpoint_every=config.checkpoint_every, steps=config.steps)
    return Plan(config, job.cluster, estimate, parameters, saving, tuple(alternatives), tuple(warnings))


def _engine(config: PlanConfig, problems: list[str], *, has_accelerator: bool) -> EngineConfig | None:
    """The validated DeepSpeed JSON; None, and its problems added to `problems`, if it is invalid."""
    try:
        return load_engine_config(
            config.ds_config, has_accelerator=has_accelerator, overrides=config.batch.overrides(zero=config.zero)
        )
    except ConfigError as error:
        problems += error.problems
        return None
