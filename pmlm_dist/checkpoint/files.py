"""Files of one checkpoint: format, integrity checks, and reading of any part of any tensor.

    step-00000400/
        manifest.json              format version; sha256 and size of every other file
        state.json                 progress, identity and configuration of the run, counters, loss scale, fingerprint
        rank-00000.safetensors     fragments written by rank 0: fp32 weights and both Adam moments
        rank-00001.safetensors     ...

A rank file is plain safetensors with tensors `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`. Its metadata holds the
`Fragment` of each NAME: the place of its elements in the full tensor. Together the files hold every element of every
tensor exactly once. Imported weights have no moments: a run can start from them but not resume.

Nothing is unpickled, and nothing here needs torch.
"""

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
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from pmlm_dist.checkpoint.fragments import Fragment, coverage_problems, overlaps
from pmlm_dist.files import write_atomically

VERSION = 3
MANIFEST, STATE = "manifest.json", "state.json"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
BYTES_PER_NUMBER = 4
_FRAGMENTS = "fragments"
_STATE_FIELDS = ("step", "samples_consumed", "tokens_seen", "identity", "configuration")


class CorruptCheckpoint(ValueError):
    """A checkpoint that cannot be read; the message is one sentence."""


@dataclass(frozen=True)
class FileDigest:
    """Size and checksum of a file, as listed in the manifest."""

    bytes: int
    sha256: str


def rank_file(rank: int) -> str:
    """Name of the file that `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


# ------------------------------------------------------------------------------------------------------------ writing


def write_numbers(
    path: Path, fragments: Iterable[Fragment], chunks: Iterable[bytes | memoryview], *, kinds: tuple[str, ...] = KINDS
) -> FileDigest:
    """Write a rank file, flush it to the disk and read it back.

    `chunks`: little-endian fp32 bytes of `fragments` in order, for each fragment its `kinds` in order; chunk boundaries
    are arbitrary. Raises OSError when the disk rejects the bytes or returns different ones.
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
        # Drop the page cache, so that the checksum below reads the disk and not the memory just written.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if size != expected:
        raise ValueError(f"{path} got {size} bytes, its fragments need {expected}")
    written = FileDigest(bytes=size, sha256=digest.hexdigest())
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


def write_json(path: Path, value: dict[str, Any], *, durable: bool = True) -> FileDigest:
    """Write `value` atomically; `durable` as for `write_atomically`."""
    data = (json.dumps(value, indent=2) + "\n").encode()
    write_atomically(path, data, durable=durable)
    return FileDigest(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_manifest(folder: Path, files: dict[str, FileDigest]) -> None:
    """Write the manifest of `folder`, which lists `files` by name."""
    listed = {name: asdict(written) for name, written in sorted(files.items())}
    write_json(folder / MANIFEST, {"version": VERSION, "files": listed})


# ----------------------------------------------------------------------------------------------------------- checking


def checkpoint_problems(folder: Path, *, thorough: bool = True) -> list[str]:
    """Return what is wrong with a checkpoint, one sentence each; empty when it is valid.

    `thorough`: also compare checksums, which reads every byte.
    """
    try:
        listed = _read_manifest(folder)
    except CorruptCheckpoint as error:
        return [str(error)]
    problems = [
        problem
        for name, written in listed.items()
        for problem in _file_problems(folder / name, written, thorough=thorough)
    ]
    unknown = {path.name for path in folder.iterdir()} - {MANIFEST, *listed}
    problems += [f"{name} is not in the manifest" for name in sorted(unknown)]
    return problems or _content_problems(folder)


def _content_problems(folder: Path) -> list[str]:
    """Problems of the content, for a checkpoint whose files match their checksums."""
    try:
        read_state(folder)
        with CheckpointReader(folder) as reader:
            fragments = [fragment for _, fragment in reader.sources()]
    except CorruptCheckpoint as error:
        return [str(error)]
    return coverage_problems(fragments) or ([] if fragments else ["it holds no tensors"])


def _read_manifest(folder: Path) -> dict[str, FileDigest]:
    manifest = read_json(folder / MANIFEST)
    version = manifest.get("version")
    if version != VERSION:
        raise CorruptCheckpoint(
            f"{MANIFEST} is of format {version!r}, this program reads {VERSION}: use the one that wrote it"
        )
    try:
        files = {name: FileDigest(**listed) for name, listed in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:  # valid JSON of any other structure
        raise CorruptCheckpoint(f"{MANIFEST} cannot be read ({error!r})") from error
    if STATE not in files or rank_file(0) not in files:
        raise CorruptCheckpoint(f"{MANIFEST} does not list {STATE} and {rank_file(0)}")
    unexpected = [name for name in files if name != STATE and not _is_rank_file(name)]
    if unexpected:  # a name such as ../latest would make the checks read outside the folder
        raise CorruptCheckpoint(f"{MANIFEST} lists {unexpected[0]!r}, which is no file of a checkpoint")
    return files


def _is_rank_file(name: str) -> bool:
    digits = name.removeprefix("rank-").removesuffix(".safetensors")
    return digits.isdecimal() and name == rank_file(int(digits))


def _file_problems(path: Path, expected: FileDigest, *, thorough: bool) -> list[str]:
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

    A context manager. Raises `CorruptCheckpoint` when an index cannot be read.
    """

    def __init__(self, folder: Path):
        self._files = ExitStack()
        self._sources: dict[str, list[tuple[Any, Fragment]]] = {}
        for path in _rank_files(folder):
            file = self._files.enter_context(_open(path))
            for fragment in _indexed_fragments(file, path):
                self._sources.setdefault(fragment.name, []).append((file, fragment))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    @property
    def has_moments(self) -> bool:
        """Whether the checkpoint holds Adam's moments besides weights."""
        return all(f"{KINDS[1]}/{source.name}" in file.keys() for file, source in self.sources())  # noqa: SIM118

    def sources(self) -> Iterator[tuple[Any, Fragment]]:
        """Yield every fragment with the opened file that holds it."""
        return itertools.chain.from_iterable(self._sources.values())

    @property
    def tensors(self) -> dict[str, Fragment]:
        first = (sources[0][1] for sources in self._sources.values())
        return {
            part.name: Fragment.whole(part.name, part.shape, used_rows=part.used_rows, dim=part.dim) for part in first
        }

    def read(self, whole: Fragment, kind: str) -> np.ndarray:
        """Return a full tensor in its shape, fp32."""
        values = np.empty(whole.numel, np.float32)
        self.fill(values, whole, kind)
        return values.reshape(whole.shape)

    def fill(self, values: np.ndarray, fragment: Fragment, kind: str) -> None:
        """Write the elements of `fragment` into the fp32 array `values` [numel]; `kind` is one of `KINDS`.

        Padding rows that the checkpoint does not have stay unchanged.
        """
        for file, source in self._sources[fragment.name]:
            for part in overlaps(source, fragment):
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


def _rank_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_rank_file(path.name))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpoint(f"{path.name} cannot be read ({error})") from error


def _indexed_fragments(file: Any, path: Path) -> list[Fragment]:
    """Return the index of an opened rank file, checked against its tensors."""
    try:
        index = json.loads((file.metadata() or {})[_FRAGMENTS])
        fragments = [Fragment.from_json(entry) for entry in index]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path.name} has no readable index of its tensors ({error!r})") from error
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    sizes = {name: math.prod(tensor.get_shape()) for name, tensor in slices.items() if tensor.get_dtype() == "F32"}
    kinds = KINDS if any(name.startswith(KINDS[1:]) for name in sizes) else KINDS[:1]
    expected = {f"{kind}/{fragment.name}": fragment.numel for fragment in fragments for kind in kinds}
    # The two length checks catch tensors of another dtype and names that the index lists twice.
    if sizes != expected or len(slices) != len(sizes) or len(expected) != len(fragments) * len(kinds):
        raise CorruptCheckpoint(f"{path.name} holds other tensors than its index lists")
    return fragments


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `CorruptCheckpoint` for any other content."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: brackets nested a million deep
        raise CorruptCheckpoint(f"{path.name} cannot be read ({error!r})") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path.name} cannot be read (it holds no object)")
    return value
