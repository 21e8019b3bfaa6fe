"""Bytes from an address, given up after a time without any; what goes wrong is a `TransferError`.

    http(s):// s3:// gs:// file:// memory://    fsspec
    pipe:PROGRAM ARGUMENT ... {} ...            the standard output of a program, only with data.allow_pipe

A program is run by itself, never through a shell: the address is split into arguments as a shell would, then `{}` in
them becomes the name of the file, so that a name can add no argument. It reads nothing, is killed with its children
when it gives no byte for too long or more than is wanted, and fails unless its exit status is 0.
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import IO, Any

from pmlm_dist.config import ConfigError, raise_if_any

SCHEMES = ("http", "https", "s3", "gs", "file", "memory")
NAME_FIELD = "{}"
"""Where the name of a file goes in the arguments of a program."""
LARGEST_SMALL_FILE = 256 << 20
"""Bytes of a manifest or a vocabulary at most."""
_EXTRAS = {"s3": "s3", "gs": "gs"}
_PIPE = "pipe:"
_CHUNK = 1 << 20
_TOLD_BYTES = 500


class TransferError(OSError):
    """An address gives nothing, or stops amid a file."""


def address_of(corpus: object, *, allow_pipe: bool = False) -> str | None:
    """The address in `corpus`, None for a folder: `pathlib` folds the slashes of s3://bucket/x, here they come back.

    Raises ConfigError for an address that is not one of `SCHEMES`, above all `pipe:PROGRAM` unless `allow_pipe`.
    """
    match = re.fullmatch(r"([A-Za-z][\w+.-]+):(.*)", str(corpus), flags=re.DOTALL)
    if match is None:
        return None
    scheme, rest = match[1], match[2].lstrip("/")
    if scheme == "pipe" and allow_pipe:
        return _program_address(match[2])
    if scheme not in SCHEMES or "::" in rest:
        raise_if_any(
            [
                f"corpus {str(corpus)!r} must be a folder or an address of one of {', '.join(SCHEMES)}: commands are "
                "never run for an address, but for pipe:PROGRAM with --data.allow-pipe (a folder whose name has a "
                "colon is given by its full path)"
            ]
        )
    if "@" in rest.partition("/")[0]:
        raise_if_any(
            [
                f"corpus {scheme}://...@{rest.partition('/')[0].rpartition('@')[2]}: what is before the @ would be "
                "written into logs and checkpoints: give credentials by the environment (docs/security.md)"
            ]
        )
    return f"{scheme}:///{rest}" if scheme == "file" else f"{scheme}://{rest}"


def _program_address(command: str) -> str:
    command = re.sub(r"\b(https?|s3|gs):/+", r"\1://", command)
    try:
        arguments = shlex.split(command)
    except ValueError as error:
        raise ConfigError([f"corpus 'pipe:{command}' cannot be split into arguments ({error}): mend it"]) from error
    if not arguments or NAME_FIELD in arguments[0] or not any(NAME_FIELD in argument for argument in arguments):
        raise_if_any(
            [
                f"corpus 'pipe:{command}' must name a program that writes a file of the corpus to its standard output, "
                f"with {NAME_FIELD} where the file's name goes: 'pipe:aws s3 cp s3://bucket/corpus/{NAME_FIELD} -'"
            ]
        )
    return f"{_PIPE}{command}"


def url_of(address: str, name: str) -> str:
    """File `name` of the corpus at `address`, for people and for fsspec."""
    return address.replace(NAME_FIELD, name) if address.startswith(_PIPE) else f"{address}/{name}"


def read_whole(address: str, name: str, *, timeout_s: float) -> bytes:
    """The small file `name` of the corpus at `address`."""
    content = bytearray()
    with closing(chunks(address, name, size=None, timeout_s=timeout_s)) as stream:
        for chunk in stream:
            content += chunk
            if len(content) > LARGEST_SMALL_FILE:
                raise TransferError(f"{url_of(address, name)} has more than {LARGEST_SMALL_FILE} bytes")
    return bytes(content)


def chunks(address: str, name: str, *, size: int | None, timeout_s: float) -> Generator[bytes, None, None]:
    """The bytes of file `name` of the corpus at `address`, `size` of them if all is well and that is known.

    Close it to end the transfer.
    """
    url = url_of(address, name)
    if not address.startswith(_PIPE):
        return _fetched(url, size=size, timeout_s=timeout_s)
    arguments = [argument.replace(NAME_FIELD, name) for argument in shlex.split(address.removeprefix(_PIPE))]
    return _output(arguments, url, timeout_s=timeout_s)


# What filesystems raise has no common base; here it all becomes `TransferError`.
def _fetched(url: str, *, size: int | None, timeout_s: float) -> Generator[bytes, None, None]:
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url, **_options(url, timeout_s=timeout_s))
        # An http server is asked once, for the whole: not for its size first, nor for ranges that it may not know.
        as_stream = {"block_size": 0} if url.startswith("http") else {}
        as_stream |= {"size": size} if as_stream and size is not None else {}
        stream = filesystem.open(path, "rb", **as_stream)
    except ImportError as error:
        protocol = url.partition(":")[0]
        extra = _EXTRAS.get(protocol, "http")
        raise ConfigError([f"{url}: {protocol}:// needs more: pip install 'pmlm_dist[{extra}]'"]) from error
    except Exception as error:
        raise TransferError(f"{url} cannot be fetched: {_told(error)}") from error
    with stream:
        while True:
            try:
                chunk = stream.read(_CHUNK)
            except Exception as error:
                raise TransferError(f"{url} broke off: {_told(error)}") from error
            if not chunk:
                return
            yield chunk


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _options(url: str, *, timeout_s: float) -> dict[str, Any]:
    if not url.startswith("http"):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    return {"client_kwargs": {"timeout": timeout}}


# ------------------------------------------------------------------------------------------------------------ programs


def _output(arguments: list[str], url: str, *, timeout_s: float) -> Generator[bytes, None, None]:
    """What the program writes, as it comes."""
    with _started(arguments, url) as program, selectors.DefaultSelector() as ready:
        assert program.stdout is not None
        assert program.stderr is not None
        said = b""
        ready.register(program.stdout, selectors.EVENT_READ)
        ready.register(program.stderr, selectors.EVENT_READ)
        deadline = time.monotonic() + timeout_s
        while ready.get_map():
            events = ready.select(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:  # what it says on stderr is no byte of the file
                raise TransferError(f"{url} broke off: no byte for {timeout_s:g} s{_words(said)}")
            for key, _ in events:
                pipe: IO[bytes] = key.fileobj  # type: ignore[assignment]
                chunk = os.read(pipe.fileno(), _CHUNK)
                if not chunk:
                    ready.unregister(pipe)
                elif pipe is program.stderr:
                    said = (said + chunk)[-_TOLD_BYTES:]
                else:
                    yield chunk
                    deadline = time.monotonic() + timeout_s
        try:
            status = program.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TransferError(f"{url} broke off: the program does not end{_words(said)}") from error
        if status:
            raise TransferError(f"{url} broke off: the program ended with status {status}{_words(said)}")


@contextmanager
def _started(arguments: list[str], url: str) -> Iterator[subprocess.Popen[bytes]]:
    """The program while inside; then it and its children are killed, should they still run."""
    try:
        program = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise TransferError(f"{url} cannot be fetched: {_told(error)}") from error
    with program:
        try:
            yield program
        finally:
            if program.returncode is None:  # not waited for, so the number of its group is still its own
                os.killpg(program.pid, signal.SIGKILL)


def _words(said: bytes) -> str:
    text = said.decode(errors="replace").strip()
    return f": {text}" if text else ""
