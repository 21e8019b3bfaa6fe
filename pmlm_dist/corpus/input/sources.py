"""Sources of text: local files, URLs that fsspec reads, and data sets of Hugging Face's `datasets`.

    texts/*.jsonl                                   local files and globs
    https://host/a.jsonl.gz  s3://bucket/*.parquet  gs://...  memory://...    through fsspec
    datasets://wikimedia/wikipedia?config=20231101.en&split=train             a data set by name, or a local folder

Only this module opens source files. Credentials and options of a file system come from its own settings: those of boto
for S3, or `FSSPEC_<PROTOCOL>_<OPTION>` in the environment for any of them. `datasets` downloads a data set into its
cache. Ranks on other nodes need access to this cache, or fill their own.
"""

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
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
_SUPPORTED_FILES = "use .txt, .jsonl (also .gz, .bz2, .xz, .zst) or .parquet"
_BUFFER_BYTES = 1 << 20
_SUFFIXES = ("txt", "jsonl")
_EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs"}


@dataclass(frozen=True)
class SourceFile:
    """One file or data set."""

    name: str
    """Path or URL."""
    size: int
    """Bytes; for a data set the bytes of its text in memory."""
    version: str
    """Differs after a change of the content: modification time, or the server's ETag or equivalent."""
    seekable: bool = True
    """Whether it can be read from any offset; a web server without range requests sends whole files only."""

    @property
    def kind(self) -> tuple[str, str]:
        """Format (`txt`, `jsonl`, `parquet`, `dataset`) and compression; ("", "") if unknown."""
        if self.name.startswith(DATASETS):
            return "dataset", "none"
        path = Path(urllib.parse.urlsplit(self.name).path if is_url(self.name) else self.name)
        parts = path.name.split(".")
        compression = parts.pop() if len(parts) > 2 and parts[-1] in COMPRESSIONS else "none"
        kind = parts[-1] if len(parts) > 1 else ""
        is_supported = kind in _SUFFIXES or (kind == "parquet" and compression == "none")
        return (kind, compression) if is_supported else ("", "")


def find_files(patterns: Iterable[str]) -> list[SourceFile]:
    """Return the distinct files that match `patterns`, sorted by name.

    Raises ConfigError with every pattern without a match and every unsupported file.
    """
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
            found.setdefault(file.name if is_url(file.name) else str(Path(file.name).resolve()), file)
    files = sorted(found.values(), key=_sort_key)
    problems += [f"source {file.name}: unknown kind of file: {_SUPPORTED_FILES}" for file in files if not file.kind[0]]
    raise_if_any(problems)
    return files


def _sort_key(file: SourceFile) -> tuple[bool, Any]:
    """Local files by path, then URLs."""
    is_remote = is_url(file.name)
    return is_remote, file.name if is_remote else Path(file.name)


def is_url(name: str) -> bool:
    """Return False for a local path."""
    return "://" in name


def local_file(path: Path | str) -> SourceFile:
    """Describe a local file."""
    status = os.stat(path)
    return SourceFile(str(path), status.st_size, str(status.st_mtime_ns))


def open_source(name: str) -> BinaryIO:
    """Open a file for seekable reading. Wrap the reads in `convert_read_errors`.

    A file of a web server without range requests is first downloaded into a temporary file.
    """
    if not is_url(name):
        return Path(name).open("rb")
    with convert_read_errors(name):
        system, path = _file_system(name)
        if not _is_seekable(name):
            download = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
            system.get_file(path, download)
            download.seek(0)
            return cast(BinaryIO, download)
        return cast(BinaryIO, io.BufferedReader(system.open(path, "rb"), _BUFFER_BYTES))


@contextmanager
def convert_read_errors(name: str) -> Iterator[None]:
    """Raise errors of disks and networks as a ConfigError with the name of the source."""
    try:
        yield
    except _read_errors() as error:
        message = f"{type(error).__name__}: {error}"
        raise ConfigError([f"source {name} cannot be read ({message}): check the URL and run again"]) from error


def _read_errors() -> tuple[type[Exception], ...]:
    """`OSError`, and aiohttp's own class if fsspec has loaded it: it is not a subclass of OSError."""
    aiohttp: Any = sys.modules.get("aiohttp")
    return (OSError,) if aiohttp is None else (OSError, aiohttp.ClientError)


def _matches(pattern: str) -> list[SourceFile]:
    if pattern.startswith("pipe:"):
        raise ConfigError([f"source {pattern!r}: a source cannot be a program: write its output to a file"])
    if pattern.startswith(DATASETS):
        data = open_dataset(pattern)
        return [SourceFile(pattern, int(data.data.nbytes), f"{data.num_rows} rows, {data._fingerprint}")]
    if is_url(pattern):
        return _remote_files(pattern)
    names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    return [local_file(name) for name in names if Path(name).is_file()]


# ------------------------------------------------------------------------------------------------------------- fsspec


def _file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it."""
    protocol = url.partition("://")[0]
    try:
        import fsspec.core

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(protocol, "http")
        raise ConfigError([f"source {url}: {protocol}:// needs more: pip install 'pmlm_dist[{extra}]'"]) from error
    except ValueError as error:
        raise ConfigError([f"source {url}: {error}: use http, https, s3, gs or another protocol of fsspec"]) from error


def _remote_files(pattern: str) -> list[SourceFile]:
    try:
        with convert_read_errors(pattern):
            system, path = _file_system(pattern)
            paths = sorted(system.glob(path)) if any(sign in path for sign in "*[") else [path]
            infos = [system.info(path) for path in paths]
    except ConfigError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    return [_remote_file(system, info) for info in infos if info["type"] == "file"]


@lru_cache(maxsize=1 << 16)
def _is_seekable(url: str) -> bool:
    """Whether ranges of a file can be read. For a web server: whether it sends the last byte alone."""
    system, path = _file_system(url)
    if "http" not in system.protocol:
        return True
    size = system.info(path)["size"]
    if not size or size == 1:
        return False
    try:
        with system.open(path, "rb") as file:
            file.seek(size - 1)
            return len(file.read(1)) == 1
    except ValueError:  # fsspec: the server ignores the range and sends the file from its beginning
        return False


def _remote_file(system: Any, info: dict[str, Any]) -> SourceFile:
    name = system.unstrip_protocol(info["name"])
    keys = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime", "created")
    version = next((info[key] for key in keys if info.get(key)), "")
    return SourceFile(name, info["size"] or 0, str(version), _is_seekable(name))


# ----------------------------------------------------------------------------------------------------------- datasets


@lru_cache(maxsize=4)
def open_dataset(url: str) -> Any:
    """Return the `datasets.Dataset` of datasets://NAME?config=C&split=S&revision=R. Raises ConfigError on failure.

    NAME: name on the hub, folder of data files, or folder written by `save_to_disk`. The default split is `train`.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ConfigError([f"source {url} needs more: pip install 'pmlm_dist[datasets]'"]) from error
    name, options = _parse_dataset_url(url)
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
        raise ConfigError([f"source {url}: {type(error).__name__}: {error}; check name, config, split"]) from error
    return data


def _parse_dataset_url(url: str) -> tuple[str, dict[str, str]]:
    parts = urllib.parse.urlsplit(url)
    options = dict(urllib.parse.parse_qsl(parts.query))
    unknown = sorted(set(options) - {"config", "split", "revision"})
    raise_if_any([f"source {url} has an unknown option {name!r}: use config, split, revision" for name in unknown])
    return parts.netloc + parts.path, {"split": "train", **options}
