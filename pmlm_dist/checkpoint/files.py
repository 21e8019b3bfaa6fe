"""The files of one checkpoint: numbers any engine can be filled from, and how to tell whether they are whole.

    step-00000400/
        manifest.json              version of the format; sha256 and size of every other file
        state.json                 progress, identity and configuration of the run, counters, loss scale, fingerprint
        rank-00000.safetensors     what rank 0 wrote: runs of fp32 weights and of both Adam moments
        rank-00001.safetensors     ...

A rank file is plain safetensors: tensors `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, and in its metadata the
`Placement` of each NAME in the whole tensor. Together the files hold every number of every tensor exactly once; weights
that were imported have no moments, and no run goes on from them, one starts. Nothing here is ever unpickled, and
nothing here needs torch: `read_weights` serves whoever wants whole weights.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pmlm_dist.checkpoint.fragments import Fragment, coverage_problems, overlaps

VERSION = 2
MANIFEST, STATE = "manifest.json", "state.json"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
BYTES_PER_NUMBER = 4
_PLACEMENTS = "placements"
_STATE_FIELDS = ("step", "samples_consumed", "tokens_seen", "identity", "configuration")


class CorruptCheckpoint(ValueError):
    """A checkpoint that cannot be read; the message is one sentence."""


@dataclass(frozen=True)
class FileDigest:
    """A file as the manifest lists it."""

    bytes: int
    sha256: str


def rank_file(rank: int) -> str:
    """Name of the file that `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


# ------------------------------------------------------------------------------------------------------------ writing


def write_numbers(
    path: Path,
    fragments: Iterable[Fragment],
    chunks: Iterable[bytes | memoryview],
    *,
    kinds: tuple[str, ...] = KINDS,
) -> FileDigest:
    """Write a rank file, flush it to the disk and read it back.

    `chunks`: the bytes (little-endian fp32) of each placement's `kinds` (weight, exp_avg and exp_avg_sq, or the weight
    alone), one placement after another, cut anywhere. Raises OSError when the disk does not take them or gives back
    something else.
    """
    digest, size = hashlib.sha256(), 0
    header, expected = _header(list(fragments), kinds)
    with path.open("wb") as file:
        for chunk in itertools.chain([header], chunks):
            file.write(chunk)
            digest.update(chunk)
            size += memoryview(chunk).nbytes
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is read back then comes from the disk
    if size != expected:
        raise ValueError(f"{path} got {size} bytes, its placements need {expected}")
    written = FileDigest(bytes=size, sha256=digest.hexdigest())
    if sha256_of(path) != written.sha256:
        raise OSError(errno.EIO, "reads back with another checksum than was written", str(path))
    return written


def _header(fragments: list[Fragment], kinds: tuple[str, ...]) -> tuple[bytes, int]:
    """The head of a rank file, and the size of the whole file."""
    index = json.dumps([fragment.as_json() for fragment in fragments])
    entries: dict[str, Any] = {"__metadata__": {_PLACEMENTS: index}}
    at = 0
    for fragment in fragments:
        shape = list(fragment.shape) if fragment.is_whole else [fragment.numel]
        for kind in kinds:
            end = at + fragment.numel * BYTES_PER_NUMBER
            entries[f"{kind}/{fragment.name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
            at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + at


def write_json(path: Path, value: dict[str, Any]) -> FileDigest:
    """Write `value` and flush it to the disk."""
    text = json.dumps(value, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
    fsync_file(path)
    return FileDigest(bytes=len(text.encode()), sha256=hashlib.sha256(text.encode()).hexdigest())


def write_manifest(folder: Path, files: dict[str, FileDigest]) -> None:
    """List `files` by name in the manifest of `folder`."""
    listed = {name: asdict(written) for name, written in sorted(files.items())}
    write_json(folder / MANIFEST, {"version": VERSION, "files": listed})


def fsync_file(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------- checking


def checkpoint_problems(folder: Path, *, thorough: bool = True) -> list[str]:
    """What is wrong with a checkpoint, a sentence each; empty when it is whole. Checksums only if `thorough`."""
    try:
        listed = _read_manifest(folder)
    except CorruptCheckpoint as error:
        return [str(error)]
    found = [
        fault
        for name, written in listed.items()
        for fault in _faults_of_file(folder / name, written, thorough=thorough)
    ]
    unknown = {path.name for path in folder.iterdir()} - {MANIFEST, *listed}
    found += [f"{name} is not in the manifest" for name in sorted(unknown)]
    return found or content_problems(folder)


def content_problems(folder: Path) -> list[str]:
    """What is wrong with the content of a checkpoint whose files are as they were written."""
    try:
        read_state(folder)
        fragments = [fragment for path in _rank_files(folder) for fragment in _placements_of(path)]
    except CorruptCheckpoint as error:
        return [str(error)]
    return coverage_problems(fragments) or ([] if fragments else ["it holds no numbers"])


def _read_manifest(folder: Path) -> dict[str, FileDigest]:
    manifest = read_json(folder / MANIFEST)
    version = manifest.get("version")
    if version != VERSION:
        raise CorruptCheckpoint(
            f"{MANIFEST} is of format {version!r}, this program reads {VERSION}: use the one that wrote it"
        )
    try:
        files = {name: FileDigest(**listed) for name, listed in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:  # any JSON may stand there
        raise CorruptCheckpoint(f"{MANIFEST} cannot be read ({error!r})") from error
    if STATE not in files or rank_file(0) not in files:
        raise CorruptCheckpoint(f"{MANIFEST} does not list {STATE} and {rank_file(0)}")
    strange = [name for name in files if name != STATE and not _is_rank_file(name)]
    if strange:
        raise CorruptCheckpoint(f"{MANIFEST} lists {strange[0]!r}, which is no file of a checkpoint")
    return files


def _is_rank_file(name: str) -> bool:
    digits = name.removeprefix("rank-").removesuffix(".safetensors")
    return digits.isdecimal() and name == rank_file(int(digits))


def _faults_of_file(path: Path, expected: FileDigest, *, thorough: bool) -> list[str]:
    try:
        if path.is_symlink() or not path.is_file():
            return [f"{path.name} is missing"]
        size = path.stat().st_size
        if size != expected.bytes:
            return [f"{path.name} has {size} bytes, expected {expected.bytes}"]
        if thorough and sha256_of(path) != expected.sha256:
            return [f"{path.name} has another checksum than when it was written"]
    except OSError as error:
        return [f"{path.name} cannot be read ({error})"]
    return []


def sha256_of(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------ reading


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises `Damaged` when it lacks what every checkpoint has."""
    state = read_json(folder / STATE)
    missing = [name for name in _STATE_FIELDS if name not in state]
    if missing or not isinstance(state["identity"], dict) or not isinstance(state["configuration"], dict):
        raise CorruptCheckpoint(f"{STATE} lacks {', '.join(missing) or 'identity or configuration'}")
    return state


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """The whole fp32 weights of a checkpoint by name, without rows that pad. Raises `Damaged` when it is not whole."""
    faults = checkpoint_problems(folder)
    if faults:
        raise CorruptCheckpoint(f"checkpoint {folder} is not whole: {faults[0]}")
    with CheckpointReader(folder) as reader:
        return {whole.name: reader.read(whole, "weight")[: whole.used_rows] for whole in reader.tensors.values()}


class CheckpointReader:
    """Numbers of a checkpoint by their place in the whole tensors; reads from the disk what is asked for alone.

    A context manager; the checkpoint must have been found whole. Raises `Damaged` when its index cannot be read.
    """

    def __init__(self, folder: Path):
        self._files = ExitStack()
        self._sources: dict[str, list[tuple[Any, Fragment]]] = {}
        for path in _rank_files(folder):
            file = self._files.enter_context(_open(path))
            for fragment in _placements(file, path):
                self._sources.setdefault(fragment.name, []).append((file, fragment))

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    @property
    def has_moments(self) -> bool:
        """Whether there is more than weights."""
        return all(f"{KINDS[1]}/{source.name}" in file.keys() for file, source in self._all_sources())  # noqa: SIM118

    def _all_sources(self) -> Iterator[tuple[Any, Fragment]]:
        return itertools.chain.from_iterable(self._sources.values())

    @property
    def tensors(self) -> dict[str, Fragment]:
        """Every tensor, whole, by name."""
        first = (sources[0][1] for sources in self._sources.values())
        return {
            part.name: Fragment.whole(part.name, part.shape, used_rows=part.used_rows, dim=part.dim) for part in first
        }

    def read(self, whole: Fragment, kind: str) -> np.ndarray:
        """A whole tensor in its shape, fp32."""
        numbers = np.empty(whole.numel, np.float32)
        self.fill(numbers, whole, kind)
        return numbers.reshape(whole.shape)

    def fill(self, numbers: np.ndarray, fragment: Fragment, kind: str) -> None:
        """Write `kind` (of `KINDS`) of the numbers at `placement` into the fp32 array `numbers` [numel].

        Where the tensor has more rows that pad than the checkpoint's, those are left as they are.
        """
        for file, source in self._sources[fragment.name]:
            for part in overlaps(source, fragment):
                span = (part.rows - 1) * part.source_stride + part.columns
                block = _read_run(file, f"{kind}/{source.name}", part.source_at, part.source_at + span)
                _matrix(numbers[part.target_at :], part.rows, part.columns, part.target_stride)[...] = _matrix(
                    block, part.rows, part.columns, part.source_stride
                )


def _read_run(file: Any, name: str, start: int, stop: int) -> np.ndarray:
    """Numbers [start, stop), in row-major order, of a tensor of any shape."""
    tensor = file.get_slice(name)
    width = math.prod(tensor.get_shape()[1:])
    first = start // width
    rows = tensor[first : -(-stop // width)].reshape(-1)
    return rows[start - first * width :][: stop - start]


def _matrix(numbers: np.ndarray, rows: int, columns: int, stride: int) -> np.ndarray:
    step = numbers.itemsize
    return np.lib.stride_tricks.as_strided(numbers, (rows, columns), (stride * step, step))


def _rank_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_rank_file(path.name))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpoint(f"{path.name} cannot be read ({error})") from error


def _placements_of(path: Path) -> list[Fragment]:
    with _open(path) as file:
        return _placements(file, path)


def _placements(file: Any, path: Path) -> list[Fragment]:
    """The index of an opened rank file, checked against its tensors."""
    try:
        index = json.loads((file.metadata() or {})[_PLACEMENTS])
        found = [Fragment.from_json(entry) for entry in index]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path.name} has no readable index of its tensors ({error!r})") from error
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    sizes = {name: math.prod(tensor.get_shape()) for name, tensor in slices.items() if tensor.get_dtype() == "F32"}
    kinds = KINDS if any(name.startswith(KINDS[1:]) for name in sizes) else KINDS[:1]
    expected = {f"{kind}/{fragment.name}": fragment.numel for fragment in found for kind in kinds}
    if sizes != expected or len(slices) != len(sizes) or len(expected) != len(found) * len(kinds):
        raise CorruptCheckpoint(f"{path.name} holds other tensors than its index says")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `Damaged` whatever else stands there."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: brackets a million deep
        raise CorruptCheckpoint(f"{path.name} cannot be read ({error!r})") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path.name} cannot be read (it holds no object)")
    return value
