"""How often to save against failures, and what share of the time then goes into training.

With delta seconds for a checkpoint and M seconds between failures of the whole job, saving every tau = sqrt(2 delta M)
loses least (Young, 1974; Daly, 2006, first order). Of the time, delta / tau goes into saving, and every M seconds half
an interval is done again and a restart waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

from pmlm_dist.supervision.attempts import best_interval

BYTES_OF_PARAMETER = 12
"""fp32 weight and both moments, each once over all ranks (checkpoint/files.py)."""


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a run; seconds and bytes."""

    bytes: float
    """Of one checkpoint, over all ranks."""
    seconds: float
    """To write it, every rank its part: an upper bound of what the training is held up, since it saves beside it."""
    between_failures: float
    """Mean, of all devices together."""
    restart: float
    """From a failure to the first new step."""
    interval: float
    """Between two checkpoints, so that least is lost."""

    def lost(self, interval: float) -> float:
        """Share of the time that does not go into training, saving every `interval` seconds."""
        return min(1.0, self.seconds / interval + (interval / 2 + self.restart) / self.between_failures)

    @property
    def effective(self) -> float:
        """Share of the time that goes into training, with the best interval."""
        return 1.0 - self.lost(self.interval)


def checkpoints(
    parameters: int, *, gpus: int, gpu_hours: float, bytes_per_s: float, restart_s: float, step_s: float
) -> Checkpoints:
    """Checkpoints of a run of `parameters` on `gpus` devices; each fails every `gpu_hours` and writes `bytes_per_s`.

    The interval is at least one step.
    """
    size = float(BYTES_OF_PARAMETER * parameters)
    delta, between = size / gpus / bytes_per_s, 3600 * gpu_hours / gpus
    return Checkpoints(size, delta, between, restart_s, interval=max(step_s, best_interval(delta, between)))
