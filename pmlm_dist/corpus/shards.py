"""The corpus on disk: WebDataset shards and the manifest that vouches for them.

    corpus/
      manifest.json  tokenizer.json  vocab.txt
      train/shard-000000.tar  ...                a tar member a sample: 000000000.u16, 000000001.u16, ...
      validation/shard-000000.tar  ...

A member holds a sample's token ids, little-endian, special tokens included and padding not: `[CLS] S1 [SEP] S2 [SEP]`,
so the second segment begins after the first [SEP]. Its name is the sample's number in its split. Any WebDataset reader
can read the shards; ours trusts nothing: size, sha256, names, types and bounds are checked before a sample is given.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from pmlm_dist.config import ConfigError

VERSION = 1
MANIFEST = "manifest.json"
TRAIN, VALIDATION = SPLITS = ("train", "validation")

TokenDtype = Literal["uint16", "uint32"]
EXTENSIONS: dict[TokenDtype, str] = {"uint16": "u16", "uint32": "u32"}

_BLOCK = 512
_READ_BYTES = 1 << 20
_REGULAR = (ord("0"), 0)
_WAY_OUT = "copy the shard anew, or remove the folder and run `pmlm prepare-corpus` again"


class ShardError(ValueError):
    """A shard is missing or is not what the manifest says."""

    exit_code = 1  # ExitCode.FAILED

    def __init__(self, message: str, *, shard: Shard | None = None, offset: int | None = None):
        super().__init__(message)
        self.shard = shard
        """Its entry in the manifest, where one shard is at fault."""
        self.offset = offset
        """Byte at which the file breaks, where that can be told."""


def token_dtype(vocabulary_size: int) -> TokenDtype:
    """The narrower type that holds every id."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


# ----------------------------------------------------------------------------------------------------------- manifest


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    """Path relative to the corpus folder."""
    samples: int
    """Number of samples."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Checksum of the file, hexadecimal."""


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    shards: tuple[Shard, ...]
    samples: int
    tokens: int
    """Stored ids: the content and three special tokens a sample."""


@dataclass(frozen=True)
class Manifest:
    """What a corpus folder holds."""

    sequence_length: int
    """Tokens of a full sample, special tokens included; no sample is longer."""
    token_dtype: TokenDtype
    vocabulary: Mapping[str, Any]
    """`size` and `fingerprint` of the vocabulary."""
    seed: int
    splits: Mapping[str, Split]
    """`train` and `validation`."""
    unigram_entropy: float
    """Nats: entropy of the training split's content tokens, the loss of the best guess that reads nothing."""
    counts: Mapping[str, Any]
    """Documents, characters, content tokens, and what was skipped by reason."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings it was prepared with."""
    version: int = VERSION

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `folder`/manifest.json. Raises ConfigError if it is missing, not JSON, or of another version."""
        path = Path(folder) / MANIFEST
        again = f"run `pmlm prepare-corpus --source 'texts/*.jsonl' --output {folder} --vocabulary-size 30522`"
        try:
            plain = json.loads(path.read_bytes())
            version = plain.get("version")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError([f"no corpus in {folder} ({path} is missing): {again}"]) from error
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ConfigError([f"{path} is not a manifest ({error}): remove {folder} and {again}"]) from error
        if version != VERSION:
            raise ConfigError(
                [f"{path} has version {version}, this program reads {VERSION}: remove {folder} and {again}"]
            )
        try:
            splits = {name: _split(split) for name, split in plain.pop("splits").items()}
            return cls(splits=splits, **plain)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ConfigError([f"{path} is not a whole manifest ({error}): remove {folder} and {again}"]) from error

    def save(self, folder: Path) -> None:
        """Write `folder`/manifest.json: under a temporary name, to the disk, then renamed."""
        path = Path(folder) / MANIFEST
        temporary = path.with_name(f".{MANIFEST}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as out:
            json.dump(dataclasses.asdict(self), out, indent=1, sort_keys=True)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)

    @property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of the canonical JSON without `settings`: equal corpora from other paths are equal."""
        plain = dataclasses.asdict(self)
        del plain["settings"]
        return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _split(plain: dict[str, Any]) -> Split:
    shards = tuple(Shard(**shard) for shard in plain["shards"])
    for shard in shards:
        _check_name(shard)
    return Split(shards=shards, samples=plain["samples"], tokens=plain["tokens"])


def _check_name(shard: Shard) -> None:
    """Refuse what would lead out of a folder or be an option: a manifest may come from an address, and both become
    paths, or arguments of a program."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", shard.name, flags=re.ASCII):
        raise ValueError(f"the name of a shard, {shard.name!r}, is no path below the corpus")
    if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"the sha256 of {shard.name}, {shard.sha256!r}, is none")


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ writing


def shard_name(split: str, number: int) -> str:
    """Name of a shard relative to the corpus folder."""
    return f"{split}/shard-{number:06d}.tar"


class _HashingFile(FileIO):
    """A file that takes the sha256 of what is written to it."""

    def __init__(self, path: Path):
        super().__init__(path, "wb")
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += super().write(view[written:]) or 0
        self.sha256.update(view)
        self.size += written
        return written


def write_shard(folder: Path, name: str, samples: Iterable[np.ndarray], *, first: int, dtype: TokenDtype) -> Shard:
    """Write the tar `folder`/`name`; `first` is the number of its first sample. Equal samples give equal bytes."""
    os.environ["WDS_SECURE"] = "1"  # read when webdataset is imported: no shell commands as addresses
    import webdataset.writer

    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with _HashingFile(path) as file:
        with webdataset.writer.TarWriter(file, user="pmlm", group="pmlm", mtime=0, encoder=False) as tar:
            for ids in samples:
                data = ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
                tar.write({"__key__": f"{first + count:09d}", EXTENSIONS[dtype]: data})
                count += 1
        os.fsync(file.fileno())
    return Shard(name=name, samples=count, bytes=file.size, sha256=file.sha256.hexdigest())


# ------------------------------------------------------------------------------------------------------------ reading


class ShardReader:
    """Random access to the samples of one verified shard: `len(reader)`, `reader[i]` -> ids, shape [tokens].

    The whole file is read once to check its sha256 and stays open. `folder` is the corpus folder; `file`: the shard,
    opened already, wherever it lies; `longest`: most tokens of a sample. Raises ShardError, naming file, expected and
    found, if anything differs from the manifest. Nothing is ever unpacked: a member is a range of bytes.
    """

    def __init__(
        self,
        folder: Path,
        shard: Shard,
        token_dtype: TokenDtype,
        *,
        file: FileIO | None = None,
        longest: int | None = None,
    ):
        self.path = Path(folder) / shard.name if file is None else Path(str(file.name))
        self._shard = shard
        self._dtype = np.dtype(token_dtype).newbyteorder("<")
        self._native = np.dtype(token_dtype)
        most = None if longest is None else longest * self._dtype.itemsize
        self._file = open_shard(self.path, shard) if file is None else file
        try:
            self._offsets, self._lengths = _verified(self._file, shard, extension=EXTENSIONS[token_dtype], most=most)
            _check_sizes(self.path, shard, self._offsets, self._lengths, item=self._dtype.itemsize)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has samples 0 to {len(self) - 1}, not {index}")
        offset, length = int(self._offsets[index]), int(self._lengths[index])
        # Not through a mapping: where a file was cut after it was opened, that would end the process (SIGBUS).
        data = _read_at(self._file, offset, length, shard=self._shard)
        return np.frombuffer(data, self._dtype).astype(self._native)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_shard(path: Path, shard: Shard) -> FileIO:
    """The file of a shard, for reading. Raises ShardError where it is missing or anything but a file (a pipe, ...)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
    except OSError as error:
        raise ShardError(f"shard {path} cannot be opened: {error.strerror}; {_WAY_OUT}", shard=shard) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ShardError(f"shard {path} is not a file; {_WAY_OUT}", shard=shard)
    file = FileIO(descriptor, "rb")
    file.name = str(path)  # pyright: ignore[reportAttributeAccessIssue]
    return file


def _verified(file: FileIO, shard: Shard, *, extension: str, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Check size, sha256 and members; offset and size in bytes of every member."""
    path, size = file.name, os.fstat(file.fileno()).st_size
    if size != shard.bytes:
        raise ShardError(
            f"shard {path}: expected {shard.bytes} bytes, found {size}; {_WAY_OUT}",
            shard=shard,
            offset=min(size, shard.bytes),
        )
    digest = hashlib.sha256()
    try:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    except OSError as error:
        message = f"shard {path} cannot be read at byte {file.tell()}: {error.strerror}; {_WAY_OUT}"
        raise ShardError(message, shard=shard, offset=file.tell()) from error
    if digest.hexdigest() != shard.sha256:
        offset = _break(file, shard, extension=extension, most=most)
        where = "inside its samples" if offset is None else f"at byte {offset} first"
        raise ShardError(
            f"shard {path}: expected sha256 {shard.sha256}, found {digest.hexdigest()}, damaged {where}; {_WAY_OUT}",
            shard=shard,
            offset=offset,
        )
    return _index(file, shard, extension=extension, most=most)


def _break(file: FileIO, shard: Shard, *, extension: str, most: int | None) -> int | None:
    """Where the members of a damaged shard stop to make sense, None if they do not."""
    try:
        _index(file, shard, extension=extension, most=most)
    except ShardError as error:
        return error.offset
    return None


def _read_at(file: FileIO, offset: int, length: int, *, shard: Shard) -> bytes:
    try:
        data = os.pread(file.fileno(), length, offset)
    except OSError as error:
        message = f"shard {file.name} cannot be read at byte {offset}: {error.strerror}; {_WAY_OUT}"
        raise ShardError(message, shard=shard, offset=offset) from error
    if len(data) != length:
        message = f"shard {file.name} was cut while it was read, at byte {offset + len(data)}; {_WAY_OUT}"
        raise ShardError(message, shard=shard, offset=offset + len(data))
    return data


def misplaced(folder: Path, manifest: Manifest, *, most: int = 5) -> list[str]:
    """Which shards are missing or have another size than the manifest says, one sentence each, `most` at most.

    Looks at names and sizes only: what a run can check at its start. Checksums are checked when a shard is opened.
    """
    found = []
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        path = folder / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            seen = "is missing" if size is None else f"has {size} bytes, expected {shard.bytes}"
            found.append(f"shard {path} {seen}; {_WAY_OUT}")
    rest = [f"and {len(found) - most} more shards like these"] if len(found) > most else []
    return found[:most] + rest


def _index(file: FileIO, shard: Shard, *, extension: str, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Offset and size in bytes of every member of a plain tar whose members are samples in order and nothing else."""
    pattern = re.compile(rb"(\d{9})\." + extension.encode())
    offsets, sizes = [], []
    first, at, end = None, 0, shard.bytes
    while at + _BLOCK <= end:
        header = _read_at(file, at, _BLOCK, shard=shard)
        if not header[0]:
            break
        name, folder, size = header[:100].rstrip(b"\0"), header[345:500].rstrip(b"\0"), _octal(header[124:136])
        match = pattern.fullmatch(name)
        wrong = None
        if not match or folder or header[156] not in _REGULAR or size is None:
            wrong = f"expected a sample NNNNNNNNN.{extension}, found {folder + b'/' + name if folder else name!r}"
        elif int(match[1]) != (first := int(match[1]) if first is None else first) + len(offsets):
            wrong = f"expected sample {first + len(offsets)}, found {name!r}"
        elif at + _BLOCK + size > end:
            wrong = f"sample {name!r} of {size} bytes reaches past the end"
        elif most is not None and size > most:
            wrong = f"sample {name!r} has {size} bytes, the corpus' sequence length allows {most}"
        if wrong or size is None:
            raise ShardError(f"shard {file.name}: {wrong}, at byte {at}; {_WAY_OUT}", shard=shard, offset=at)
        offsets.append(at + _BLOCK)
        sizes.append(size)
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK
    if len(offsets) != shard.samples:
        message = f"shard {file.name}: expected {shard.samples} samples, found {len(offsets)}; {_WAY_OUT}"
        raise ShardError(message, shard=shard, offset=at)
    return np.array(offsets, np.int64), np.array(sizes, np.int64)


def _octal(digits: bytes) -> int | None:
    text = digits.strip(b" \0")
    return int(text, 8) if re.fullmatch(rb"[0-7]+", text) else None


def _check_sizes(path: Path, shard: Shard, offsets: np.ndarray, lengths: np.ndarray, *, item: int) -> None:
    wrong = np.flatnonzero((lengths % item != 0) | (lengths == 0))
    if len(wrong):
        raise ShardError(
            f"shard {path}: expected a multiple of {item} bytes in every sample, found {lengths[wrong[0]]} bytes in "
            f"the sample at position {wrong[0]}; {_WAY_OUT}",
            shard=shard,
            offset=int(offsets[wrong[0]]),
        )
