"""An attempt: one start of a run. It owns what the run holds outside the model, on every rank.

    open_attempt   process groups -> run lock (rank 0 for all) -> heartbeat registered -> Attempt
                   topology, stop agreement, heartbeat, lease   ...   the lock is released at the end

A lock names its attempt; an attempt whose lock was taken over can no longer commit a checkpoint (`check_lease`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.resume import find_checkpoint
from pmlm_dist.config import WatchdogConfig, raise_if_any
from pmlm_dist.metrics.run_log import CONFIGURATION, METRICS
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.parallel.lease import lease
from pmlm_dist.supervision.attempts import ATTEMPTS, AttemptLog
from pmlm_dist.supervision.heartbeat import Heartbeat, phase_limits
from pmlm_dist.supervision.signals import STOP_FILE, StopSignals
from pmlm_dist.training.stopping import StopAgreement


@dataclass(frozen=True)
class Attempt:
    """One start of a run, as every rank holds it."""

    name: str
    """The same on all ranks; SLURM's job and restart count are part of it."""
    topology: Topology
    heartbeat: Heartbeat
    """Read by this rank's supervisor."""
    stop: StopAgreement
    record: AttemptLog
    """Its lines in `attempts.jsonl`."""
    check_lease: Callable[[], None]
    """Raises `Superseded` if another attempt has taken over the run; called by rank 0 before each commit."""

    def open_checkpoints(
        self, output: Path, *, keep: int, is_kept: Callable[[int], bool]
    ) -> tuple[CheckpointFolder, Path | None]:
        """Open the checkpoint folder of `output`: its retention, and the newest valid checkpoint; every rank calls.

        Removes what earlier attempts were still writing. Raises `ConfigError` if no checkpoint of several is valid.
        """
        folder = CheckpointFolder(output / "checkpoints", keep=keep, fence=self.check_lease, keeps=is_kept)
        if self.topology.is_rank_zero:
            folder.remove_temporary()
        return folder, find_checkpoint(folder, self.topology, self.heartbeat.beat)


@contextmanager
def open_attempt(
    run_dir: Path,
    *,
    tp: int,
    collective_timeout_s: int,
    grace_s: float,
    watchdog: WatchdogConfig,
    checkpoint_every: int | None = None,
    signals: StopSignals | None = None,
    heartbeat: Heartbeat | None = None,
) -> Iterator[Attempt]:
    """Join the world, acquire the run's lock and register with the supervisor; every rank calls.

    `checkpoint_every`: steps between checkpoints, for the record of attempts; None: no record is written. Raises
    `FolderInUse` on every rank if another attempt is active, `ConfigError` if `run_dir` cannot be written or `tp` does
    not divide the world.
    """
    signals, heartbeat = signals or StopSignals(), heartbeat or Heartbeat()
    signals.grace_s = grace_s
    heartbeat.set_limits(phase_limits(watchdog, warm=False))
    topology = groups.init_process_groups(tp=tp, timeout_s=collective_timeout_s)
    with lease(run_dir, topology) as (name, check_lease):
        foreign = topology.broadcast_object(_foreign_files(run_dir) if checkpoint_every is not None else [])
        raise_if_any(
            [f"{run_dir} holds {file}, which no run has written: name another folder, or move it" for file in foreign]
        )
        heartbeat.register(
            rank=topology.rank, world_size=topology.world_size, run_dir=str(run_dir.absolute()), attempt=name
        )
        stop = StopAgreement(signals, file=run_dir / STOP_FILE, topology=topology, heartbeat=heartbeat)
        record = AttemptLog(
            run_dir,
            attempt=name,
            world_size=topology.world_size,
            every=checkpoint_every or 0,
            enabled=topology.is_rank_zero and checkpoint_every is not None,
        )
        signals.on_first = record.stopping
        yield Attempt(name, topology, heartbeat, stop, record, check_lease)


def _foreign_files(run_dir: Path) -> list[str]:
    """Return what a run would overwrite in a folder in which none has started: another program's configuration."""
    if any((run_dir / name).exists() for name in (ATTEMPTS, "checkpoints")):
        return []
    return [name for name in (CONFIGURATION, METRICS) if (run_dir / name).exists()]
