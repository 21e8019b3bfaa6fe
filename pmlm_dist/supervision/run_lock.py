"""One start of a run at a time: who is at work in a run's folder, and that nobody else commits a checkpoint there.

    RUN_DIR/.lock     life, place and process of rank 0 of the start that is at work; touched every few seconds

Every start has a name, its life. It takes the lock, then removes what earlier lives were writing, then looks for the
checkpoint to go on from. An old rank that has outlived its job finds another life in the lock when it wants to commit,
or its half-written folder gone when it renames it: it can never put a checkpoint before or beside the new life's.
A lock is taken over when its holder is dead, or is an earlier life of the same SLURM job. Without torch.
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
_TOUCH_S = 3.0
_STALE_S = 20.0
_SETTLE_S = 0.2
_POLL_S = 0.5


class FolderInUse(RuntimeError):
    """Another start of the run is at work in its folder."""

    exit_code = ExitCode.IN_USE


class Superseded(RuntimeError):
    """Another start of the run has taken over its folder."""

    exit_code = ExitCode.SUPERSEDED


@dataclass(frozen=True)
class LockOwner:
    """Rank 0 of a start."""

    attempt: str
    host: str
    pid_namespace: str
    """Of the process' id: this boot of the host, and the name space of ids (containers have their own)."""
    pid: int
    started: int
    """Of the process, in clock ticks since the boot: an id can be given again."""
    job: str
    restart: int

    @classmethod
    def current(cls, environ: Mapping[str, str]) -> LockOwner:
        """This process."""
        job, restart = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            attempt="-".join(part for part in (job and f"{job}.{restart}", secrets.token_hex(4)) if part),
            host=socket.gethostname(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            started=_start_time(os.getpid()) or 0,
            job=job,
            restart=int(restart),
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class RunLock:
    """A lock that this process holds; for one process of a run."""

    def __init__(self, path: Path, owner: LockOwner):
        self._path, self._owner = path, owner
        self._released = threading.Event()
        threading.Thread(target=self._touch, name="run lock", daemon=True).start()

    @property
    def attempt(self) -> str:
        """Name of this start of the run."""
        return self._owner.attempt

    @classmethod
    def acquire(cls, run_dir: Path, environ: Mapping[str, str] | None = None) -> RunLock:
        """Take the lock of `run_dir`. Raises `FolderInUse` when its holder is alive, OSError when none can be written.

        Takes up to `_STALE_S` seconds when the holder was on another host and is dead.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        path, own = run_dir / LOCK, LockOwner.current(os.environ if environ is None else environ)
        own_file = run_dir / f"{LOCK}-{own.attempt}"
        own_file.write_text(json.dumps(asdict(own)) + "\n", encoding="utf-8")
        try:
            try:
                os.link(own_file, path)  # one of several that come at once succeeds
            except FileExistsError:
                before = read_owner(path)
                if before is not None and _is_alive(before, own, path):
                    raise FolderInUse(
                        f"{run_dir} is in use by {before}: wait for its end, end it, or choose another folder"
                    ) from None
                os.replace(own_file, path)
                time.sleep(_SETTLE_S)
        finally:
            own_file.unlink(missing_ok=True)
        lock = cls(path, own)
        try:
            lock.check()
        except Superseded as error:
            lock._released.set()
            raise FolderInUse(f"{run_dir}: {error}") from None
        return lock

    def check(self) -> None:
        """Raise `Superseded` unless this process still holds the lock."""
        owner = read_owner(self._path)
        if owner is None or owner.attempt != self.attempt:
            raise Superseded(
                f"{owner or 'another start'} has taken over {self._path.parent} from {self._owner}: this one writes "
                "no checkpoint there any more"
            )

    def release(self) -> None:
        """Give the lock back, if it is still this process'; a folder that holds nothing else is removed."""
        self._released.set()
        with contextlib.suppress(Superseded):
            self.check()
            self._path.unlink()
        with contextlib.suppress(OSError):
            self._path.parent.rmdir()

    def _touch(self) -> None:
        while not self._released.wait(_TOUCH_S):
            with contextlib.suppress(Superseded, OSError):
                self.check()
                os.utime(self._path)


def read_owner(path: Path) -> LockOwner | None:
    """Who holds the lock at `path`; None when there is none, or nothing that makes sense."""
    try:
        return LockOwner(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _is_alive(owner: LockOwner, own: LockOwner, path: Path) -> bool:
    if owner.job and owner.job == own.job and owner.restart < own.restart:
        return False  # SLURM has given its nodes back; ranks that are left over may not write
    if owner.pid_namespace == own.pid_namespace:
        return owner.pid != own.pid and _start_time(owner.pid) == owner.started
    return _renews_its_lock(path)


def _renews_its_lock(path: Path) -> bool:
    """Whether the holder, on another host, shows itself before its last sign is `_STALE_S` old by the disk's clock."""
    try:
        first = path.stat().st_mtime
        while _clock_of(path.parent) - first < _STALE_S:
            time.sleep(_POLL_S)
            if path.stat().st_mtime != first:
                return True
    except FileNotFoundError:  # released meanwhile
        pass
    return False


def _clock_of(folder: Path) -> float:
    probe = folder / f"{LOCK}-clock-{secrets.token_hex(4)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _pid_namespace() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_time(pid: int) -> int | None:
    """When process `pid` was started, in clock ticks since the boot; None when it is gone, also as a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
