"""File operations, collectives and bytes of rank 0 as functions of the number of ranks, in simulated worlds.

    training    the real loop on torch's fake process group: collectives of a step, and those that the host waits for
    saving      the real save thread of rank 0, while those of all other ranks write beside it
    resuming    verification and loading of ranks of the same world, from the checkpoint that it has saved
    watching    the supervisors of one node, each looking for the failure of another rank

Nothing is timed. A world of a thousand ranks is one process: its fake collectives return at once, and the other ranks
are run one after another where their files are needed. Every count is that of the functions that a run calls.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import Report
from ranks import World

from scale import resuming, saving, training, watching


@dataclass(frozen=True)
class ScaleOptions:
    """Sizes of the simulated worlds."""

    ranks: tuple[int, ...] = (16, 128, 1024)
    """Data-parallel ranks; the figures are those of the last."""
    ranks_per_node: int = 8
    """Ranks, and so supervisors, of a node."""
    folder: Path | None = None
    """Folder for the checkpoints. None: the system's folder for temporary files."""

    def quick(self) -> ScaleOptions:
        """A smoke run."""
        return dataclasses.replace(self, ranks=(8, 64))


def run(options: ScaleOptions) -> Report:
    """Count in a fresh process for each world."""
    rows: dict[str, dict[str, float]] = {}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            prepared = World(_prepare, ranks, options.ranks_per_node, Path(folder), ranks=1, timeout_s=600)
            with prepared as world:
                rows |= {f"{ranks}: {name}": row for name, row in world.call()[0].items()}
    largest = options.ranks[-1]
    figures = {
        "agreements_exposed_per_step": rows[f"{largest}: a step"]["waited for"],
        f"stats_per_second_at_{largest}": _stats_per_second(rows[f"{largest}: save, ZeRO 1"]),
        "opens_per_rank_at_resume": max(row["opens"] for name, row in rows.items() if f"{largest}: resume" in name),
        "sockets_per_rank": rows[f"{largest}: groups on GPUs"]["sockets"],
        "failure_opens_per_second": rows[f"{largest}: watch, a second"]["opens"],
    }
    return Report("scale", {"ranks": list(options.ranks), "ranks_per_node": options.ranks_per_node}, rows, figures)


def _stats_per_second(save: dict[str, float]) -> float:
    return (save["stats"] + save["lists"]) / save["seconds"]


def _prepare(ranks: int, ranks_per_node: int, folder: Path) -> Callable[[], dict[str, dict[str, float]]]:
    def measure() -> dict[str, dict[str, float]]:
        rows = training.count(ranks, folder / "training")
        for stage in (0, 1, 3):
            checkpoints = folder / f"zero{stage}"
            rows[f"save, ZeRO {stage}"] = saving.count(ranks, stage, checkpoints)
            rows[f"resume, ZeRO {stage}"] = resuming.count(ranks, stage, checkpoints)
        half = resuming.count_loading(ranks // 2, 1, folder / "zero1")
        rows |= {"resume, half the ranks": half, "load ZeRO 1 at 3": resuming.count_loading(ranks, 3, folder / "zero1")}
        rows["watch, a second"] = watching.count(ranks // ranks_per_node, ranks_per_node, folder / "logs/attempt")
        return rows

    return measure
