"""Files of one checkpoint: format, integrity checks, and reading of any part of any tensor.

    step-00000400/
        manifest.json              sha256, size and fragments of every other file (checkpoint/manifest.py)
        state.json                 progress, identity and configuration of the run, counters, loss scale, fingerprint
        rank-00000.safetensors     fragments written by rank 0: fp32 weights and both Adam moments
        rank-00001.safetensors     ...

A rank file is plain safetensors with tensors `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`. Its metadata holds the
`Fragment` of each NAME: the place of its elements in the full tensor. Together the files hold every element of every
tensor exactly once. A rank that writes nothing (MAX_WRITERS in fragments.py) has no file. Imported weights have no
moments: a run can start from them but not resume.

Nothing is unpickled, and nothing here needs torch.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from pmlm_dist.checkpoint.fragments import Fragment, coverage_problems, overlaps
from pmlm_dist.checkpoint.manifest import (
    MANIFEST,
    STATE,
    CorruptCheckpoint,
    FileDigest,
    is_rank_file,
    read_json,
    read_manifest,
)

KINDS = ("weight", "exp_avg", "exp_avg_sq")
BYTES_PER_NUMBER = 4
_FRAGMENTS = "fragments"
_STATE_FIELDS = ("step", "samples_consumed", "tokens_seen", "identity", "configuration")

Check = Literal["names", "sizes", "checksums"]
"""What is compared with the manifest: names by one listing of the folder; sizes by one `stat` a file; every byte."""


# ------------------------------------------------------------------------------------------------------------ writing


def write_numbers(
    path: Path, fragments: Iterable[Fragment], chunks: Iterable[bytes | memoryview], *, kinds: tuple[str, ...] = KINDS
) -> FileDigest:
    """Write a rank file, flush it to the disk and read it back.

    `chunks`: little-endian fp32 bytes of `fragments` in order, for each fragment its `kinds` in order; chunk boundaries
    are arbitrary. Raises OSError when the disk rejects the bytes or returns different ones.
    """
    digest, size = hashlib.sha256(), 0
    fragments = list(fragments)
    header, expected = _header(fragments, kinds)
    with path.open("wb") as file:
        for chunk in itertools.chain([header], chunks):
            file.write(chunk)
            digest.update(chunk)
            size += memoryview(chunk).nbytes
        file.flush()
        os.fsync(file.fileno())
        # Drop the page cache, so that the checksum below reads the disk and not the memory just written.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if size != expected:
        raise ValueError(f"{path} got {size} bytes, its fragments need {expected}")
    written = FileDigest(size, digest.hexdigest(), kinds, tuple(fragments))
    if sha256_of(path) != written.sha256:
        raise OSError(errno.EIO, "reads back with another checksum than was written", str(path))
    return written


def _header(fragments: list[Fragment], kinds: tuple[str, ...]) -> tuple[bytes, int]:
    """Return the header of a rank file and the size of the complete file in bytes."""
    index = json.dumps([fragment.as_json() for fragment in fragments])
    entries: dict[str, Any] = {"__metadata__": {_FRAGMENTS: index}}
    offset = 0
    for fragment in fragments:
        shape = list(fragment.shape) if fragment.numel == math.prod(fragment.shape) else [fragment.numel]
        for kind in kinds:
            end = offset + fragment.numel * BYTES_PER_NUMBER
            entries[f"{kind}/{fragment.name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + offset


# ----------------------------------------------------------------------------------------------------------- checking


def checkpoint_problems(folder: Path, *, check: Check = "checksums", part: int = 0, parts: int = 1) -> list[str]:
    """Return what is wrong with a checkpoint, one sentence each; empty when it is valid.

    Ranks can divide the work into `parts`: each returns the problems of its share of the files, part 0 also those of
    the checkpoint as a whole.
    """
    try:
        listed = read_manifest(folder)
        names = _names(folder) if part == 0 else dict.fromkeys(listed, True)
    except CorruptCheckpoint as error:
        return [str(error)]
    share = sorted(listed, key=lambda name: (-listed[name].bytes, name))[part::parts]
    problems = [f"{name} is missing" for name in share if not names.get(name)]
    if check != "names":
        problems += [
            problem
            for name in share
            if names.get(name)
            for problem in _file_problems(folder / name, listed[name], thorough=check == "checksums")
        ]
    if part == 0:
        problems += [f"{name} is not in the manifest" for name in sorted(names.keys() - {MANIFEST, *listed})]
    return problems or (_content_problems(folder) if part == 0 else [])


def _names(folder: Path) -> dict[str, bool]:
    """Names in a folder, by one listing; True for files, which links and folders are not."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    except OSError as error:
        raise CorruptCheckpoint(f"{folder.name} cannot be read ({error})") from error


def _content_problems(folder: Path) -> list[str]:
    """Problems of the content, for a checkpoint whose files match their checksums."""
    try:
        read_state(folder)
        with CheckpointReader(folder) as reader:
            fragments = list(reader.fragments())
    except CorruptCheckpoint as error:
        return [str(error)]
    return coverage_problems(fragments) or ([] if fragments else ["it holds no tensors"])


def _file_problems(path: Path, expected: FileDigest, *, thorough: bool) -> list[str]:
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError
        if found.st_size != expected.bytes:
            return [f"{path.name} has {found.st_size} bytes, expected {expected.bytes}"]
        if thorough:
            _verify_content(path, expected)
    except FileNotFoundError:
        return [f"{path.name} is missing"]
    except OSError as error:
        return [f"{path.name} cannot be read ({error})"]
    except CorruptCheckpoint as error:
        return [str(error)]
    return []


def _verify_content(path: Path, expected: FileDigest) -> None:
    if sha256_of(path) != expected.sha256:
        raise CorruptCheckpoint(f"{path.name} has another checksum than when it was written")
    if expected.fragments is not None:
        with ExitStack() as files:
            _RankFile.open(path, expected, files)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------ reading


def read_state(folder: Path | str) -> dict[str, Any]:
    """Return `state.json` of a checkpoint. Raises `CorruptCheckpoint` when a required field is missing."""
    state = read_json(Path(folder) / STATE)
    missing = [name for name in _STATE_FIELDS if name not in state]
    if missing or not isinstance(state["identity"], dict) or not isinstance(state["configuration"], dict):
        raise CorruptCheckpoint(f"{STATE} lacks {', '.join(missing) or 'identity or configuration'}")
    return state


def read_weights(folder: Path | str) -> dict[str, np.ndarray]:
    """Return the full fp32 weights of a checkpoint by name, without padding rows.

    Raises `CorruptCheckpoint` when the checkpoint is not valid.
    """
    folder = Path(folder)
    problems = checkpoint_problems(folder)
    if problems:
        raise CorruptCheckpoint(f"checkpoint {folder} is corrupt: {problems[0]}")
    with CheckpointReader(folder) as reader:
        return {whole.name: reader.read(whole, "weight")[: whole.used_rows] for whole in reader.tensors.values()}


class CheckpointReader:
    """Reads tensors of a valid checkpoint, or any fragment of them; only the requested elements are read.

    A context manager. A file is opened when one of its fragments is first needed; without an index in the manifest all
    are, at once. Raises `CorruptCheckpoint` when an index cannot be read.
    """

    def __init__(self, folder: Path):
        self._folder, self._files = folder, ExitStack()
        self._listed: Mapping[str, FileDigest] = {n: d for n, d in read_manifest(folder).items() if is_rank_file(n)}
        self._opened: dict[str, _RankFile] = {}
        self._sources: dict[str, list[tuple[str, Fragment]]] = {}
        for name, digest in self._listed.items():
            for fragment in self._open(name).fragments if digest.fragments is None else digest.fragments:
                self._sources.setdefault(fragment.name, []).append((name, fragment))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    @property
    def has_moments(self) -> bool:
        """Whether the checkpoint holds Adam's moments besides weights."""
        kinds = [
            file.kinds
            for file in (self._opened.get(name, digest) for name, digest in self._listed.items())
            if file.fragments
        ]
        return all(set(KINDS) <= set(of_file) for of_file in kinds)

    def fragments(self) -> Iterator[Fragment]:
        """Yield every fragment of the checkpoint."""
        return (fragment for sources in self._sources.values() for _, fragment in sources)

    @property
    def tensors(self) -> dict[str, Fragment]:
        first = (sources[0][1] for sources in self._sources.values())
        return {
            part.name: Fragment.whole(part.name, part.shape, used_rows=part.used_rows, dim=part.dim) for part in first
        }

    def _open(self, name: str) -> _RankFile:
        if name not in self._opened:
            self._opened[name] = _RankFile.open(self._folder / name, self._listed[name], self._files)
        return self._opened[name]

    def read(self, whole: Fragment, kind: str) -> np.ndarray:
        """Return a full tensor in its shape, fp32."""
        values = np.empty(whole.numel, np.float32)
        self.fill(values, whole, kind)
        return values.reshape(whole.shape)

    def fill(self, values: np.ndarray, fragment: Fragment, kind: str) -> None:
        """Write the elements of `fragment` into the fp32 array `values` [numel]; `kind` is one of `KINDS`.

        Padding rows that the checkpoint does not have stay unchanged.
        """
        for name, source in self._sources[fragment.name]:
            for part in overlaps(source, fragment):
                file = self._open(name).file
                # One contiguous read per overlap: it spans the gaps between rows, which strides then skip.
                span = (part.rows - 1) * part.source_stride + part.columns
                block = _read_range(file, f"{kind}/{source.name}", part.source_offset, part.source_offset + span)
                target = _matrix(values[part.target_offset :], part.rows, part.columns, part.target_stride)
                target[...] = _matrix(block, part.rows, part.columns, part.source_stride)


def _read_range(file: Any, name: str, start: int, stop: int) -> np.ndarray:
    """Return elements [start, stop), in row-major order, of a tensor of any shape."""
    tensor = file.get_slice(name)
    width = math.prod(tensor.get_shape()[1:])
    first = start // width
    rows = tensor[first : -(-stop // width)].reshape(-1)
    return rows[start - first * width :][: stop - start]


def _matrix(values: np.ndarray, rows: int, columns: int, stride: int) -> np.ndarray:
    step = values.itemsize
    return np.lib.stride_tricks.as_strided(values, (rows, columns), (stride * step, step))


@dataclass(frozen=True)
class _RankFile:
    """An opened rank file, and its index."""

    file: Any
    kinds: tuple[str, ...]
    fragments: tuple[Fragment, ...]

    @classmethod
    def open(cls, path: Path, listed: FileDigest, files: ExitStack) -> Self:
        """Open a file until `files` is closed. Raises `CorruptCheckpoint` if it holds other fragments than `listed`."""
        try:
            file: Any = files.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise CorruptCheckpoint(f"{path.name} cannot be read ({error})") from error
        opened = cls(file, *_index(file, path))
        if listed.fragments is not None and (listed.kinds, listed.fragments) != (opened.kinds, opened.fragments):
            raise CorruptCheckpoint(f"{path.name} holds other fragments than {MANIFEST} lists")
        return opened


def _index(file: Any, path: Path) -> tuple[tuple[str, ...], tuple[Fragment, ...]]:
    """Return kinds and fragments of an opened rank file, checked against its tensors."""
    try:
        index = json.loads((file.metadata() or {})[_FRAGMENTS])
        fragments = tuple(Fragment.from_json(entry) for entry in index)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path.name} has no readable index of its tensors ({error!r})") from error
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    sizes = {name: math.prod(tensor.get_shape()) for name, tensor in slices.items() if tensor.get_dtype() == "F32"}
    kinds = KINDS if any(name.startswith(KINDS[1:]) for name in sizes) or not fragments else KINDS[:1]
    expected = {f"{kind}/{fragment.name}": fragment.numel for fragment in fragments for kind in kinds}
    # The two length checks catch tensors of another dtype and names that the index lists twice.
    if sizes != expected or len(slices) != len(sizes) or len(expected) != len(fragments) * len(kinds):
        raise CorruptCheckpoint(f"{path.name} holds other tensors than its index lists")
    return kinds, fragments
