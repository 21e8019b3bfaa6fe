"""Checkpoint interval that loses the least time to failures, and the fraction of time left for training.

With delta seconds for a checkpoint and M seconds between failures of the whole job, the best interval is
tau = sqrt(2 delta M) (Young, 1974; Daly, 2006, first order). A fraction delta / tau of the time is lost to saving.
Every M seconds a failure costs half an interval of repeated steps and a restart.
"""

from dataclasses import dataclass

from pmlm_dist.checkpoint.fragments import MAX_WRITERS
from pmlm_dist.supervision.attempts import best_interval

BYTES_OF_PARAMETER = 12
"""fp32 weight and both moments; each is saved by one rank only (checkpoint/files.py)."""


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a run; seconds and bytes."""

    bytes: float
    """Of one checkpoint, over all ranks."""
    writers: int
    """Ranks that write a part of it."""
    seconds: float
    """To write one checkpoint, every writer its part. An upper bound of the lost time: training continues meanwhile."""
    between_failures: float
    """Mean time between failures of the whole job."""
    restart: float
    """From a failure to the first step after it."""
    interval: float
    """Best interval between two checkpoints."""

    def lost(self, interval: float) -> float:
        """Fraction of the time lost to saving and failures with a checkpoint every `interval` seconds; at most 1."""
        return min(1.0, self.seconds / interval + (interval / 2 + self.restart) / self.between_failures)

    @property
    def effective(self) -> float:
        """Fraction of the time left for training with the best interval."""
        return 1.0 - self.lost(self.interval)


def writers(*, zero_stage: int, tp: int, dp: int) -> int:
    """Number of ranks that write a checkpoint: every rank its partition, at stage 0 a few of the replicas."""
    return tp * (min(dp, MAX_WRITERS) if zero_stage == 0 else dp)


def checkpoints(
    parameters: int, *, gpus: int, writers: int, gpu_hours: float, bytes_per_s: float, restart_s: float, step_s: float
) -> Checkpoints:
    """Checkpoints of a run of `parameters` on `gpus` devices. The interval is at least one step.

    `gpu_hours`: mean hours between failures of one device. `bytes_per_s`: write rate of one rank.
    """
    size = float(BYTES_OF_PARAMETER * parameters)
    delta, between = size / writers / bytes_per_s, 3600 * gpu_hours / gpus
    return Checkpoints(size, writers, delta, between, restart_s, interval=max(step_s, best_interval(delta, between)))
