"""Checkpoints that are whole or not there.

    RUN_DIR/checkpoints/
        step-00000400/          written as step-00000400.tmp, renamed when every byte is on disk
            manifest.json       sha256 and size of every other file
            state.json          step, samples consumed, identity of the run, resolved configuration
            ...                 DeepSpeed's files: weights, optimizer, loss scale
        latest                  name of the newest one; a hint for people, loading looks at the folders themselves

DeepSpeed by itself writes to the final names, without checksums, and moves its pointer before all ranks are done.
Here a folder gets its name only after all ranks have written, all files are flushed to disk and hashed. Loading takes
the newest folder whose manifest verifies and says what is wrong with newer ones. Dropout and masks are functions of
seed and samples consumed (`parallel/seeding.py`), so there is no random state to keep.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from pmlm_dist.config import ConfigError, refuse
from pmlm_dist.parallel.groups import Topology

_MANIFEST, _STATE, _LATEST = "manifest.json", "state.json", "latest"


@dataclass(frozen=True)
class RunState:
    """How far a run is; with the configuration this determines everything that follows."""

    step: int = 0
    samples_consumed: int = 0
    tokens_seen: int = 0


@dataclass(frozen=True)
class _Listed:
    """A file as the manifest lists it."""

    bytes: int
    sha256: str


class CheckpointFolder:
    """The checkpoints of one run on disk, seen from one process."""

    def __init__(self, root: Path, *, keep: int):
        self.root, self.keep = root, keep

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies (None if there is none at all), and what is wrong with newer ones.

        Raises `ConfigError` when checkpoints are there but none verifies: starting from nothing would lose them.
        """
        complaints: list[str] = []
        for folder in reversed(self._folders()):
            faults = faults_of(folder)
            if not faults:
                return folder, complaints
            complaints += [f"checkpoint {folder} is not whole: {fault}" for fault in faults]
        if complaints:
            raise ConfigError(
                [*complaints, f"no whole checkpoint is left: restore one, or remove {self.root} to start anew"]
            )
        return None, []

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` into; it does not count until `commit`."""
        temporary = self._temporary(step)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return temporary

    def commit(self, step: int) -> Path:
        """Hash and flush what was written since `begin`, give it its name, drop the oldest beyond `keep`.

        Newer folders, which this run fell back behind, neither count nor go: the one just written must outlive them.
        """
        temporary, final = self._temporary(step), self.folder(step)
        files = {
            str(path.relative_to(temporary)): asdict(_Listed(bytes=path.stat().st_size, sha256=_sha256(path)))
            for path in _files(temporary)
        }
        _write_json(temporary / _MANIFEST, {"version": 1, "files": files})
        for path in [*_files(temporary), *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
            _flush(path)
        if final.exists():  # of an earlier life, and not whole: else this run would have gone on from it
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(self.root)
        _write_json(self.root / f"{_LATEST}.tmp", {"checkpoint": final.name})
        os.replace(self.root / f"{_LATEST}.tmp", self.root / _LATEST)
        folders = self._folders()
        for old in folders[: folders.index(final) + 1][: -self.keep]:
            shutil.rmtree(old)
        return final

    def folder(self, step: int) -> Path:
        """Where the checkpoint of `step` lies once it is whole."""
        return self.root / f"step-{step:08d}"

    def _temporary(self, step: int) -> Path:
        return self.root / f"step-{step:08d}.tmp"

    def _folders(self) -> list[Path]:
        found = [path for path in self.root.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
        return sorted(found, key=lambda path: int(path.name[5:]))


def find_checkpoint(folder: CheckpointFolder, topology: Topology) -> Path | None:
    """The checkpoint to go on from, chosen by rank 0 for all; every rank must call.

    Newer ones that are not whole are named in warnings. Raises `ConfigError` on every rank if none of several is whole.
    """
    path, complaints, problems = None, [], []
    if topology.is_first:
        try:
            path, complaints = folder.newest_whole()
        except ConfigError as error:
            problems = error.problems
    path, problems = topology.broadcast((path, problems))
    refuse(problems)
    for complaint in complaints:
        warnings.warn(f"{complaint}; going on from {path}", stacklevel=2)
    return path


def save_checkpoint(
    engine: DeepSpeedEngine,
    state: RunState,
    folder: CheckpointFolder,
    topology: Topology,
    *,
    identity: dict[str, Any],
    configuration: dict[str, Any],
) -> Path:
    """Write the checkpoint of `state` into `folder`; every rank must call. Returns where it lies."""
    if topology.is_first:
        temporary = folder.begin(state.step)
        _write_json(temporary / _STATE, {**asdict(state), "identity": identity, "configuration": configuration})
    topology.barrier()
    temporary_name = f"{folder.folder(state.step).name}.tmp"
    engine.save_checkpoint(str(folder.root), tag=temporary_name, save_latest=False)
    topology.barrier()
    if topology.is_first:
        folder.commit(state.step)
    topology.barrier()
    return folder.folder(state.step)


def load_checkpoint(engine: DeepSpeedEngine, path: Path) -> RunState:
    """Load the checkpoint at `path`, verified and of the same run (see `differences`), into `engine`.

    Every rank must call. The optimizer keeps the settings that it was built with (weight decay, betas, ...): DeepSpeed
    would put the saved ones in their place, against what the command line says.
    """
    settings = [{name: value for name, value in group.items() if name != "params"} for group in _groups_of(engine)]
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise ConfigError([f"DeepSpeed found no checkpoint in {path}"])
    for group, its_settings in zip(_groups_of(engine), settings, strict=True):
        group.update(its_settings)
    saved = read_state(path)
    return RunState(**{name: saved[name] for name in asdict(RunState())})


def _groups_of(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    optimizer: Any = engine.optimizer
    return optimizer.param_groups


def faults_of(folder: Path) -> list[str]:
    """What is wrong with the files of a checkpoint, one sentence each; empty when it is whole."""
    try:
        listed = _read_manifest(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # any JSON may stand there
        return [f"{_MANIFEST} cannot be read ({error!r})"]
    if _STATE not in listed:
        return [f"{_MANIFEST} lists no {_STATE}"]
    faults = [fault for name, expected in listed.items() for fault in _faults_of_file(folder, name, expected)]
    return faults + [
        f"{name} is not in the manifest"
        for name in sorted({str(path.relative_to(folder)) for path in _files(folder)} - {_MANIFEST, *listed})
    ]


def _read_manifest(folder: Path) -> dict[str, _Listed]:
    files = json.loads((folder / _MANIFEST).read_text())["files"]
    return {name: _Listed(**listed) for name, listed in files.items()}


def _faults_of_file(folder: Path, name: str, expected: _Listed) -> list[str]:
    path = folder / name
    try:
        if not path.is_file():
            return [f"{name} is missing"]
        if path.stat().st_size != expected.bytes:
            return [f"{name} has {path.stat().st_size} bytes, expected {expected.bytes}"]
        if _sha256(path) != expected.sha256:
            return [f"{name} has another checksum than when it was written"]
    except OSError as error:
        return [f"{name} cannot be read ({error})"]
    return []


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint: the fields of `RunState`, `identity` and `configuration`."""
    return json.loads((folder / _STATE).read_text())


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How the identity of a saved run differs from that of this one, a sentence a setting."""
    return [
        f"{name} was {saved.get(name)!r}, is now {now.get(name)!r}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
