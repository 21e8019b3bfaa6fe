"""Remote files: bytes of the files of a corpus at an address, with a time limit between bytes.

    http(s):// s3:// gs:// file:// memory://    fsspec
    pipe:PROGRAM ARGUMENT ... {} ...            standard output of a program, only with data.allow_pipe

Every failure is a `TransferError`. A program is executed directly, never by a shell: the address is split into
arguments by shell rules, then `{}` is replaced by the name of the file, so a name cannot add an argument. Its standard
input is empty. It is killed with its children if it writes nothing for too long, or more than is read. An exit status
other than 0 is a failure.
"""

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

from pmlm_dist.config import ConfigError

SCHEMES = ("http", "https", "s3", "gs", "file", "memory")
NAME_FIELD = "{}"
"""Placeholder for the file name in the arguments of a program."""
MAX_METADATA_BYTES = 256 << 20
"""Maximum size of a manifest or a vocabulary."""
_EXTRAS = {"s3": "s3", "gs": "gs"}
_PIPE = "pipe:"
_CHUNK_BYTES = 1 << 20
_MAX_STDERR_BYTES = 500


class TransferError(OSError):
    """A file cannot be fetched, or its transfer is interrupted."""


def parse_address(corpus: object, *, allow_pipe: bool = False) -> str | None:
    """Return the address in `corpus`, or None for a folder.

    A `Path` has collapsed the slashes of s3://bucket/x; they are restored. Raises ConfigError for a scheme that is not
    in `SCHEMES`, in particular for `pipe:PROGRAM` unless `allow_pipe`.
    """
    match = re.fullmatch(r"([A-Za-z][\w+.-]+):(.*)", str(corpus), flags=re.DOTALL)
    if match is None:
        return None
    scheme, rest = match[1], match[2].lstrip("/")
    if scheme == "pipe" and allow_pipe:
        return _parse_program(match[2])
    # "::" chains file systems in fsspec, and could bring in any other scheme.
    if scheme not in SCHEMES or "::" in rest:
        raise ConfigError(
            [
                f"corpus {str(corpus)!r} must be a folder, or an address with one of the schemes {', '.join(SCHEMES)}: "
                "commands are never run for an address, except pipe:PROGRAM with --data.allow-pipe (for a folder "
                "whose name has a colon, use its absolute path)"
            ]
        )
    if "@" in rest.partition("/")[0]:
        raise ConfigError(
            [
                f"corpus {scheme}://...@{rest.partition('/')[0].rpartition('@')[2]}: the part before the @ would be "
                "written into logs and checkpoints: pass credentials in the environment (docs/security.md)"
            ]
        )
    return f"{scheme}:///{rest}" if scheme == "file" else f"{scheme}://{rest}"


def _parse_program(command: str) -> str:
    command = re.sub(r"\b(https?|s3|gs):/+", r"\1://", command)
    try:
        arguments = shlex.split(command)
    except ValueError as error:
        raise ConfigError([f"corpus 'pipe:{command}' cannot be split into arguments ({error}): fix it"]) from error
    if not arguments or NAME_FIELD in arguments[0] or not any(NAME_FIELD in argument for argument in arguments):
        raise ConfigError(
            [
                f"corpus 'pipe:{command}' must name a program that writes a file of the corpus to its standard output, "
                f"with {NAME_FIELD} for the name of the file: 'pipe:aws s3 cp s3://bucket/corpus/{NAME_FIELD} -'"
            ]
        )
    return f"{_PIPE}{command}"


def url_of(address: str, name: str) -> str:
    """Return the URL of file `name` of the corpus at `address`; for a program, its command."""
    return address.replace(NAME_FIELD, name) if address.startswith(_PIPE) else f"{address}/{name}"


def read_small_file(address: str, name: str, *, timeout_s: float) -> bytes:
    """Return the contents of the manifest or vocabulary `name` of the corpus at `address`."""
    content = bytearray()
    with closing(iter_chunks(address, name, size=None, timeout_s=timeout_s)) as chunks:
        for chunk in chunks:
            content += chunk
            if len(content) > MAX_METADATA_BYTES:
                raise TransferError(f"{url_of(address, name)} has more than {MAX_METADATA_BYTES} bytes")
    return bytes(content)


def iter_chunks(address: str, name: str, *, size: int | None, timeout_s: float) -> Generator[bytes, None, None]:
    """Yield the bytes of file `name` of the corpus at `address`; close the generator to end the transfer.

    `size`: expected bytes, if known. `timeout_s`: maximum time without a byte.
    """
    url = url_of(address, name)
    if not address.startswith(_PIPE):
        return _fsspec_chunks(url, size=size, timeout_s=timeout_s)
    arguments = [argument.replace(NAME_FIELD, name) for argument in shlex.split(address.removeprefix(_PIPE))]
    return _program_chunks(arguments, url, timeout_s=timeout_s)


# The exceptions of fsspec's file systems have no common base: every one becomes a `TransferError`.
def _fsspec_chunks(url: str, *, size: int | None, timeout_s: float) -> Generator[bytes, None, None]:
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url, **_fsspec_options(url, timeout_s=timeout_s))
        # One request for the whole file: block size 0 sends no request for the size, and none for ranges, which a
        # server may not support.
        stream_options = {"block_size": 0} if url.startswith("http") else {}
        stream_options |= {"size": size} if stream_options and size is not None else {}
        stream = filesystem.open(path, "rb", **stream_options)
    except ImportError as error:
        protocol = url.partition(":")[0]
        extra = _EXTRAS.get(protocol, "http")
        raise ConfigError([f"{url}: {protocol}:// needs a package: pip install 'pmlm_dist[{extra}]'"]) from error
    except Exception as error:
        raise TransferError(f"{url} cannot be fetched: {_message(error)}") from error
    with stream:
        while True:
            try:
                chunk = stream.read(_CHUNK_BYTES)
            except Exception as error:
                raise TransferError(f"{url}: transfer interrupted: {_message(error)}") from error
            if not chunk:
                return
            yield chunk


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _fsspec_options(url: str, *, timeout_s: float) -> dict[str, Any]:
    if not url.startswith("http"):
        return {}
    import aiohttp

    # The limit is between bytes: a large shard on a slow network may take any time in total.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    return {"client_kwargs": {"timeout": timeout}}


# ------------------------------------------------------------------------------------------------------------ programs


def _program_chunks(arguments: list[str], url: str, *, timeout_s: float) -> Generator[bytes, None, None]:
    """Yield the standard output of the program; the end of its standard error becomes part of an error message."""
    with _running(arguments, url) as program, selectors.DefaultSelector() as selector:
        assert program.stdout is not None
        assert program.stderr is not None
        stderr = b""
        selector.register(program.stdout, selectors.EVENT_READ)
        selector.register(program.stderr, selectors.EVENT_READ)
        deadline = time.monotonic() + timeout_s
        while selector.get_map():
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:  # output on stderr is no progress of the transfer
                raise TransferError(f"{url}: transfer interrupted: no byte for {timeout_s:g} s{_quoted(stderr)}")
            for key, _ in events:
                pipe: IO[bytes] = key.fileobj  # type: ignore[assignment]
                chunk = os.read(pipe.fileno(), _CHUNK_BYTES)
                if not chunk:
                    selector.unregister(pipe)
                elif pipe is program.stderr:
                    stderr = (stderr + chunk)[-_MAX_STDERR_BYTES:]
                else:
                    yield chunk
                    deadline = time.monotonic() + timeout_s
        # Complete output alone is no success: a program may close its output and still fail.
        try:
            status = program.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TransferError(f"{url}: transfer interrupted: the program does not exit{_quoted(stderr)}") from error
        if status:
            raise TransferError(
                f"{url}: transfer interrupted: the program exited with status {status}{_quoted(stderr)}"
            )


@contextmanager
def _running(arguments: list[str], url: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the program inside the block, then kill it and its children if they still run."""
    try:
        program = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except (OSError, ValueError) as error:
        raise TransferError(f"{url} cannot be fetched: {_message(error)}") from error
    with program:
        try:
            yield program
        finally:
            # Only while the program has not been waited for: its process group id may be reused after that.
            if program.returncode is None:
                os.killpg(program.pid, signal.SIGKILL)


def _quoted(stderr: bytes) -> str:
    text = stderr.decode(errors="replace").strip()
    return f": {text}" if text else ""
