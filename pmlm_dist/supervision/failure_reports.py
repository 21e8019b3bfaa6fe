"""What ended a start of a run, and where its ranks were then: the files of RUN_DIR/logs/ATTEMPT.

failure.json        whoever writes it first names what ended this start of the run
rank-00001.txt    of every rank: a line of JSON (`Report`), its error, the stacks of its threads
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

LOGS = "logs"
_FAILURE = "failure.json"
_SHOWN = 8


@dataclass(frozen=True)
class Failure:
    """What ended a start of the run."""

    rank: int
    code: int
    what: str
    step: int
    phase: str

    def __str__(self) -> str:
        return f"rank {self.rank} {self.what}, in step {self.step} ({self.phase})"


@dataclass(frozen=True)
class RankReport:
    """Where a rank was when its start of the run ended."""

    rank: int
    step: int
    phase: str
    last_beat: float
    """Time of its last sign of life, by the host's clock."""
    process: str
    """State of its process, as the kernel has it."""

    def __str__(self) -> str:
        silent_s = max(0.0, time.time() - self.last_beat)
        return f"rank {self.rank}: step {self.step}, {self.phase} for {silent_s:.0f} s, process {self.process}"


def write_failure(folder: Path, cause: Failure) -> Failure:
    """Make `cause` the one of this life, unless another rank's is there already; the one that counts.

    Raises OSError when nothing can be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f".cause-{os.getpid()}-{cause.rank}"
    own.write_text(json.dumps(asdict(cause)) + "\n", encoding="utf-8")
    with contextlib.suppress(FileExistsError):
        os.link(own, folder / _FAILURE)
    own.unlink()
    return read_failure(folder) or cause


def read_failure(folder: Path) -> Failure | None:
    """What ended the life whose folder of logs this is, once that is known."""
    try:
        return Failure(**json.loads((folder / _FAILURE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_report(folder: Path, report: RankReport, *, details: str) -> None:
    """Leave the report of a rank, whole or not at all. Raises OSError when nothing can be written."""
    whole, part = folder / f"rank-{report.rank:05d}.txt", folder / f".rank-{report.rank:05d}"
    part.write_text(f"{json.dumps(asdict(report))}\n\n{details}", encoding="utf-8")
    part.rename(whole)


def read_reports(folder: Path) -> list[RankReport]:
    """The reports that ranks have left, by rank."""
    paths = sorted(folder.glob("rank-*.txt"))
    return [RankReport(**json.loads(path.read_text(encoding="utf-8").partition("\n")[0])) for path in paths]


def summary(reports: list[RankReport], *, world_size: int) -> list[str]:
    """Who is missing or furthest behind, and where the ranks were: all of a small world, else the last ones."""
    missing = sorted(set(range(world_size)) - {report.rank for report in reports})
    behind = sorted(reports, key=lambda report: (not _is_stopped(report), report.step, report.last_beat))
    lines = [f"without a report: ranks {', '.join(map(str, missing))}"] if missing else []
    if behind:
        lines.append(f"furthest behind: rank {behind[0].rank}")
    return lines + [str(report) for report in behind[:_SHOWN]]


def _is_stopped(report: RankReport) -> bool:
    return "stop" in report.process
