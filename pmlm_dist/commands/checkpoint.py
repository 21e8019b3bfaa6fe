"""`pmlm checkpoint ls | verify | reshape`: list checkpoints, verify them, rewrite one as full tensors.

Needs neither torch nor a GPU, nor as many ranks as wrote the checkpoint.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pmlm_dist.checkpoint.files import KINDS, CheckpointReader, checkpoint_problems, read_state, write_numbers
from pmlm_dist.checkpoint.folder import TOKENIZER, CheckpointFolder, checkpoints_at, newest_valid_at, vocabulary_folder
from pmlm_dist.checkpoint.manifest import STATE, CorruptCheckpoint, FileDigest, rank_file, write_json
from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.files import name_in_errors
from pmlm_dist.folder_lock import FolderLock


def ls(folder: Path, /) -> None:
    """List the checkpoints in a folder: step, size, age, topology of the run, and missing files.

    Checksums are not compared; see `pmlm checkpoint verify`.
    """
    print(f"{'step':>10}  {'size':>9}  {'age':>9}  {'written by':32}  files")
    for path in checkpoints_at(folder):
        print("  ".join(_row(path)))


def verify(folder: Path, /) -> None:
    """Verify a checkpoint, or all in a folder: every checksum, and that each tensor is complete."""
    all_problems = []
    for path in checkpoints_at(folder):
        problems = checkpoint_problems(path)
        print(f"{path}: {'corrupt' if problems else 'valid'}")
        all_problems += [f"{path}: {problem}" for problem in problems]
    raise_if_any(all_problems)


def reshape(folder: Path, /, *, output: Path) -> None:
    """Rewrite a checkpoint (of several, the newest valid one) as full tensors in a single safetensors file.

    `output`: a folder of checkpoints, such as RUN_DIR/checkpoints; a run resumes from the result as from any other
    checkpoint. The write is atomic.
    """
    path, target = newest_valid_at(folder), CheckpointFolder(output, keep=1)
    state = read_state(path)
    step = int(state["step"])
    with name_in_errors(output), FolderLock.acquire(output):
        if target.folder(step).exists():
            raise ConfigError([f"{target.folder(step)} already exists: choose another --output"])
        temporary = target.temporary(step, attempt="reshape")
        shutil.rmtree(temporary, ignore_errors=True)  # of a reshape that was killed
        try:
            temporary.mkdir(parents=True)
            files = {rank_file(0): _write_full_tensors(path, temporary / rank_file(0))}
            files[STATE] = write_json(temporary / STATE, state)
            written = target.commit(step, temporary, files)
            with contextlib.suppress(ConfigError):  # of an earlier release: the checkpoint has no vocabulary
                shutil.copyfile(vocabulary_folder(path) / TOKENIZER, output / TOKENIZER)
            print(f"written: {written}")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_full_tensors(path: Path, file: Path) -> FileDigest:
    with CheckpointReader(path) as reader:
        wholes, kinds = list(reader.tensors.values()), KINDS if reader.has_moments else KINDS[:1]
        chunks = (reader.read(whole, kind).reshape(-1).view(np.uint8).data for whole in wholes for kind in kinds)
        return write_numbers(file, wholes, chunks, kinds=kinds)


def _row(path: Path) -> Iterator[str]:
    problems = checkpoint_problems(path, check="sizes")
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    try:
        state: dict[str, Any] = read_state(path)
    except CorruptCheckpoint:
        state = {}
    yield f"{state.get('step', path.name.removeprefix('step-').lstrip('0')):>10}"
    yield f"{_size(size):>9}"
    yield f"{_age(state.get('written_at')):>9}"
    yield f"{_topology(state.get('configuration', {})):32}"
    yield problems[0] if problems else "complete"


def _size(size: int) -> str:
    power = min(3, (len(str(size)) - 1) // 3)
    return f"{size / 1000**power:.1f} {('B', 'kB', 'MB', 'GB')[power]}"


def _age(written_at: Any) -> str:
    if not isinstance(written_at, int | float):
        return "?"
    hours = (time.time() - written_at) / 3600
    return f"{hours / 24:.1f} d" if hours >= 48 else f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"


def _topology(configuration: dict[str, Any]) -> str:
    ranks, engine = configuration.get("topology", {}), configuration.get("engine", {})
    precision = next((name for name in ("bf16", "fp16") if engine.get(name, {}).get("enabled")), "fp32")
    stage = engine.get("zero_optimization", {}).get("stage", 0)
    return f"dp {ranks.get('dp', '?')} x tp {ranks.get('tp', '?')}, ZeRO {stage}, {precision}"
