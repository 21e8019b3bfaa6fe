"""The settings of `pmlm plan`: what of a preset and of DeepSpeed's JSON is planned, on which devices."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pmlm_dist.config import MaskingConfig, ModelConfig, ObjectiveConfig, ParallelConfig, RunConfig, divisors, problems
from pmlm_dist.devices import DEVICES, GIGA, Device
from pmlm_dist.presets import PRESETS
from pmlm_dist.supervision.attempts import LLAMA_3_HOURS

MEASURE = "measure"
_GPUS_PER_NODE = 8
UNCASED = 30_522
"""Tokens of BERT's uncased vocabulary."""


@dataclass(frozen=True)
class Assumptions:
    """What no setting of the run says; the defaults are those of the device (`pmlm_dist/devices.py`)."""

    matrix_share: float | None = None
    """Share of the device's peak that large matrix products attain. None: the device's (0.6; measured: 1)."""
    bandwidth_share: float | None = None
    """Share of its memory bandwidth that passes over tensors attain. None: the device's (0.8; measured: 1)."""
    link_gb_per_s: float | None = None
    """Bandwidth between devices of a node in one direction. None: the device's."""
    network_gbit_per_s: float | None = None
    """Bandwidth of the network for each device. None: 400 for H100 and H200, 200 for A100 and L40S, 100 for V100."""
    failure_hours: float = LLAMA_3_HOURS
    """Mean hours between failures of one device. Default: that of Llama 3's training, 50,675."""
    restart_minutes: float = 10.0
    """From a failure to the first new step."""
    storage_gb_per_s: float = 0.5
    """Rate at which each rank writes its part of a checkpoint."""


@dataclass(frozen=True)
class PlanConfig:
    """What to plan."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int | None = None
    """Devices of a machine, a rank each. None: 8; with device `measure`: the ranks that measure."""
    device: str = "h100-80gb"
    """A device by name, or `measure`: what this machine attains (under torchrun: with all ranks)."""
    tp: int = 1
    """Tensor-parallel size."""
    zero: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage. None: that of DeepSpeed's JSON."""
    micro_batch: int | None = None
    """Sequences of a forward pass on one rank. None: that of DeepSpeed's JSON."""
    global_batch: int | None = None
    """Sequences of a step. None: that of DeepSpeed's JSON."""
    sequence_length: int | None = None
    """Tokens of a sample. None: model.max_positions."""
    steps: int = 500_000
    """Steps of the run."""
    checkpoint_every: int = 5_000
    """Steps between checkpoints."""
    ds_config: Path = Path("ds_configs/base.json")
    """DeepSpeed's JSON."""
    json: Path | None = None
    """File to write the plan to, as JSON."""
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    assume: Assumptions = field(default_factory=Assumptions)

    @classmethod
    def of_preset(cls, name: str) -> PlanConfig:
        """The settings of a preset, with BERT's vocabulary where it names none."""
        run = PRESETS[name]()
        return cls(
            tp=run.parallel.tp,
            steps=run.train.steps,
            checkpoint_every=run.train.checkpoint_every,
            ds_config=run.ds_config,
            model=replace(run.model, vocab_size=run.model.vocab_size or UNCASED),
            masking=run.masking,
            objective=run.objective,
        )

    @property
    def gpus(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.in_node

    @property
    def in_node(self) -> int:
        """Devices of a machine."""
        return _GPUS_PER_NODE if self.gpus_per_node is None else self.gpus_per_node

    @property
    def context(self) -> int:
        """S: tokens of a sample."""
        return self.sequence_length or self.model.max_positions

    @property
    def overrides(self) -> dict[str, Any]:
        """What replaces settings of DeepSpeed's JSON."""
        given: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "train_batch_size": self.global_batch,
            "zero_optimization": None if self.zero is None else {"stage": self.zero},
        }
        return {name: value for name, value in given.items() if value is not None}

    def assumed(self, device: Device) -> Device:
        """`device` with what is assumed of it."""
        assume = self.assume
        given = {
            "matrix_share": assume.matrix_share,
            "bandwidth_share": assume.bandwidth_share,
            "link": None if assume.link_gb_per_s is None else GIGA * assume.link_gb_per_s,
            "network": None if assume.network_gbit_per_s is None else GIGA * assume.network_gbit_per_s / 8,
        }
        return replace(device, **{name: value for name, value in given.items() if value is not None})

    def problems(self) -> list[str]:
        """Everything that is wrong with the settings by themselves, one sentence a problem."""
        run = RunConfig(
            model=self.model, masking=self.masking, objective=self.objective, parallel=ParallelConfig(self.tp)
        )
        return [*self._number_problems(), *self._place_problems(), *problems(run)]

    def _number_problems(self) -> list[str]:
        names = ("nodes", "steps", "checkpoint_every")
        maybe = ("gpus_per_node", "sequence_length", "micro_batch", "global_batch")
        found = [(name, getattr(self, name)) for name in (*names, *maybe)]
        found += [(f"assume.{name}", value) for name, value in vars(self.assume).items()]
        return [f"{name} ({value}) must be positive" for name, value in found if value is not None and not value > 0]

    def _place_problems(self) -> list[str]:
        found = []
        if self.device not in (MEASURE, *DEVICES):
            found.append(f"device ({self.device}) must be {MEASURE} or one of {', '.join(sorted(DEVICES))}")
        if self.tp > 0 and self.in_node > 0 and self.in_node % self.tp:
            found.append(
                f"tp ({self.tp}) must divide gpus_per_node ({self.in_node}), so that its ranks lie inside a node: "
                f"use one of {divisors(self.in_node)}"
            )
        if self.context > self.model.max_positions:
            found.append(
                f"sequence_length ({self.context}) exceeds model.max_positions ({self.model.max_positions}): "
                "raise --model.max-positions"
            )
        return found
