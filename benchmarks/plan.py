"""`pmlm plan` against what this machine does: memory and step time of the real training path at some shapes.

The plan gets the rates that it measures itself (`--device measure`), in the same processes and with the same threads.
seconds       median step, and what was planned
allocated     the most that torch has handed out on a rank, from before the model was made on, and the plan of it
resident      the most that a rank's process holds in a step beyond what stood before the model was made. On a CPU that
              is the heap of the C library with its gaps, which nobody plans: figure `heap`, by how much it is more
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Held, Report
from ranks import World
from training_run import Shape, Training, warm_up

from pmlm_dist.config import ModelConfig, RunConfig
from pmlm_dist.devices import Device
from pmlm_dist.presets import PRESETS

_BENCH = ModelConfig(
    hidden_size=512, num_layers=4, num_heads=8, ffn_size=2048, hidden_dropout=0.0, attention_dropout=0.0
)
_ZERO_1 = {"stage": 1, "reduce_bucket_size": 2_000_000, "allgather_bucket_size": 2_000_000}


@dataclass(frozen=True)
class PlanOptions:
    """What is planned and measured."""

    batch: int = 4
    """Sequences of a micro-batch of the larger shapes; the tiny preset takes four times as many."""
    sequence_length: int = 512
    """Tokens of a sequence of the larger shapes; the tiny preset's are 64."""
    vocabulary: int = 30_528
    """Tokens of the vocabulary of the larger shapes; the tiny preset's are 8,192."""
    ranks: int = 2
    """Ranks of the last shape; 1 leaves it out."""
    repeats: int = 7
    """Steps that count."""

    def quick(self) -> PlanOptions:
        """A smoke run."""
        return dataclasses.replace(self, batch=1, sequence_length=64, vocabulary=500, ranks=1, repeats=1)

    @property
    def shapes(self) -> dict[str, Shape]:
        """By name."""
        bench = Shape(dataclasses.replace(_BENCH, vocab_size=self.vocabulary), self.sequence_length, self.batch)
        tiny = dataclasses.replace(PRESETS["tiny"]().model, vocab_size=min(8192, self.vocabulary))
        zero_1 = {"zero_optimization": _ZERO_1}
        found = {
            "hidden 512, fp32": bench,
            "hidden 512, fp32, ZeRO 1, 2 micro-batches": dataclasses.replace(bench, engine=zero_1, accumulation=2),
            "hidden 512, bf16, ZeRO 1": dataclasses.replace(bench, engine={**zero_1, "bf16": {"enabled": True}}),
            "tiny, fp32, ZeRO 1": Shape(tiny, 64, 4 * self.batch, engine=zero_1),
        }
        if self.ranks > 1:
            name = f"tiny, fp32, ZeRO 1, {self.ranks} ranks"
            found[name] = Shape(tiny, 64, 4 * self.batch, dp=self.ranks, engine=zero_1)
        return found


def run(options: PlanOptions) -> Report:
    """One shape after the other; each world measures its device before it trains."""
    rows = {name: _row(options, shape) for name, shape in options.shapes.items()}
    figures = {
        "memory_error": max(abs(row["plan MB"] / row["allocated MB"] - 1) for row in rows.values()),
        "time_error": max(abs(row["plan s"] / row["seconds"] - 1) for row in rows.values()),
        "heap": max(row["resident MB"] / row["allocated MB"] for row in rows.values()),
    }
    return Report("plan", dataclasses.asdict(options), rows, figures)


def _row(options: PlanOptions, shape: Shape) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        config = shape.run_config(shape.write_corpus(Path(folder)))
        tokens = shape.micro_batch * shape.sequence_length
        with World(_measuring, config, options.repeats, shape.precision, tokens, ranks=shape.dp) as world:
            ranks = world.call()
        with World(_allocating, config, ranks=shape.dp) as world:
            allocated = max(world.call())
    first: dict[str, Any] = ranks[0]
    memory, estimate = shape.planned_memory(), shape.planned_time(first["device"])
    return {
        "seconds": first["seconds"],
        "plan s": estimate.total,
        "allocated MB": allocated / 1e6,
        "plan MB": memory.allocated / 1e6,
        "resident MB": max(rank["resident"] for rank in ranks) / 1e6,
        "TFLOP/s": first["device"].peak[shape.precision] / 1e12,
        "GB/s": first["device"].bandwidth / 1e9,
    }


def _measuring(config: RunConfig, repeats: int, precision: str, tokens: int) -> Callable[[], Mapping[str, Any]]:
    from pmlm_dist.parallel import groups
    from pmlm_dist.planning.measure import measure_device

    topology = groups.start()
    device: Device = measure_device(precision, topology, model=config.model, tokens=tokens)
    warm_up(config)
    held = Held()
    training = Training(config)

    def measure() -> dict[str, Any]:
        training.step()
        training.step()
        held.reset_peak()
        training.step()
        peak, seconds = held.peak(), []
        for _ in range(repeats):
            topology.barrier()
            start = time.perf_counter()
            training.step()
            seconds.append(time.perf_counter() - start)
        return {"device": device, "seconds": statistics.median(seconds), "resident": peak}

    return measure


def _allocating(config: RunConfig) -> Callable[[], float]:
    """The most bytes that torch has handed out in a step, of what was allocated since before the model was made.

    The least of some steps: gloo's threads may release a copy late, which only adds.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    def count() -> float:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            training = Training(config)
            training.step()
            for _ in range(3):
                with record_function("counted"):
                    training.step()
        events: Any = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        ordered = sorted(events, key=lambda event: event.start_ns())
        counted = [(event.start_ns(), event.end_ns()) for event in ordered if event.name() == "counted"]
        live, times, totals = 0, [], []
        for event in ordered:
            if event.name() == "[memory]":
                live += event.nbytes()
                times.append(event.start_ns())
                totals.append(live)
        return float(min(max(totals[bisect_left(times, start) : bisect_right(times, end)]) for start, end in counted))

    assert not torch.cuda.is_available(), "on a GPU torch counts by itself"
    return count
