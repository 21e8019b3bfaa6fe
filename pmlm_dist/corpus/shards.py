"""The corpus on disk: WebDataset shards, and the manifest with their sizes and checksums.

    corpus/
      manifest.json  tokenizer.json  vocab.txt  tokenizer_config.json
      train/shard-000000.tar  ...                one tar member per sample: 000000000.u16, 000000001.u16, ...
      validation/shard-000000.tar  ...

A member holds the token ids of a sample, little-endian, with special tokens and without padding: `[CLS] S1 [SEP] S2
[SEP]`. The second segment begins after the first [SEP]. The name is the number of the sample in its split. Any
WebDataset reader can read the shards. `ShardReader` checks size, sha256, names, types and bounds before the first read.
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
from typing import Any, BinaryIO, Literal, cast

import numpy as np

from pmlm_dist.config import ConfigError
from pmlm_dist.files import open_atomically, write_atomically
from pmlm_dist.json_input import InvalidJson, parse_json

VERSION = 2
MANIFEST = "manifest.json"
TRAIN, VALIDATION = SPLITS = ("train", "validation")
IN_BOTH_SPLITS = "long document with parts in both splits"
"""Count of the manifest, among the changed documents."""

TokenDtype = Literal["uint16", "uint32"]
EXTENSIONS: dict[TokenDtype, str] = {"uint16": "u16", "uint32": "u32"}

_BLOCK = 512

_REGULAR = (ord("0"), 0)
_REMEDY = "copy the shard again, or remove the folder and run `pmlm prepare-corpus` again"


class ShardError(ValueError):
    """A shard is missing or does not match the manifest."""

    exit_code = 1  # ExitCode.FAILED

    def __init__(self, message: str, *, shard: Shard | None = None, offset: int | None = None):
        super().__init__(message)
        self.shard = shard
        """Manifest entry of the shard, if the error is about one shard."""
        self.offset = offset
        """First corrupt byte of the file, if known."""


def token_dtype(vocabulary_size: int) -> TokenDtype:
    """Return the narrowest type that holds every id."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


# ----------------------------------------------------------------------------------------------------------- manifest


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    """Path relative to the corpus folder."""
    samples: int
    bytes: int
    sha256: str
    """Of the file, hexadecimal."""


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    shards: tuple[Shard, ...]
    samples: int
    tokens: int
    """Stored ids: content tokens, and three special tokens per sample."""


@dataclass(frozen=True)
class Manifest:
    """Contents of a corpus folder."""

    sequence_length: int
    """Maximum tokens of a sample, special tokens included."""
    token_dtype: TokenDtype
    vocabulary: Mapping[str, Any]
    """`size` and `fingerprint` of the vocabulary."""
    seed: int
    splits: Mapping[str, Split]
    """`train` and `validation`."""
    token_counts: str
    """Number of times that each token id is a content token of the training split, `0 0 0 0 0 81233 ...`."""
    counts: Mapping[str, Any]
    """Documents, characters, content tokens, [UNK] among them, and skipped records by reason."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `folder`/manifest.json. Raises ConfigError if it is missing, not JSON, or of another version."""
        path = Path(folder) / MANIFEST
        remedy = f"run `pmlm prepare-corpus --source 'texts/*.jsonl' --output {folder} --vocabulary-size 30522`"
        try:
            plain = parse_json(path.read_bytes())
            version = plain.get("version")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError([f"no corpus in {folder} ({path} is missing): {remedy}"]) from error
        except (InvalidJson, AttributeError) as error:
            raise ConfigError([f"{path} is not a manifest ({error}): remove {folder} and {remedy}"]) from error
        if version != VERSION:
            found = f"version {version}, this program reads {VERSION}"
            raise ConfigError([f"{path} has {found}: remove {folder} and {remedy}"])
        try:
            splits = {name: _split(split) for name, split in plain.pop("splits").items()}
            manifest = cls(splits=splits, **plain)
            tokens, counted = int(manifest.vocabulary["size"]), len(manifest.unigram_counts)
            if counted != tokens:
                raise ValueError(f"it has {tokens} tokens, and token_counts of {counted}")
            return manifest
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ConfigError([f"{path} is not a complete manifest ({error}): remove {folder} and {remedy}"]) from error

    def save(self, folder: Path) -> None:
        """Write `folder`/manifest.json, atomically and durably."""
        text = json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)
        write_atomically(Path(folder) / MANIFEST, f"{text}\n")

    @property
    def unigram_counts(self) -> np.ndarray:
        """`token_counts` as numbers, int64 [vocabulary size]."""
        return np.array(self.token_counts.split(), dtype=np.int64)

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the content tokens of the training split, in nats: the least loss of a model without context."""
        counts = self.unigram_counts
        shares = counts[counts > 0] / max(1, counts.sum())
        return float(-(shares * np.log(shares)).sum())

    @property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of the canonical JSON without `settings`, which contain paths."""
        plain = dataclasses.asdict(self)
        del plain["settings"]
        return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _split(plain: dict[str, Any]) -> Split:
    shards = tuple(Shard(**shard) for shard in plain["shards"])
    for shard in shards:
        _check_name(shard)
    return Split(shards=shards, samples=plain["samples"], tokens=plain["tokens"])


def _check_name(shard: Shard) -> None:
    """Raise ValueError for a name outside the corpus.

    A manifest can come from a URL. Names and checksums become paths, and arguments of a program.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", shard.name, flags=re.ASCII):
        raise ValueError(f"the name of a shard, {shard.name!r}, is not a path below the corpus")
    if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"the sha256 of {shard.name}, {shard.sha256!r}, is not a sha256")


# ------------------------------------------------------------------------------------------------------------ writing


def shard_name(split: str, number: int) -> str:
    """Return the path of a shard relative to the corpus folder."""
    return f"{split}/shard-{number:06d}.tar"


class _HashingWriter:
    """Pass writes on to `file`; compute their sha256 and size."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


def write_shard(folder: Path, name: str, samples: Iterable[np.ndarray], *, first: int, dtype: TokenDtype) -> Shard:
    """Write the tar `folder`/`name` atomically; `first`: number of its first sample. Equal samples give equal bytes."""
    os.environ["WDS_SECURE"] = "1"  # webdataset reads it on import: it then runs no shell commands from URLs
    import webdataset.writer

    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with open_atomically(path) as file:
        writer = _HashingWriter(file)
        output = cast(BinaryIO, writer)  # the tar stream only writes
        with webdataset.writer.TarWriter(output, user="pmlm", group="pmlm", mtime=0, encoder=False) as tar:
            for ids in samples:
                data = ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
                tar.write({"__key__": f"{first + count:09d}", EXTENSIONS[dtype]: data})
                count += 1
    return Shard(name=name, samples=count, bytes=writer.size, sha256=writer.sha256.hexdigest())


# ------------------------------------------------------------------------------------------------------------ reading


class ShardReader:
    """Random access to the samples of one verified shard: `len(reader)`, `reader[i]` -> ids, shape [tokens].

    The whole file is read once to check its sha256, and stays open. `folder`: the corpus folder. `file`: the open
    shard, if it is elsewhere. `longest`: maximum tokens of a sample. Raises ShardError, with file, expected and actual
    value, for any difference from the manifest. No member is extracted: a member is a range of bytes.
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
        # Not memory-mapped: if the file is truncated while it is open, a mapped read kills the process (SIGBUS).
        data = _read_at(self._file, offset, length, shard=self._shard)
        return np.frombuffer(data, self._dtype).astype(self._native)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_shard(path: Path, shard: Shard) -> FileIO:
    """Open the file of a shard for reading. Raises ShardError if it is missing or not a regular file (a pipe, ...)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would block
    except OSError as error:
        raise _shard_error(path, shard, f" cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _shard_error(path, shard, " is not a file")
    file = FileIO(descriptor, "rb")
    file.name = str(path)  # pyright: ignore[reportAttributeAccessIssue]
    return file


def _shard_error(path: object, shard: Shard, problem: str, *, offset: int | None = None) -> ShardError:
    return ShardError(f"shard {path}{problem}; {_REMEDY}", shard=shard, offset=offset)


def _verified(file: FileIO, shard: Shard, *, extension: str, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Check size, sha256 and members; return offset and size in bytes of every member, each [samples]."""
    path, size = file.name, os.fstat(file.fileno()).st_size
    if size != shard.bytes:
        offset = min(size, shard.bytes)
        raise _shard_error(path, shard, f": expected {shard.bytes} bytes, found {size}", offset=offset)
    try:
        sha256 = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(file, shard, file.tell(), error) from error
    if sha256 != shard.sha256:
        offset = None  # of the first invalid member
        try:
            _index(file, shard, extension=extension, most=most)
        except ShardError as error:
            offset = error.offset
        where = "inside its samples" if offset is None else f"at byte {offset} first"
        problem = f": expected sha256 {shard.sha256}, found {sha256}, corrupt {where}"
        raise _shard_error(path, shard, problem, offset=offset)
    return _index(file, shard, extension=extension, most=most)


def _unreadable(file: FileIO, shard: Shard, offset: int, error: OSError) -> ShardError:
    return _shard_error(file.name, shard, f" cannot be read at byte {offset}: {error.strerror}", offset=offset)


def _read_at(file: FileIO, offset: int, length: int, *, shard: Shard) -> bytes:
    try:
        data = os.pread(file.fileno(), length, offset)
    except OSError as error:
        raise _unreadable(file, shard, offset, error) from error
    end = offset + len(data)
    if len(data) != length:
        raise _shard_error(file.name, shard, f" was truncated while it was read, at byte {end}", offset=end)
    return data


def misplaced(folder: Path, manifest: Manifest, *, most: int = 5) -> list[str]:
    """Return one sentence for each shard that is missing or has another size than in the manifest, at most `most`.

    For the start of a run: names and sizes only. `ShardReader` verifies checksums when it opens a shard.
    """
    problems = []
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        path = folder / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            state = "is missing" if size is None else f"has {size} bytes, expected {shard.bytes}"
            problems.append(f"shard {path} {state}; {_REMEDY}")
    rest = [f"and {len(problems) - most} more shards like these"] if len(problems) > most else []
    return problems[:most] + rest


def _index(file: FileIO, shard: Shard, *, extension: str, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return offset and size in bytes of every member, each [samples]; the members must be samples in order."""
    pattern = re.compile(rb"(\d{9})\." + extension.encode())
    offsets, sizes = [], []
    first, offset, end = None, 0, shard.bytes
    while offset + _BLOCK <= end:
        header = _read_at(file, offset, _BLOCK, shard=shard)
        if not header[0]:
            break
        name, folder, size = header[:100].rstrip(b"\0"), header[345:500].rstrip(b"\0"), _octal(header[124:136])
        match = pattern.fullmatch(name)
        problem = None
        if not match or folder or header[156] not in _REGULAR or size is None:
            problem = f"expected a sample NNNNNNNNN.{extension}, found {folder + b'/' + name if folder else name!r}"
        elif int(match[1]) != (first := int(match[1]) if first is None else first) + len(offsets):
            problem = f"expected sample {first + len(offsets)}, found {name!r}"
        elif offset + _BLOCK + size > end:
            problem = f"sample {name!r} of {size} bytes reaches past the end"
        elif most is not None and size > most:
            problem = f"sample {name!r} has {size} bytes, the sequence length of the corpus allows {most}"
        if problem or size is None:
            raise _shard_error(file.name, shard, f": {problem}, at byte {offset}", offset=offset)
        offsets.append(offset + _BLOCK)
        sizes.append(size)
        offset += _BLOCK + -(-size // _BLOCK) * _BLOCK
    if len(offsets) != shard.samples:
        problem = f": expected {shard.samples} samples, found {len(offsets)}"
        raise _shard_error(file.name, shard, problem, offset=offset)
    return np.array(offsets, np.int64), np.array(sizes, np.int64)


def _octal(digits: bytes) -> int | None:
    text = digits.strip(b" \0")
    return int(text, 8) if re.fullmatch(rb"[0-7]+", text) else None


def _check_sizes(path: Path, shard: Shard, offsets: np.ndarray, lengths: np.ndarray, *, item: int) -> None:
    invalid = np.flatnonzero((lengths % item != 0) | (lengths == 0))
    if len(invalid):
        first = invalid[0]
        problem = (
            f": expected a multiple of {item} bytes in every sample, found {lengths[first]} bytes in the sample at "
            f"position {first}"
        )
        raise _shard_error(path, shard, problem, offset=int(offsets[first]))
