"""Small valid checkpoints for tests, written by two ranks without an engine, and ways to corrupt them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from pmlm_dist.checkpoint.files import KINDS, write_numbers
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.fragments import Fragment
from pmlm_dist.checkpoint.manifest import FileDigest, rank_file, write_json

FILES = ("state.json", rank_file(0), rank_file(1))
WHOLE = Fragment.whole("layers.0.weight", (4, 6), used_rows=3)
HALVES = (replace(WHOLE, stop=10), replace(WHOLE, start=10))


def values(step: int, kind: str) -> np.ndarray:
    """The full tensor of `kind` at `step`."""
    return (np.arange(24, dtype=np.float32) + 1000 * step + 100 * KINDS.index(kind)).reshape(4, 6)


def write_parts(folder: CheckpointFolder, step: int) -> tuple[Path, dict[str, FileDigest]]:
    """Write the files of both ranks and `state.json`; return the temporary folder and digests for a commit."""
    temporary = folder.temporary(step, attempt="a")
    temporary.mkdir(parents=True)
    files = {}
    for rank, half in enumerate(HALVES):
        chunks = [values(step, kind).reshape(-1)[half.start : half.stop].tobytes() for kind in KINDS]
        files[rank_file(rank)] = write_numbers(temporary / rank_file(rank), [half], chunks)
    state = {"step": step, "samples_consumed": 8 * step, "tokens_seen": 99, "identity": {}, "configuration": {}}
    return temporary, files | {"state.json": write_json(temporary / "state.json", state)}


def write_checkpoint(folder: CheckpointFolder, step: int) -> Path:
    """Commit a valid checkpoint of two ranks and apply retention."""
    path = folder.commit(step, *write_parts(folder, step))
    folder.remove_old(path)
    return path


def write_three(root: Path, *, keep: int = 3) -> CheckpointFolder:
    """Write valid checkpoints of steps 10, 20 and 30."""
    folder = CheckpointFolder(root, keep=keep)
    for step in (10, 20, 30):
        write_checkpoint(folder, step)
    return folder


def steps_in(root: Path) -> list[int]:
    """Steps of the committed checkpoints in `root`."""
    return sorted(int(path.name[5:]) for path in root.glob("step-*") if path.name[5:].isdigit())


def is_intact(path: Path) -> bool:
    """Whether a checkpoint holds exactly what was written, checked without its manifest and without our reader."""
    if {file.name for file in path.iterdir()} != {"manifest.json", *FILES}:
        return False
    step = int(path.name[5:])
    halves = [load_file(path / rank_file(rank)) for rank in (0, 1)]
    return json.loads((path / "state.json").read_text())["step"] == step and all(
        np.array_equal(np.concatenate([half[f"{kind}/{WHOLE.name}"] for half in halves]), values(step, kind).ravel())
        for kind in KINDS
    )


def truncate(path: Path, *, by: int = 1) -> None:
    """Remove the last `by` bytes of a file."""
    path.write_bytes(path.read_bytes()[:-by])
