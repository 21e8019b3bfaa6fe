"""The files of RUN_DIR/logs/ATTEMPT: the failure that ended an attempt, and the state of every rank at that time.

failure.json      the first failure (`Failure`); created once, by the supervisor of the rank that failed first
rank-00001.txt    one for each rank: a line of JSON (`RankReport`), its error, the stacks of its threads
"""

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pmlm_dist.files import write_atomically

LOGS = "logs"
_FAILURE = "failure.json"
_MAX_LINES = 8


@dataclass(frozen=True)
class Failure:
    """The failure that ended an attempt."""

    rank: int
    code: int
    reason: str
    """A verb phrase whose subject is the rank: "failed: ..."."""
    step: int
    phase: str

    def __str__(self) -> str:
        return f"rank {self.rank} {self.reason}, in step {self.step} ({self.phase})"


@dataclass(frozen=True)
class RankReport:
    """State of a rank when its attempt ended."""

    rank: int
    step: int
    phase: str
    last_beat: float
    """Time of its last heartbeat, by the host's clock."""
    process: str
    """State of its process, as reported by the kernel."""

    def __str__(self) -> str:
        silent_s = max(0.0, time.time() - self.last_beat)
        return f"rank {self.rank}: step {self.step}, {self.phase} for {silent_s:.0f} s, process {self.process}"


def write_failure(folder: Path, failure: Failure) -> Failure:
    """Record `failure` unless another rank's is recorded already; return the recorded one.

    Raises OSError when the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # the first failure is kept
        write_atomically(folder / _FAILURE, json.dumps(asdict(failure)) + "\n", durable=False, replace=False)
    return read_failure(folder) or failure


def read_failure(folder: Path) -> Failure | None:
    """Return the failure recorded in an attempt's log folder; None before there is one."""
    try:
        return Failure(**json.loads((folder / _FAILURE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_report(folder: Path, report: RankReport, *, details: str) -> None:
    """Write the report of a rank atomically. Raises OSError when it cannot be written."""
    text = f"{json.dumps(asdict(report))}\n\n{details}"
    write_atomically(folder / f"rank-{report.rank:05d}.txt", text, durable=False)


def read_reports(folder: Path) -> list[RankReport]:
    """Return the reports in `folder`, sorted by rank."""
    paths = sorted(folder.glob("rank-*.txt"))
    return [RankReport(**json.loads(path.read_text(encoding="utf-8").partition("\n")[0])) for path in paths]


def summary(reports: list[RankReport], *, world_size: int) -> list[str]:
    """Lines for the log: ranks without a report, the rank furthest behind, and the states of the last few ranks."""
    missing = sorted(set(range(world_size)) - {report.rank for report in reports})
    behind = sorted(reports, key=lambda report: ("stop" not in report.process, report.step, report.last_beat))
    lines = [f"without a report: ranks {', '.join(map(str, missing))}"] if missing else []
    if behind:
        lines.append(f"furthest behind: rank {behind[0].rank}")
    return lines + [str(report) for report in behind[:_MAX_LINES]]
