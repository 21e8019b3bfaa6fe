"""Lock of what a command writes: one attempt at a time, and a fence for the commits of older attempts.

    FOLDER/.lock    FILE.lock    attempt, host and process of the attempt that runs; touched every few seconds

Every attempt has a name. It takes the lock, removes the temporary files of earlier attempts, then resumes their work. A
rank that has outlived its job detects before a commit that the lock names another attempt. In a run it can also fail at
the rename, because its temporary folder is gone: it cannot commit a checkpoint before or beside the newer attempt's.
A lock is taken over from a dead owner, and from an earlier attempt of the same SLURM job. Standard library only; no
hard links and no `flock`, which some file systems lack.
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

from pmlm_dist.config import ConfigError
from pmlm_dist.files import write_atomically

LOCK = ".lock"


@dataclass(frozen=True)
class LockTimes:
    """Intervals of the lock protocol, in seconds."""

    touch_s: float = 3.0
    """Interval of the owner's touches."""
    stale_s: float = 20.0
    """Age of the last touch at which an owner on another host counts as dead."""
    settle_s: float = 0.2
    """Wait after a take-over, in which a concurrent one becomes visible."""
    poll_s: float = 0.5


class FolderInUse(RuntimeError):
    """The folder is locked by another attempt."""

    exit_code = 83  # ExitCode.IN_USE


class Superseded(RuntimeError):
    """Another attempt has taken over the folder."""

    exit_code = 84  # ExitCode.SUPERSEDED


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


class FolderLock:
    """A lock owned by this process, rank 0 of an attempt. As a context manager it is released at the end."""

    def __init__(self, path: Path, owner: LockOwner, *, times: LockTimes, new_folder: bool):
        self._path, self._owner, self._new_folder = path, owner, new_folder
        self._released = threading.Event()
        threading.Thread(target=self._touch, args=(times.touch_s,), name="folder lock", daemon=True).start()

    @property
    def attempt(self) -> str:
        return self._owner.attempt

    @classmethod
    def acquire(
        cls,
        output: Path,
        environ: Mapping[str, str] = os.environ,
        *,
        beside: bool = False,
        times: LockTimes = LockTimes(),
    ) -> FolderLock:
        """Lock the folder `output`; with `beside` a file or folder that appears at the end, by a lock beside it.

        Raises `FolderInUse` when the owner is alive, ConfigError if the path is no folder, OSError if the lock cannot
        be written. Takes up to `times.stale_s` seconds when the owner was on another host and is dead.
        """
        path = output.with_name(f"{output.name}{LOCK}") if beside else output / LOCK
        new_folder = not path.parent.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError([f"{path.parent} is no folder, or not within one: give another, or move it"]) from error
        own = LockOwner.current(environ)
        while not _write_lock(path, own, replace=False):
            if _take_over(path, own, output=output, times=times):
                time.sleep(times.settle_s)
                break
        lock = cls(path, own, times=times, new_folder=new_folder)
        try:
            lock.check()
        except Superseded as error:
            lock._released.set()
            raise FolderInUse(f"{output}: {error}") from None
        return lock

    def check(self) -> None:
        """Raise `Superseded` unless this process owns the lock."""
        owner = read_owner(self._path)
        if owner is None or owner.attempt != self.attempt:
            raise Superseded(
                f"{owner or 'another attempt'} has taken over {self._path.parent} from {self._owner}: this attempt "
                "commits nothing more there"
            )

    def release(self) -> None:
        """Remove the lock if this process still owns it, and the folder if it was created for the lock and is empty."""
        self._released.set()
        with contextlib.suppress(Superseded, OSError):
            self.check()
            self._path.unlink()
        if self._new_folder:
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _touch(self, interval_s: float) -> None:
        while not self._released.wait(interval_s):
            with contextlib.suppress(Superseded, OSError):
                self.check()
                os.utime(self._path)


def _write_lock(path: Path, owner: LockOwner, *, replace: bool) -> bool:
    """Write the lock; return False if there is one and it may not be replaced."""
    try:
        write_atomically(path, json.dumps(asdict(owner)) + "\n", durable=False, replace=replace)
    except FileExistsError:
        return False
    return True


def _take_over(path: Path, own: LockOwner, *, output: Path, times: LockTimes) -> bool:
    """Replace the lock of a dead owner; return False if it has changed meanwhile. Raises `FolderInUse`."""
    owner = read_owner(path)
    if owner is None and _is_foreign(path):
        raise FolderInUse(f"{path} is no lock of this program: move it, or choose another folder than {output}")
    if _is_alive(owner, own, path, times=times):
        raise FolderInUse(
            f"{output} is in use by {owner or 'another process'}: wait for its end, end it, or choose another folder"
        )
    # One process at a time: two that have found the same dead owner must not both replace it. The mark of a process
    # that was killed in here is removed after `stale_s`.
    mark = path.with_name(f"{path.name}-takeover")
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        if not _is_touched(mark, times=times):
            mark.unlink(missing_ok=True)
        return False
    try:
        return path.exists() and read_owner(path) == owner and _write_lock(path, own, replace=True)
    finally:
        mark.unlink(missing_ok=True)


def read_owner(path: Path) -> LockOwner | None:
    """Return the owner of the lock at `path`; None without a lock, or for an unreadable one."""
    try:
        return LockOwner(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, IsADirectoryError, ValueError, TypeError, RecursionError):
        return None


def _is_foreign(path: Path) -> bool:
    """Return True for a file that no process is just writing as a lock: such a file is empty."""
    try:
        return (path.is_dir() or path.stat().st_size > 0) and read_owner(path) is None
    except FileNotFoundError:
        return False


def _is_alive(owner: LockOwner | None, own: LockOwner, path: Path, *, times: LockTimes) -> bool:
    if owner is None:
        return _is_touched(path, times=times)  # being written, unless it is unreadable
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
