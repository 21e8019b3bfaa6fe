"""The checkpoints of a run on disk: which count, which is the newest whole one, which go.

    RUN_DIR/checkpoints/
        step-00000400/              a checkpoint (see `checkpoint_files.py`)
        step-00000600.tmp-ATTEMPT/     one that is being written, or was when its run (life) ended; never counts
        latest                      the newest one, for people; loading looks at the folders themselves

A folder gets its name when all ranks have written, every byte is on the disk and each file is accounted for. Whatever
ends the process between two operations, a whole checkpoint is left and nothing broken counts.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pmlm_dist.checkpoint.files import (
    MANIFEST,
    STATE,
    CorruptCheckpoint,
    FileDigest,
    checkpoint_problems,
    fsync_file,
    read_json,
    sha256_of,
    write_json,
    write_manifest,
)
from pmlm_dist.config import ConfigError

IMPORTED = "weights"
"""What `pmlm import` calls the folder of its one checkpoint, which holds weights alone."""
_LATEST = "latest"
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints below `root`, seen from one process.

    The newest `keep` stay, every one whose step is a multiple of `keep_every`, and those of which `keeps` says so.
    `fence` is called right before a checkpoint gets its name; it raises when this process may not commit any more
    (`run_lock.py`).
    """

    root: Path
    keep: int
    keep_every: int | None = None
    fence: Callable[[], None] = lambda: None
    keeps: Callable[[int], bool] = lambda step: False

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies (None if there is none at all), and what is wrong with newer ones.

        Raises `ConfigError` when checkpoints are there but none verifies: starting from nothing would lose them.
        """
        complaints: list[str] = []
        for folder in reversed(self.steps()):
            faults = checkpoint_problems(folder)
            if not faults:
                return folder, [*complaints, *self._pointer_faults()]
            complaints += [f"checkpoint {folder} is not whole: {fault}" for fault in faults]
        if complaints:
            raise ConfigError(
                [*complaints, f"no whole checkpoint is left: restore one, or remove {self.root} to start anew"]
            )
        return None, []

    def steps(self) -> list[Path]:
        """The folders that have a checkpoint's name, oldest step first."""
        found = [path for path in self.root.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
        return sorted(found, key=step_of)

    def folder(self, step: int) -> Path:
        """Where the checkpoint of `step` lies once it is whole."""
        return self.root / f"step-{step:08d}"

    def temporary(self, step: int, *, attempt: str) -> Path:
        """Where the processes that call themselves `life` write the checkpoint of `step`, and no earlier ones."""
        return self.root / f"step-{step:08d}{_TEMPORARY}{attempt}"

    def remove_temporary(self) -> None:
        """Remove what earlier lives left half written or half removed.

        It loses its name first, at once: an old rank that is about to commit it finds nothing, or has committed it.
        """
        for path in self.root.glob(f"step-*{_TEMPORARY}*"):
            doomed = path.with_name(f"{path.name.partition(_TEMPORARY)[0]}{_TEMPORARY}removed-{secrets.token_hex(4)}")
            with contextlib.suppress(OSError):
                path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def commit(self, step: int, temporary: Path, files: Mapping[str, FileDigest]) -> Path:
        """Make what was written into `temporary` the checkpoint of `step`. Raises `Damaged` when it is not complete.

        `files`: what its writers say they wrote, by name, flushed to the disk already.
        """
        write_manifest(temporary, dict(files))
        faults = checkpoint_problems(temporary, thorough=False)
        if faults:
            raise CorruptCheckpoint(f"{temporary} is not complete: {faults[0]}")
        fsync_file(temporary)
        self.fence()
        final = self.folder(step)
        if final.exists():  # of an earlier life, and not whole: else this run would have gone on from it
            self._remove(final)
        temporary.rename(final)
        fsync_file(self.root)
        self._point_to(final)
        return final

    def keep_only(self, step: int) -> None:
        """Remove all checkpoints but that of `step`, which is the latest from then on."""
        self._point_to(self.folder(step))
        for folder in self.steps():
            if step_of(folder) != step:
                self._remove(folder)

    def remove_old(self, newest: Path) -> None:
        """Remove those before the newest `keep` sound ones up to `newest`, but for each `keep_every`-th step.

        Those after `newest`, which this run fell back behind, neither count nor go: the one just written must outlive
        them. Broken ones do not count either.
        """
        before = [folder for folder in self.steps() if step_of(folder) <= step_of(newest)]
        sound = [folder for folder in before if folder == newest or not checkpoint_problems(folder, thorough=False)]
        oldest_kept = step_of(sound[-self.keep :][0])
        for folder in before:
            if step_of(folder) < oldest_kept and not self._is_kept(step_of(folder)):
                self._remove(folder)

    def _is_kept(self, step: int) -> bool:
        return self.keeps(step) or bool(self.keep_every and step % self.keep_every == 0)

    def _remove(self, folder: Path) -> None:
        """Take a checkpoint its name first: one that is half removed must not look like one."""
        doomed = self.temporary(step_of(folder), attempt="removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)

    def _point_to(self, folder: Path) -> None:
        pointer = {"checkpoint": folder.name, "manifest_sha256": sha256_of(folder / MANIFEST)}
        write_json(self.root / f"{_LATEST}.tmp", pointer)
        os.replace(self.root / f"{_LATEST}.tmp", self.root / _LATEST)

    def _pointer_faults(self) -> list[str]:
        """What is wrong with the pointer. It may be one step behind: a process can end just before it moves."""
        path = self.root / _LATEST
        try:
            name = read_json(path).get("checkpoint")
        except CorruptCheckpoint as error:
            return [f"{self.root}: {error}"]
        return [] if (self.root / str(name)).is_dir() else [f"{path} points to {name}, which is not there"]


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoints at `path`, oldest step first: one, those in it, those of a run's folder, or imported weights.

    Raises `ConfigError` when there is none.
    """
    if path.is_dir() and ((path / STATE).is_file() or path.name.startswith("step-")):
        return [path]
    for place in (path, path / "checkpoints", path / IMPORTED):
        found = CheckpointFolder(place, keep=1).steps()
        if found:
            return found
    runs = sorted(str(folder.parent) for folder in path.glob("*/checkpoints"))
    way_out = f"name one of its runs, {runs[0]} for example" if runs else "pass RUN_DIR, or RUN_DIR/checkpoints/step-N"
    raise ConfigError([f"there is no checkpoint in {path}: {way_out}"])


def newest_valid_at(path: Path) -> Path:
    """The newest checkpoint at `path` that verifies. Raises `ConfigError`, with what is wrong, when none does."""
    found = []
    for folder in reversed(checkpoints_at(path)):
        faults = checkpoint_problems(folder)
        if not faults:
            return folder
        found += [f"{folder}: {fault}" for fault in faults]
    raise ConfigError(found)


def step_of(folder: Path) -> int:
    """The step whose checkpoint a folder holds."""
    return int(folder.name.removeprefix("step-"))
