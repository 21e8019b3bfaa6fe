"""Opens of failure.json on the shared file system by the supervisors of a cluster."""

import time
from pathlib import Path

from pmlm_dist.supervision.failure_reports import FailureWatch
from pmlm_dist.supervision.supervisor import SupervisorTimes
from scale.counting import FileOperations

_SECONDS = 4.0


def count(nodes: int, ranks_per_node: int, folder: Path) -> dict[str, float]:
    """Opens in a second of all nodes: those of one node that is watched for some seconds, times the nodes."""
    times, operations = SupervisorTimes(), FileOperations(folder)
    watches = [FailureWatch(folder, interval_s=times.failure_poll_s) for _ in range(ranks_per_node)]
    with operations.counted():
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end:
            for watch in watches:
                assert watch.read() is None
            time.sleep(times.poll_s)
    watches[0].close()
    return {"opens": nodes * operations.row()["opens"] / operations.seconds}
