"""The settings of `pmlm plan`: a preset, changes to it and to DeepSpeed's JSON, and the devices."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pmlm_dist.config import (
    DS_CONFIGS,
    BatchConfig,
    MaskingConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    RunConfig,
)
from pmlm_dist.devices import DEVICES, GIGA, Device
from pmlm_dist.presets import PRESETS
from pmlm_dist.ranges import Positive, range_problems
from pmlm_dist.relations import divisors, relation_problems
from pmlm_dist.supervision.attempts import LLAMA_3_HOURS

MEASURE = "measure"
_GPUS_PER_NODE = 8
UNCASED = 30_522
"""Tokens of BERT's uncased vocabulary."""


@dataclass(frozen=True)
class Assumptions:
    """Rates that no other setting defines. None: the value of the device (`pmlm_dist/devices.py`)."""

    matrix_share: Annotated[float | None, Positive] = None
    """Fraction of the device's peak FLOP/s that large matrix products attain. None: 0.6; measured devices: 1."""
    bandwidth_share: Annotated[float | None, Positive] = None
    """Fraction of the memory bandwidth that element-wise operations attain. None: 0.8; measured devices: 1."""
    link_gb_per_s: Annotated[float | None, Positive] = None
    """Bandwidth in GB/s between devices of a node, in one direction. None: the device's."""
    network_gbit_per_s: Annotated[float | None, Positive] = None
    """Network bandwidth in Gb/s of each device. None: 400 for H100 and H200, 200 for A100 and L40S, 100 for V100."""
    failure_hours: Annotated[float, Positive] = LLAMA_3_HOURS
    """Mean hours between failures of one device. Default: 50,675, as in Llama 3's training."""
    restart_minutes: Annotated[float, Positive] = 10.0
    """Minutes from a failure to the first step after it."""
    storage_gb_per_s: Annotated[float, Positive] = 0.5
    """GB/s at which each rank writes its part of a checkpoint."""


@dataclass(frozen=True)
class PlanConfig:
    """The run to plan."""

    nodes: Annotated[int, Positive] = 1
    """Number of nodes."""
    gpus_per_node: Annotated[int | None, Positive] = None
    """Devices of a node, one rank each. None: 8; with device `measure`: the ranks of this call."""
    device: str = "h100-80gb"
    """Name of a device, or `measure`: the rates that this machine attains (under torchrun: with all ranks)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage. None: from DeepSpeed's JSON."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    sequence_length: Annotated[int | None, Positive] = None
    """Tokens of a sample. None: model.max_positions."""
    steps: Annotated[int, Positive] = 500_000
    """Optimizer steps of the run."""
    checkpoint_every: Annotated[int, Positive] = 5_000
    """Steps between checkpoints."""
    ds_config: Path = DS_CONFIGS / "base.json"
    """DeepSpeed's JSON: batch sizes, precision, ZeRO, offload."""
    json: Path | None = None
    """File to write the plan to, as JSON. None: print it only."""
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    assume: Assumptions = field(default_factory=Assumptions)

    @classmethod
    def of_preset(cls, name: str) -> Self:
        """The settings of a preset, with the size of BERT's vocabulary where it has none."""
        run = PRESETS[name]()
        return cls(
            parallel=run.parallel,
            steps=run.train.steps,
            checkpoint_every=run.train.checkpoint_every,
            ds_config=run.ds_config,
            model=replace(run.model, vocab_size=run.model.vocab_size or UNCASED),
            masking=run.masking,
            objective=run.objective,
        )

    @property
    def gpus(self) -> int:
        return self.nodes * self.in_node

    @property
    def in_node(self) -> int:
        return _GPUS_PER_NODE if self.gpus_per_node is None else self.gpus_per_node

    @property
    def context(self) -> int:
        return self.sequence_length or self.model.max_positions

    def assumed(self, device: Device) -> Device:
        """`device` with the rates of `assume` in place of its own."""
        assume = self.assume
        rates = {
            "matrix_share": assume.matrix_share,
            "bandwidth_share": assume.bandwidth_share,
            "link": None if assume.link_gb_per_s is None else GIGA * assume.link_gb_per_s,
            "network": None if assume.network_gbit_per_s is None else GIGA * assume.network_gbit_per_s / 8,
        }
        return replace(device, **{name: value for name, value in rates.items() if value is not None})

    def problems(self) -> list[str]:
        """One sentence for each invalid setting: setting, value, constraint, way out."""
        problems, tp = range_problems(self), self.parallel.tp
        if self.device not in (MEASURE, *DEVICES):
            problems.append(f"device ({self.device}) must be {MEASURE} or one of {', '.join(sorted(DEVICES))}")
        if tp > 0 and self.in_node > 0 and self.in_node % tp:
            problems.append(
                f"parallel.tp ({tp}) must divide gpus_per_node ({self.in_node}), so that its ranks lie inside a "
                f"node: use one of {divisors(self.in_node)}"
            )
        if self.context > self.model.max_positions:
            problems.append(
                f"sequence_length ({self.context}) exceeds model.max_positions ({self.model.max_positions}): "
                "raise --model.max-positions"
            )
        run = RunConfig(model=self.model, masking=self.masking, objective=self.objective, parallel=self.parallel)
        return [*problems, *relation_problems(run)]
