"""`pmlm plan` compared with measurements: memory and step time of the real training path at some shapes.

The plan uses measured rates (`--device measure`), from the same processes and with the same threads.
seconds       median time of a step, measured and planned
resident      peak resident memory of a rank's process in a step beyond that before the model was built, where freed
              memory is released (`--train.no-keep-freed-memory`); planned are torch's allocated bytes
kept          the same with freed memory kept, the default on a CPU; figure `heap` is its ratio to `resident`
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import MemoryMeter, Report
from ranks import World
from training_run import Shape, Training, releasing_freed_memory, warm_up

from pmlm_dist.config import ModelConfig, RunConfig
from pmlm_dist.devices import Device
from pmlm_dist.presets import PRESETS

_BENCH = ModelConfig(hidden_size=512, num_heads=8, ffn_size=2048, hidden_dropout=0.0, attention_dropout=0.0)
_ZERO_1 = {"stage": 1, "reduce_bucket_size": 2_000_000, "allgather_bucket_size": 2_000_000}


@dataclass(frozen=True)
class PlanOptions:
    """Shapes that are planned and measured."""

    batch: int = 4
    """Sequences of a micro-batch of the larger shapes; the tiny preset has four times as many."""
    sequence_length: int = 512
    """Tokens of a sequence of the larger shapes; the tiny preset's are 64."""
    vocabulary: int = 30_528
    """Size of the vocabulary of the larger shapes; the tiny preset's is 8,192."""
    ranks: int = 2
    """Ranks of the last shape; 1 skips it."""
    layers: int = 4
    """Layers of the larger shapes."""
    measure_s: float = 2.0
    """Duration of each part of the measurement of the device."""
    repeats: int = 7
    """Measured steps."""

    def quick(self) -> PlanOptions:
        """A smoke run."""
        small = dataclasses.replace(self, batch=1, sequence_length=64, vocabulary=500, ranks=1, layers=1)
        return dataclasses.replace(small, measure_s=0.05, repeats=1)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes by name."""
        model = dataclasses.replace(_BENCH, vocab_size=self.vocabulary, num_layers=self.layers)
        bench = Shape(model, self.sequence_length, self.batch)
        tiny = dataclasses.replace(PRESETS["tiny"]().model, vocab_size=min(8192, self.vocabulary))
        zero_1 = {"zero_optimization": _ZERO_1}
        shapes = {
            "hidden 512, fp32": bench,
            "hidden 512, fp32, ZeRO 1, 2 micro-batches": dataclasses.replace(bench, engine=zero_1, accumulation=2),
            "hidden 512, bf16, ZeRO 1": dataclasses.replace(bench, engine={**zero_1, "bf16": {"enabled": True}}),
            "tiny, fp32, ZeRO 1": Shape(tiny, 64, 4 * self.batch, engine=zero_1),
        }
        if self.ranks > 1:
            name = f"tiny, fp32, ZeRO 1, {self.ranks} ranks"
            shapes[name] = Shape(tiny, 64, 4 * self.batch, dp=self.ranks, engine=zero_1)
        return shapes


def run(options: PlanOptions) -> Report:
    """Measure one shape after the other; each world measures its device before it trains."""
    rows = {name: _row(options, shape) for name, shape in options.shapes.items()}
    figures = {
        "memory_error": max(abs(row["plan MB"] / row["resident MB"] - 1) for row in rows.values()),
        "time_error": max(abs(row["plan s"] / row["seconds"] - 1) for row in rows.values()),
        "heap": max(row["kept MB"] / row["resident MB"] for row in rows.values()),
    }
    return Report("plan", dataclasses.asdict(options), rows, figures)


def _row(options: PlanOptions, shape: Shape) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        config = shape.run_config(shape.write_corpus(Path(folder)))
        tokens = shape.micro_batch * shape.sequence_length
        with World(_prepare_measurement, config, options, shape.precision, tokens, ranks=shape.dp) as world:
            ranks = world.call()
        with World(_prepare_memory, releasing_freed_memory(config), ranks=shape.dp) as world:
            resident = max(world.call())
    first: dict[str, Any] = ranks[0]
    memory, estimate = shape.planned_memory(), shape.planned_time(first["device"])
    return {
        "seconds": first["seconds"],
        "plan s": estimate.total,
        "resident MB": resident / 1e6,
        "plan MB": memory.allocated / 1e6,
        "kept MB": max(rank["peak"] for rank in ranks) / 1e6,
        "TFLOP/s": first["device"].peak[shape.precision] / 1e12,
        "GB/s": first["device"].bandwidth / 1e9,
    }


def _prepare_measurement(
    config: RunConfig, options: PlanOptions, precision: str, tokens: int
) -> Callable[[], Mapping[str, Any]]:
    from pmlm_dist.parallel import groups
    from pmlm_dist.planning.measure import measure_device

    topology = groups.init_process_groups()
    device: Device = measure_device(precision, topology, model=config.model, tokens=tokens, seconds=options.measure_s)
    step_peak, training = _memory_of_training(config)

    def measure() -> dict[str, Any]:
        peak, seconds = step_peak(), []
        for _ in range(options.repeats):
            topology.barrier()
            start = time.perf_counter()
            training.step()
            seconds.append(time.perf_counter() - start)
        return {"device": device, "seconds": statistics.median(seconds), "peak": peak}

    return measure


def _prepare_memory(config: RunConfig) -> Callable[[], float]:
    from pmlm_dist.parallel import groups

    groups.init_process_groups()
    return _memory_of_training(config)[0]


def _memory_of_training(config: RunConfig) -> tuple[Callable[[], float], Training]:
    """A function that returns the peak bytes of the process in a step, and the training that it steps."""
    warm_up(config)
    memory = MemoryMeter()
    training = Training(config)

    def step_peak() -> float:
        training.step()
        training.step()
        gc.collect()
        memory.reset_peak()
        training.step()
        return memory.peak()

    return step_peak, training
