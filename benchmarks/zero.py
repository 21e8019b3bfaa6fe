"""Memory of a rank by ZeRO stage and number of ranks, compared with the theory and with the plan.

theory          bytes a parameter over D ranks in half precision: stage 0: 16, 1: 4 + 12 / D, 2: 2 + 14 / D, 3: 16 / D
                (stage 0 is measured in fp32, the only correct precision of DeepSpeed's stage 0: 4 + 4 + 8 is 16 too)
between steps   memory of a rank between two steps
peak            peak in a step, including gradients, buckets, temporary tensors of the update, activations
plan            peak according to `pmlm plan`
offload         fp32 copy, moments and gradients in the host's memory; on a CPU that is the same memory

Memory: resident memory of each rank's process beyond that before the model was built, with freed memory released. Ranks
are real gloo processes; the largest one counts.
"""

import dataclasses
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from harness import MemoryMeter, Report
from ranks import World
from training_run import Shape, Training, releasing_freed_memory, warm_up

from pmlm_dist.config import ModelConfig, RunConfig

BUCKET = 2_000_000
_BF16 = {"bf16": {"enabled": True}}
_STAGES: dict[int, dict[str, Any]] = {0: {}, 1: _BF16, 2: _BF16, 3: _BF16}


@dataclass(frozen=True)
class ZeroOptions:
    """Model and ranks."""

    hidden_size: int = 512
    """Hidden size; heads have size 64, the feed-forward network is four times as wide."""
    num_layers: int = 8
    """Number of layers."""
    vocabulary: int = 30_528
    """Size of the vocabulary."""
    sequence_length: int = 32
    """Tokens of a sequence: few, so that activations are small compared with the model."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """World sizes."""
    offload: bool = True
    """Measure offloading as well; DeepSpeed compiles its CPU Adam for it, once, in one or two minutes."""

    def quick(self) -> Self:
        """A smoke run."""
        return dataclasses.replace(self, hidden_size=128, num_layers=2, vocabulary=500, ranks=(1, 2), offload=False)

    @property
    def model(self) -> ModelConfig:
        """The shape of the model."""
        return ModelConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.hidden_size // 64,
            ffn_size=4 * self.hidden_size,
        )


def theory(stage: int, *, ranks: int) -> float:
    """Bytes a parameter (Rajbhandari et al., ZeRO, 2020, section 3)."""
    return {0: 16.0, 1: 4 + 12 / ranks, 2: 2 + 14 / ranks, 3: 16 / ranks}[stage]


def run(options: ZeroOptions) -> Report:
    """Measure one world after the other."""
    if options.offload:
        _compile_offloaded_update()
    rows: dict[str, dict[str, float]] = {}
    for ranks in options.ranks:
        for stage in _STAGES:
            rows[f"ZeRO {stage}, {_count(ranks)}"] = _measure(options, stage, ranks=ranks)
        for stage in (1, 2, 3) if options.offload else ():
            rows[f"ZeRO {stage} offload, {_count(ranks)}"] = _measure(options, stage, ranks=ranks, offload=True)
    most = max(options.ranks)
    figures = {f"zero{stage}_between_steps_vs_theory": _against_theory(rows, stage, most) for stage in _STAGES}
    figures["plan_error"] = max(abs(row["plan"] / row["peak"] - 1) for row in rows.values())
    return Report("zero", dataclasses.asdict(options), rows, figures)


def _count(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def _against_theory(rows: dict[str, dict[str, float]], stage: int, ranks: int) -> float:
    row = rows[f"ZeRO {stage}, {_count(ranks)}"]
    return row["between steps"] / row["theory"]


def _measure(options: ZeroOptions, stage: int, *, ranks: int, offload: bool = False) -> dict[str, float]:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 1000}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    engine = {**_STAGES[stage], "zero_optimization": zero}
    shape = Shape(options.model, options.sequence_length, micro_batch=1, dp=ranks, engine=engine)
    with tempfile.TemporaryDirectory() as folder:
        config = releasing_freed_memory(shape.run_config(shape.write_corpus(Path(folder))))
        with World(_prepare, config, ranks=ranks) as world:
            results = world.call()
    parameters = results[0]["parameters"]
    row = {} if offload else {"theory": theory(stage, ranks=ranks)}
    row |= {name: max(rank[name] for rank in results) / parameters for name in ("between steps", "peak")}
    return {**row, "plan": shape.planned_memory().device / parameters}


def _prepare(config: RunConfig) -> Callable[[], dict[str, float]]:
    from pmlm_dist.parallel import groups
    from pmlm_dist.parallel.layers import count_parameters

    groups.init_process_groups()
    warm_up(config)
    memory = MemoryMeter()
    training = Training(config)

    def measure() -> dict[str, float]:
        training.step()
        training.step()
        gc.collect()
        between_steps = memory.now()
        memory.reset_peak()
        training.step()
        return {
            "between steps": between_steps,
            "peak": memory.peak(),
            "parameters": count_parameters(training.module, training.run.topology),
        }

    return measure


def _compile_offloaded_update() -> None:
    """Compile DeepSpeed's CPU Adam before the ranks start, which would wait for the lock of the compilation."""
    code = "from deepspeed.ops.op_builder import CPUAdamBuilder as b; b().load(verbose=False)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900, env=_with_ninja(), stdout=subprocess.DEVNULL)


def _with_ninja() -> dict[str, str]:
    folder = os.path.dirname(sys.executable)
    return {**os.environ, "PATH": os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])}
