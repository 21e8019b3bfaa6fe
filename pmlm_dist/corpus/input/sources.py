"""Where text comes from: local files, addresses that fsspec reads, data sets of Hugging Face's `datasets`.

    texts/*.jsonl                                   files and globs of this machine
    https://host/a.jsonl.gz  s3://bucket/*.parquet  gs://...  memory://...    through fsspec
    datasets://wikimedia/wikipedia?config=20231101.en&split=train             a data set by name, or a local folder

Only this module opens anything. Credentials and options of a file system come from its own settings (for S3 those of
boto, for any of them `FSSPEC_<PROTOCOL>_<OPTION>` in the environment). A data set is downloaded by `datasets` into its
cache, which ranks on other nodes must see too, or fill for themselves.
"""

from __future__ import annotations

import glob
import io
import os
import sys
import tempfile
import urllib.parse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from pmlm_dist.config import ConfigError, raise_if_any

DATASETS = "datasets://"
_KINDS = "use .txt, .jsonl (also .gz, .zst) or .parquet"
_READ_BYTES = 1 << 20
_SUFFIXES = ("txt", "jsonl")
_EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs"}


@dataclass(frozen=True)
class SourceFile:
    """One file or data set."""

    name: str
    """Path or address."""
    size: int
    """Bytes; of a data set those of its text in memory."""
    stamp: str
    """Differs after the content has changed: time of the last change, or what the server says in its place."""
    seekable: bool = True
    """Whether it can be read from the middle: a web server that sends no ranges gives whole files only."""

    @property
    def kind(self) -> tuple[str, str]:
        """Format (`txt`, `jsonl`, `parquet`, `dataset`) and compression (`none`, `gz`, `zst`); ("", "") if unknown."""
        return _kind(self.name)


def find_files(patterns: Iterable[str]) -> list[SourceFile]:
    """What `patterns` name, sorted by name, each once. Raises ConfigError for every pattern and file of no use."""
    found: dict[str, SourceFile] = {}
    problems: list[str] = []
    for pattern in patterns:
        try:
            matches = _matches(pattern)
        except ConfigError as error:
            problems += error.problems
            continue
        if not matches:
            problems.append(f"source {pattern!r} matches no file: give files or a quoted glob such as 'texts/*.jsonl'")
        for file in matches:
            found.setdefault(file.name if is_address(file.name) else str(Path(file.name).resolve()), file)
    files = sorted(found.values(), key=_order)
    problems += [f"source {file.name}: unknown kind of file: {_KINDS}" for file in files if not file.kind[0]]
    raise_if_any(problems)
    return files


def _order(file: SourceFile) -> tuple[bool, Any]:
    """Files of this machine by path, then addresses."""
    remote = is_address(file.name)
    return remote, file.name if remote else Path(file.name)


def is_address(name: str) -> bool:
    """Whether `name` is no path of this machine."""
    return "://" in name


def local_file(path: Path | str) -> SourceFile:
    """A file of this machine."""
    found = os.stat(path)
    return SourceFile(str(path), found.st_size, str(found.st_mtime_ns))


def open_source(name: str) -> BinaryIO:
    """The bytes of a file, for reading, at any place; errors while it is open are for `read_errors_named`.

    What a web server gives as a whole only is fetched into a temporary file first.
    """
    if not is_address(name):
        return Path(name).open("rb")
    with read_errors_named(name):
        system, path = _file_system(name)
        if not _seekable(name):
            whole = tempfile.TemporaryFile()  # noqa: SIM115 (closed by whoever reads it)
            system.get_file(path, whole)
            whole.seek(0)
            return cast(BinaryIO, whole)
        return cast(BinaryIO, io.BufferedReader(system.open(path, "rb"), _READ_BYTES))


@contextmanager
def read_errors_named(name: str) -> Iterator[None]:
    """Turn what a disk or a network raises while `name` is read into an error that names it."""
    try:
        yield
    except _network_errors() as error:
        message = f"{type(error).__name__}: {error}"
        raise ConfigError([f"source {name} cannot be read ({message}): check the address and run again"]) from error


def _network_errors() -> tuple[type[Exception], ...]:
    """`OSError`, and aiohttp's own where fsspec has loaded it."""
    aiohttp: Any = sys.modules.get("aiohttp")
    return (OSError,) if aiohttp is None else (OSError, aiohttp.ClientError)


def _kind(name: str) -> tuple[str, str]:
    if name.startswith(DATASETS):
        return "dataset", "none"
    parts = Path(urllib.parse.urlsplit(name).path if is_address(name) else name).name.split(".")
    compression = parts.pop() if len(parts) > 2 and parts[-1] in ("gz", "zst") else "none"
    kind = parts[-1] if len(parts) > 1 else ""
    known = kind in _SUFFIXES or (kind == "parquet" and compression == "none")
    return (kind, compression) if known else ("", "")


def _matches(pattern: str) -> list[SourceFile]:
    if pattern.startswith("pipe:"):
        raise ConfigError([f"source {pattern!r}: a source is no program: write its output to a file"])
    if pattern.startswith(DATASETS):
        return [_dataset_file(pattern)]
    if is_address(pattern):
        return _remote_files(pattern)
    names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    return [local_file(name) for name in names if Path(name).is_file()]


# ------------------------------------------------------------------------------------------------------------- fsspec


def _file_system(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it."""
    protocol = address.partition("://")[0]
    try:
        import fsspec.core

        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        extra = _EXTRAS.get(protocol, "http")
        raise ConfigError([f"source {address}: {protocol}:// needs more: pip install 'pmlm_dist[{extra}]'"]) from error
    except ValueError as error:
        raise ConfigError([f"source {address}: {error}: use http, https, s3, gs or another of fsspec's"]) from error


def _remote_files(pattern: str) -> list[SourceFile]:
    try:
        with read_errors_named(pattern):
            system, path = _file_system(pattern)
            paths = sorted(system.glob(path)) if any(sign in path for sign in "*[") else [path]
            infos = [system.info(path) for path in paths]
    except ConfigError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    return [_remote_file(system, info) for info in infos if info["type"] == "file"]


@lru_cache(maxsize=1 << 16)
def _seekable(address: str) -> bool:
    """Whether a file is given in parts: of the web servers those that send the last byte alone."""
    system, path = _file_system(address)
    if "http" not in system.protocol:
        return True
    size = system.info(path)["size"]
    if not size or size == 1:
        return False
    try:
        with system.open(path, "rb") as file:
            file.seek(size - 1)
            return len(file.read(1)) == 1
    except ValueError:  # it would have sent the file from its beginning
        return False


def _remote_file(system: Any, info: dict[str, Any]) -> SourceFile:
    name = system.unstrip_protocol(info["name"])
    stamps = (info.get(key) for key in ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime", "created"))
    return SourceFile(
        name,
        info["size"] or 0,
        stamp=str(next((stamp for stamp in stamps if stamp), "")),
        seekable=_seekable(name),
    )


# ----------------------------------------------------------------------------------------------------------- datasets


def _dataset_file(address: str) -> SourceFile:
    data = open_dataset(address)
    return SourceFile(address, int(data.data.nbytes), f"{data.num_rows} rows, {data._fingerprint}")


@lru_cache(maxsize=4)
def open_dataset(address: str) -> Any:
    """The `datasets.Dataset` of datasets://NAME?config=C&split=S&revision=R. Raises ConfigError if it cannot be had.

    NAME is one on the hub, a folder of data files, or a folder that `save_to_disk` wrote. The split is `train` unless
    another is named.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ConfigError([f"source {address} needs more: pip install 'pmlm_dist[datasets]'"]) from error
    name, options = _dataset_address(address)
    folder = Path(name)
    try:
        if any((folder / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            data = datasets.load_from_disk(name)
            data = data[options["split"]] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(
                name, options.get("config"), split=options["split"], revision=options.get("revision")
            )
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise ConfigError([f"source {address}: {type(error).__name__}: {error}; check name, config, split"]) from error
    return data


def _dataset_address(address: str) -> tuple[str, dict[str, str]]:
    parts = urllib.parse.urlsplit(address)
    options = dict(urllib.parse.parse_qsl(parts.query))
    unknown = sorted(set(options) - {"config", "split", "revision"})
    raise_if_any([f"source {address} has an unknown option {name!r}: use config, split, revision" for name in unknown])
    return parts.netloc + parts.path, {"split": "train", **options}
