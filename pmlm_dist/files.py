"""Atomic file writes: a reader sees the old contents or the new, never a part. Standard library only.

write_atomically(path, data)    PATH.tmp-XXXXXXXX  --write, fsync-->  rename to PATH  --fsync of the folder-->

A process that is killed leaves at most a `.tmp-` file beside the old contents.
"""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pmlm_dist.config import ConfigError


def write_atomically(path: Path, data: str | bytes, *, durable: bool = True, replace: bool = True) -> None:
    """Replace the contents of the file `path` by `data` (text as UTF-8).

    `durable`: contents and name are on the disk on return and survive a power failure. On OSError `path` is unchanged
    and no temporary file is left. `replace` as for `open_atomically`.
    """
    with open_atomically(path, durable=durable, replace=replace) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def open_atomically(path: Path, *, durable: bool = True, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` when the block ends, and is removed when the block raises.

    `durable` as for `write_atomically`. Without `replace` an existing file raises FileExistsError: of several processes
    one succeeds. Its file is empty for an instant, since not every file system has hard links.
    """
    # A random name: process ids repeat on the nodes that share a folder.
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if not replace:
            path.touch(exist_ok=False)  # fails for an existing file, without a race
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # `write` names no file
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_folder(path.parent)


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Name `path` in every error of writing: `write` names no file, a temporary file means nothing to a user."""
    try:
        yield
    except Exception as error:
        error.filename = str(path)  # pyright: ignore[reportAttributeAccessIssue] (also of libraries that are not Python)
        raise


def raise_if_foreign(path: Path, *, mark: bytes) -> None:
    """Raise ConfigError if the file `path` exists and does not begin like a result of the same command.

    `mark`: bytes in the first 4 KiB of such a result.
    """
    if path.exists() and not (path.is_file() and mark in path.read_bytes()[:4096]):
        raise ConfigError([f"{path} exists, and this command has not written it: name another file, or move it"])


def json_line(value: Any) -> bytes:
    """Return `value` as one line of JSON in UTF-8; half of a surrogate pair is written as the escape that it was.

    Raises TypeError, ValueError or RecursionError for what is no JSON value, or is nested too deeply.
    """
    # UTF-8 cannot encode surrogates, which occur inside strings only; their replacement is JSON's escape.
    return f"{json.dumps(value, ensure_ascii=False)}\n".encode(errors="backslashreplace")


def fsync_folder(folder: Path) -> None:
    """Flush the file names of `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
