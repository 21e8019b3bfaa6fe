"""The files of RUN_DIR/logs/ATTEMPT: the failure that ended an attempt, and the state of every rank at that time.

failure.json      the first failure (`Failure`); created once, by the supervisor of the rank that failed first; the
                  others look for it, one of each node at a time (`FailureWatch`)
rank-00001.txt    one for each rank: a line of JSON (`RankReport`), its error, the stacks of its threads
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
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


class FailureWatch:
    """Looks for the failure of an attempt, at most once in `interval_s` seconds for all ranks of a node.

        mark older than the interval?  yes: touch it, read failure.json in `folder`, copy it beside the mark
                                       no:  another rank of this node has just looked; read its copy

    Mark and copy are in the node's folder for temporary files, so that a thousand ranks do not poll a shared file
    system. Ranks without such a folder in common, in containers of their own for example, look themselves.
    """

    def __init__(self, folder: Path, *, interval_s: float):
        self._folder, self._interval_s = folder, interval_s
        name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        self._node = Path(tempfile.gettempdir()) / f"pmlm-{os.getuid()}-{name}"

    def read(self) -> Failure | None:
        """Return the failure if one is known; call it as often as local files may be read."""
        has_node = self._has_node_folder()
        if has_node and (failure := read_failure(self._node)):
            return failure
        if has_node and not self._is_due():
            return None
        failure = read_failure(self._folder)
        if failure and has_node:
            with contextlib.suppress(OSError):
                write_atomically(self._node / _FAILURE, json.dumps(asdict(failure)) + "\n", durable=False)
        return failure

    def close(self) -> None:
        """Remove mark and copy; ranks of this node that still need them create them again."""
        shutil.rmtree(self._node, ignore_errors=True)

    def _has_node_folder(self) -> bool:
        try:
            self._node.mkdir(mode=0o700, exist_ok=True)
            return self._node.lstat().st_uid == os.getuid()  # another user must not be able to end this run
        except OSError:
            return False

    def _is_due(self) -> bool:
        mark = self._node / "looked"
        with contextlib.suppress(OSError):
            if 0 <= time.time() - mark.stat().st_mtime < self._interval_s:
                return False
        with contextlib.suppress(OSError):
            mark.touch()
        return True


def write_report(folder: Path, report: RankReport, *, details: str) -> None:
    """Write the report of a rank atomically. Raises OSError when it cannot be written."""
    text = f"{json.dumps(asdict(report))}\n\n{details}"
    write_atomically(folder / f"rank-{report.rank:05d}.txt", text, durable=False)


def count_reports(folder: Path) -> int:
    """Return the number of reports in `folder`, by one listing."""
    return len(list(folder.glob("rank-*.txt")))


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
