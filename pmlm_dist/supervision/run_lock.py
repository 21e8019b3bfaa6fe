"""The lock of a run folder: one attempt at a time, and a fence for the checkpoints of older attempts.

    RUN_DIR/.lock     attempt, host and process of rank 0 of the attempt that runs; touched every few seconds

Every attempt has a name. It takes the lock, removes the temporary files of earlier attempts, then finds the checkpoint
to resume from. A rank that has outlived its job detects before a commit that the lock names another attempt, or fails
at the rename because its temporary folder is gone: it cannot commit a checkpoint before or beside the newer attempt's.
A lock is taken over from a dead owner, and from an earlier attempt of the same SLURM job. Without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pmlm_dist.supervision.exit_codes import ExitCode

LOCK = ".lock"


@dataclass(frozen=True)
class LockTimes:
    """Intervals of the lock protocol, in seconds."""

    touch_s: float = 3.0
    """Interval of the owner's touches."""
    stale_s: float = 20.0
    """Age of the last touch at which an owner on another host counts as dead."""
    settle_s: float = 0.2
    """Wait after a take-over, in which a concurrent take-over becomes visible."""
    poll_s: float = 0.5


DEFAULT_TIMES = LockTimes()


class FolderInUse(RuntimeError):
    """The run folder is locked by another attempt."""

    exit_code = ExitCode.IN_USE


class Superseded(RuntimeError):
    """Another attempt has taken over the run folder."""

    exit_code = ExitCode.SUPERSEDED


@dataclass(frozen=True)
class LockOwner:
    """Rank 0 of an attempt."""

    attempt: str
    host: str
    pid_namespace: str
    """Scope of the process id: boot id of the host and PID namespace (containers have their own)."""
    pid: int
    started: int
    """Start of the process in clock ticks since the boot: process ids are reused."""
    job: str
    restart: int

    @classmethod
    def current(cls, environ: Mapping[str, str]) -> LockOwner:
        """Describe this process."""
        job, restart = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            attempt="-".join(part for part in (job and f"{job}.{restart}", secrets.token_hex(4)) if part),
            host=socket.gethostname(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            started=_start_ticks(os.getpid()) or 0,
            job=job,
            restart=int(restart),
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class RunLock:
    """A lock owned by this process, rank 0 of an attempt."""

    def __init__(self, path: Path, owner: LockOwner, *, times: LockTimes = DEFAULT_TIMES):
        self._path, self._owner = path, owner
        self._released = threading.Event()
        threading.Thread(target=self._touch, args=(times.touch_s,), name="run lock", daemon=True).start()

    @property
    def attempt(self) -> str:
        """Name of the attempt."""
        return self._owner.attempt

    @classmethod
    def acquire(
        cls, run_dir: Path, environ: Mapping[str, str] | None = None, *, times: LockTimes = DEFAULT_TIMES
    ) -> RunLock:
        """Lock `run_dir`. Raises `FolderInUse` when the owner is alive, OSError when the lock cannot be written.

        Takes up to `times.stale_s` seconds when the owner was on another host and is dead.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        path, own = run_dir / LOCK, LockOwner.current(os.environ if environ is None else environ)
        own_file = run_dir / f"{LOCK}-{own.attempt}"
        own_file.write_text(json.dumps(asdict(own)) + "\n", encoding="utf-8")
        try:
            try:
                # A link fails where the name exists, so one of several concurrent attempts succeeds; the rename of
                # `write_atomically` would let the last one win.
                os.link(own_file, path)
            except FileExistsError:
                owner = read_owner(path)
                if owner is not None and _is_alive(owner, own, path, times=times):
                    raise FolderInUse(
                        f"{run_dir} is in use by {owner}: wait for its end, end it, or choose another folder"
                    ) from None
                os.replace(own_file, path)
                time.sleep(times.settle_s)
        finally:
            own_file.unlink(missing_ok=True)
        lock = cls(path, own, times=times)
        try:
            lock.check()
        except Superseded as error:
            lock._released.set()
            raise FolderInUse(f"{run_dir}: {error}") from None
        return lock

    def check(self) -> None:
        """Raise `Superseded` unless this process owns the lock."""
        owner = read_owner(self._path)
        if owner is None or owner.attempt != self.attempt:
            raise Superseded(
                f"{owner or 'another attempt'} has taken over {self._path.parent} from {self._owner}: this attempt "
                "commits no more checkpoints there"
            )

    def release(self) -> None:
        """Remove the lock if this process still owns it, and the run folder if it is empty then."""
        self._released.set()
        with contextlib.suppress(Superseded):
            self.check()
            self._path.unlink()
        with contextlib.suppress(OSError):
            self._path.parent.rmdir()

    def _touch(self, interval_s: float) -> None:
        while not self._released.wait(interval_s):
            with contextlib.suppress(Superseded, OSError):
                self.check()
                os.utime(self._path)


def read_owner(path: Path) -> LockOwner | None:
    """Return the owner of the lock at `path`; None without a lock, or for an unreadable one."""
    try:
        return LockOwner(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _is_alive(owner: LockOwner, own: LockOwner, path: Path, *, times: LockTimes) -> bool:
    if owner.job and owner.job == own.job and owner.restart < own.restart:
        return False  # SLURM has released its nodes; ranks left there must not write
    if owner.pid_namespace == own.pid_namespace:
        return owner.pid != own.pid and _start_ticks(owner.pid) == owner.started
    return _is_touched(path, times=times)


def _is_touched(path: Path, *, times: LockTimes) -> bool:
    """Wait for a touch by an owner on another host, until the last one is `stale_s` old.

    By the clock of the file system: the clocks of two hosts may differ.
    """
    try:
        first = path.stat().st_mtime
        while _file_system_time(path.parent) - first < times.stale_s:
            time.sleep(times.poll_s)
            if path.stat().st_mtime != first:
                return True
    except FileNotFoundError:  # released meanwhile
        pass
    return False


def _file_system_time(folder: Path) -> float:
    probe = folder / f"{LOCK}-clock-{secrets.token_hex(4)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _pid_namespace() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_ticks(pid: int) -> int | None:
    """Return the start of process `pid` in clock ticks since the boot; None without one, and for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
