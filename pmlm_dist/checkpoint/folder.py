"""Checkpoints of a run on disk: atomic commit, choice of the newest valid one, retention.

    RUN_DIR/checkpoints/
        step-00000400/                 a committed checkpoint (checkpoint/files.py)
        step-00000600.tmp-ATTEMPT/     being written, or left by an attempt that ended; never loaded
        latest                         name of the newest checkpoint, for people; loading scans the folders instead

A folder gets its final name after all ranks have written, every byte is on the disk and every file is checked. If the
process ends between any two operations, a valid checkpoint remains and no partial one is committed.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pmlm_dist.checkpoint.files import checkpoint_problems, sha256_of
from pmlm_dist.checkpoint.manifest import (
    MANIFEST,
    STATE,
    CorruptCheckpoint,
    FileDigest,
    read_json,
    write_json,
    write_manifest,
)
from pmlm_dist.config import ConfigError
from pmlm_dist.files import fsync_folder

IMPORTED = "weights"
"""Folder into which `pmlm import` writes its one checkpoint, which holds weights alone."""
TOKENIZER = "tokenizer.json"
"""The vocabulary of a run, beside its folder of checkpoints: with it a run folder can be used anywhere."""
_LATEST = "latest"
_TEMPORARY = ".tmp-"
_OWN_FILE = re.compile(r"(rank-\d{5}\.safetensors|state\.json|manifest\.json)(\.done|\.failed)?(\.tmp-[0-9a-f]{8})?")


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints below `root`, seen from one process.

    Retention: the newest `keep`, and every step for which `keeps` is true. `fence` is called right before a checkpoint
    gets its name; it raises when this process may no longer commit (folder_lock.py).
    """

    root: Path
    keep: int
    fence: Callable[[], None] = lambda: None
    keeps: Callable[[int], bool] = lambda step: False
    _verified: set[Path] = field(default_factory=set)
    """Checkpoints that retention need not look into again: committed or verified by this process."""

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """Return the newest valid checkpoint (None if there are no checkpoints) and the problems of newer ones.

        Raises `ConfigError` when there are checkpoints but none is valid: restarting from step 0 would lose them.
        """
        newest, skipped = self.newest_valid_of(self.steps(), checkpoint_problems)
        return newest, [*skipped, *self.pointer_problems()] if newest else []

    def newest_valid_of(
        self, folders: Sequence[Path], problems_of: Callable[[Path], list[str]]
    ) -> tuple[Path | None, list[str]]:
        """Return the last of `folders` without problems, and the problems of those after it; see `newest_valid`."""
        skipped: list[str] = []
        for folder in reversed(folders):
            problems = problems_of(folder)
            if not problems:
                return folder, skipped
            skipped += [f"checkpoint {folder} is corrupt: {problem}" for problem in problems]
        if skipped:
            raise ConfigError(
                [*skipped, f"no valid checkpoint is left: restore one, or remove {self.root} to restart from step 0"]
            )
        return None, []

    def steps(self) -> list[Path]:
        """Return the folders with the name of a checkpoint, oldest step first."""
        folders = [path for path in self.root.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
        return sorted((path for path in folders if path == self.folder(step_of(path))), key=step_of)

    def newest(self) -> Path | None:
        """Return the newest folder with the name of a checkpoint, without verifying it."""
        return next(reversed(self.steps()), None)

    def folder(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def temporary(self, step: int, *, attempt: str) -> Path:
        """Return the path into which the ranks of `attempt` write `step`. Other attempts never share it."""
        return self.root / f"step-{step:08d}{_TEMPORARY}{attempt}"

    def remove_temporary(self) -> None:
        """Remove what earlier attempts left half written or half removed.

        Each folder is renamed first, atomically. A stale rank about to commit then finds it missing, or has committed.
        """
        for path in self.root.glob(f"step-*{_TEMPORARY}*"):
            if not _holds_only_own_files(path):
                continue
            doomed = path.with_name(f"{path.name.partition(_TEMPORARY)[0]}{_TEMPORARY}removed-{secrets.token_hex(4)}")
            with contextlib.suppress(OSError):
                path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        for path in self.root.glob(f"{_LATEST}{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def commit(self, step: int, temporary: Path, files: Mapping[str, FileDigest]) -> Path:
        """Make the contents of `temporary` the checkpoint of `step`; return its path.

        `files`: digest of each file as reported by its writer, already flushed to the disk. Raises `CorruptCheckpoint`
        when the files do not form a complete checkpoint.
        """
        write_manifest(temporary, dict(files))
        problems = checkpoint_problems(temporary, check="names")  # their writers have read them back
        if problems:
            raise CorruptCheckpoint(f"{temporary} is not complete: {problems[0]}")
        fsync_folder(temporary)
        self.fence()
        final = self.folder(step)
        if final.exists():  # corrupt: otherwise this run would have resumed from it
            self._remove(final)
            if final.exists():  # it holds files of others
                final.rename(f"{final}.kept-{secrets.token_hex(4)}")
        temporary.rename(final)
        self._verified.add(final)
        fsync_folder(self.root)
        self._point_to(final)
        return final

    def keep_only(self, step: int) -> None:
        """Remove all checkpoints except that of `step`, and point `latest` to it."""
        self._point_to(self.folder(step))
        for folder in self.steps():
            if step_of(folder) != step:
                self._remove(folder)

    def remove_old(self, newest: Path) -> None:
        """Apply the retention rule to the checkpoints up to `newest`.

        Later steps exist when the run fell back behind corrupt checkpoints. They neither count nor are removed: the
        checkpoint just written must outlive them. Corrupt checkpoints do not count either.
        """
        candidates = [folder for folder in self.steps() if step_of(folder) <= step_of(newest)]
        unknown = set(candidates) - self._verified - {newest}
        self._verified.update(folder for folder in unknown if not checkpoint_problems(folder, check="sizes"))
        valid = [folder for folder in candidates if folder == newest or folder in self._verified]
        oldest_kept = step_of(valid[-self.keep :][0])
        for folder in candidates:
            if step_of(folder) < oldest_kept and not self.keeps(step_of(folder)):
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        """Rename a checkpoint, then remove it: a half-removed one must not look like a checkpoint.

        A folder that holds other files, too, is kept.
        """
        self._verified.discard(folder)
        if _holds_only_own_files(folder):
            doomed = self.temporary(step_of(folder), attempt=f"removed-{secrets.token_hex(4)}")
            folder.rename(doomed)
            shutil.rmtree(doomed)

    def _point_to(self, folder: Path) -> None:
        pointer = {"checkpoint": folder.name, "manifest_sha256": sha256_of(folder / MANIFEST)}
        write_json(self.root / _LATEST, pointer)

    def pointer_problems(self) -> list[str]:
        """Return what is wrong with `latest`. One step behind is valid: the process may end before it moves."""
        path = self.root / _LATEST
        try:
            name = read_json(path).get("checkpoint")
        except CorruptCheckpoint as error:
            return [f"{self.root}: {error}"]
        return [] if (self.root / str(name)).is_dir() else [f"{path} points to {name}, which is not there"]


def _holds_only_own_files(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:  # one listing: a `stat` of each of a thousand files takes long
        return all(_OWN_FILE.fullmatch(entry.name) and entry.is_file() for entry in entries)


def checkpoints_at(path: Path | str) -> list[Path]:
    """Return the checkpoints at `path`, oldest step first.

    `path`: one checkpoint, a folder of checkpoints, a run's folder, or a folder of imported weights. Raises
    `ConfigError` when there is none.
    """
    path = Path(path)
    if path.is_dir() and ((path / STATE).is_file() or path.name.startswith("step-")):
        return [path]
    for place in (path, path / "checkpoints", path / IMPORTED):
        checkpoints = CheckpointFolder(place, keep=1).steps()
        if checkpoints:
            return checkpoints
    runs = sorted(str(folder.parent) for folder in path.glob("*/checkpoints"))
    way_out = f"name one of its runs, {runs[0]} for example" if runs else "pass RUN_DIR, or RUN_DIR/checkpoints/step-N"
    if (path / "config.json").is_file() and not runs:  # the layout of Hugging Face models
        way_out = "it looks like a model of another program, read it by `pmlm import` first"
    raise ConfigError([f"there is no checkpoint in {path}: {way_out}"])


def newest_valid_at(path: Path | str) -> Path:
    """Return the newest valid checkpoint at `path`. Raises `ConfigError` with all problems when none is valid."""
    skipped = []
    for folder in reversed(checkpoints_at(path)):
        problems = checkpoint_problems(folder)
        if not problems:
            return folder
        skipped += [f"{folder}: {problem}" for problem in problems]
    raise ConfigError(skipped)


def vocabulary_folder(checkpoint: Path) -> Path:
    """Return the folder with the vocabulary of a checkpoint: that of its run, or the one that it lies in itself.

    Raises `ConfigError` if neither has one, as in runs of earlier releases.
    """
    own = Path(os.path.abspath(checkpoint)).parent
    run = own.parent if own.name in ("checkpoints", IMPORTED) else own
    for folder in (own, run):
        if (folder / TOKENIZER).is_file():
            return folder
    raise ConfigError(
        [f"{run} has no {TOKENIZER}, the vocabulary of {checkpoint}: copy that of its corpus there, or resume the run"]
    )


def step_of(folder: Path) -> int:
    """Return the step whose checkpoint a folder holds."""
    return int(folder.name.removeprefix("step-"))
