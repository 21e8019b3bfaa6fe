"""Shared by all benchmarks: interleaved timing, memory of a fresh process, the report as table and JSON."""

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "deepspeed", "megatron-core", "transformers", "webdataset", "numpy", "numba")


@dataclass(frozen=True)
class Report:
    """Results of a benchmark: `rows` of measured values by name; `figures`, the ratios that are compared with goals."""

    benchmark: str
    shapes: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, float]]
    figures: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """JSON values: benchmark, machine, versions, shapes, rows, figures."""
        return {
            "benchmark": self.benchmark,
            "machine": machine(),
            "versions": {name: metadata.version(name) for name in _LIBRARIES},
            "shapes": dict(self.shapes),
            "rows": {name: dict(row) for name, row in self.rows.items()},
            "figures": dict(self.figures),
        }

    def show(self) -> None:
        """Print the report as tables."""
        from rich.console import Console
        from rich.table import Table

        console, plain = Console(width=140), self.as_dict()
        console.print(f"[bold]{self.benchmark}[/]  {plain['machine']}")
        console.print(f"shapes {plain['shapes']}\nversions {plain['versions']}")
        columns = list(dict.fromkeys(column for row in self.rows.values() for column in row))
        table = Table("row", *columns)
        for name, row in self.rows.items():
            table.add_row(name, *(f"{row[column]:.4g}" if column in row else "" for column in columns))
        console.print(table)
        width = max(map(len, self.figures))
        for name, figure in self.figures.items():
            console.print(f"{name:>{width}}  {figure:.3f}")

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")


def machine() -> str:
    """Processor, available cores, accelerator."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {len(os.sched_getaffinity(0))} cores{accelerator}"


def interleaved(steps: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each step in `repeats` interleaved rounds A B C A B C ..., after `warm_up` rounds.

    Drift (clock rates, other processes) then affects all steps alike. Take ratios round by round (`ratio`).
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(warm_up + repeats):
        for name, step in steps.items():
            gc.collect()
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if round_number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def device() -> Any:
    """The `torch.device` of this rank, or of the first one. Starts no process group: ranks may be forked later."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def synchronize() -> None:
    """Wait for the accelerator; do nothing on a CPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: Mapping[str, list[float]], first: str, second: str) -> float:
    """Median over the rounds of the time of `first` over that of `second`."""
    return statistics.median(a / b for a, b in zip(seconds[first], seconds[second], strict=True))


def memory_of(prepare: Callable[..., Callable[[], object]], *args: Any) -> float:
    """Peak bytes of a step beyond those before it, in a fresh process (Linux).

    `prepare(*args)` returns the step. It runs twice; the second run is measured, when optimizer states exist.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(sender, prepare, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _measure_memory(sender: Any, prepare: Callable[..., Callable[[], object]], args: tuple[Any, ...]) -> None:
    step = prepare(*args)
    step()
    gc.collect()
    memory = MemoryMeter()
    step()
    sender.send(memory.peak())
    sender.close()
    os._exit(0)


class MemoryMeter:
    """Bytes of this process beyond those at construction.

    With a GPU torch's allocated bytes there, otherwise resident memory (Linux).
    """

    def __init__(self):
        self._before = 0.0
        self._before = self.now()
        self.reset_peak()

    def now(self) -> float:
        """Bytes in use; freed memory is released to the system first."""
        import torch

        if torch.cuda.is_available():
            return torch.cuda.memory_allocated() - self._before
        ctypes.CDLL(None).malloc_trim(0)
        return _status("VmRSS") - self._before

    def reset_peak(self) -> None:
        """Restart the peak; freed memory is released to the system first."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        """Peak bytes since `reset_peak`."""
        import torch

        highest = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")
        return highest - self._before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class Product:
    """A dense product [m, k] x [k, n] into a preallocated buffer."""

    def __init__(self, m: int, k: int, n: int, *, dtype: Any, device: Any):
        import torch

        self._a = torch.randn(m, k, device=device, dtype=dtype)
        self._b = torch.randn(k, n, device=device, dtype=dtype)
        self._out = torch.empty(m, n, device=device, dtype=dtype)
        self.flops = 2.0 * m * k * n

    def __call__(self) -> None:
        """Compute the product once."""
        import torch

        torch.mm(self._a, self._b, out=self._out)

    def rate(self, seconds: float) -> float:
        """FLOP/s, measured for `seconds`."""
        self()
        synchronize()
        start, count = time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            for _ in range(4):
                self()
            synchronize()
            count += 4
        return count * self.flops / (time.perf_counter() - start)


def best_product(dtype: Any, device: Any, *, seconds: float = 2.0) -> Product:
    """The product with the highest rate on this device, among typical shapes of a Transformer."""
    shapes = [(2048, 512, 2048), (2048, 2048, 512), (1024, 1024, 4096), (4096, 1024, 1024)]
    if device.type == "cuda":  # the shapes above are too small: launch overhead would dominate
        shapes += [(8192, 8192, 8192), (16384, 4096, 4096)]
    products = [Product(*shape, dtype=dtype, device=device) for shape in shapes]
    return max(products, key=lambda product: product.rate(seconds / len(shapes)))


def pretrain_step(job: Any, engine: Any, batches: Any, state: Any, stopwatch: Any) -> Any:
    """Make the step of the pre-training `job` after `state`, with the next of `batches`; returns the new state."""
    from pmlm_dist.training.step import train_step

    micro_batches = [next(batches) for _ in range(job.engine_config.accumulation(job.topology.dp))]
    train_step(job, engine, micro_batches, state, stopwatch)
    return job.advance(state)
