"""Cache of remote shards: each is fetched once per node, into a folder of bounded size shared by all processes.

    http:// s3:// gs://  --one process fetches-->  SHA256.part  --verify, rename-->  SHA256.tar  <-- all read

All guarantees rest on `flock`, which the kernel releases when a process ends, even by SIGKILL:
- the fetching process holds SHA256.part exclusively; the others wait, then find SHA256.tar or fetch it themselves
- readers hold SHA256.tar shared; a file that is held is never evicted, so the folder size is the disk space in use
- evicting processes hold `lock` exclusively; the space of a transfer is reserved before its first byte
A .part that no process holds was left by a crash, and is evicted like any other file. `remote_files.py` transfers the
bytes.
"""

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.shards import MANIFEST, Shard, ShardError, open_shard
from pmlm_dist.data.remote_files import TransferError, iter_chunks, read_small_file, url_of
from pmlm_dist.files import write_atomically

_POLL_S = 0.02
_OWN_NAME = re.compile(r"[0-9a-f]{64}\.(tar|part)")


class CacheError(RuntimeError):
    """The cache has no space for a shard; the shard itself is not at fault."""

    exit_code = 1  # ExitCode.FAILED


def fetch_metadata(address: str, cache: Path, *, timeout_s: float) -> Path:
    """Fetch manifest and vocabulary of the corpus at `address`; return their folder in `cache`.

    Always fetched again, since a corpus may change. Raises ConfigError if the transfer fails.
    """
    folder = cache / "corpora" / hashlib.sha256(address.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, "tokenizer.json"):
        try:
            content = read_small_file(address, name, timeout_s=timeout_s)
        except TransferError as error:
            raise ConfigError(
                [f"corpus {address}: {error}; check the address, the network and the permissions"]
            ) from error
        # Atomically: the other ranks of this node write and read the same files at the same time.
        write_atomically(folder / name, content, durable=False)
    return folder


@dataclass(frozen=True)
class ShardCache:
    """The shard cache of a node."""

    folder: Path
    limit: int
    """Maximum size in bytes."""
    timeout_s: float
    """Seconds without a byte after which a transfer fails."""

    def open(self, address: str, shard: Shard) -> FileIO:
        """Return the open file of `shard` of the corpus at `address`, fetched if necessary; not evicted until closed.

        Raises ShardError if the transfer fails or differs from the manifest, CacheError if there is no space.
        """
        while True:
            file = self._open_cached(shard)
            if file is not None:
                return file
            self._fetch(address, shard, wait=True)

    def prefetch(self, address: str, shard: Shard) -> None:
        """Fetch `shard` unless it is cached or another process is fetching it."""
        if not self._path(shard).exists():
            self._fetch(address, shard, wait=False)

    def drop(self, shard: Shard) -> None:
        """Remove a corrupt shard, so that the next `open` fetches it again; current readers keep their file."""
        self._path(shard).unlink(missing_ok=True)

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _open_cached(self, shard: Shard) -> FileIO | None:
        path = self._path(shard)
        if not path.exists():
            return None
        try:
            file = open_shard(path, shard)
        except ShardError:
            if path.exists():
                raise
            return None  # evicted between the two calls
        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        # Another process can evict the file after it is opened here and before it is locked. Its space then counts as
        # free: reading it would exceed the limit.
        if os.fstat(file.fileno()).st_nlink == 0:
            file.close()
            return None
        os.utime(file.fileno())  # the order of eviction; not by path, from which `drop` may remove the file
        return file

    def _fetch(self, address: str, shard: Shard, *, wait: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _exclusive_lock(self._path(shard).with_suffix(".part"), wait=wait) as out:
                if out is not None:
                    self._fetch_locked(address, shard, out)
        except OSError as error:  # a quota, a read-only disk
            raise CacheError(f"cache {self.folder}: {error}; free some space, or choose another data.cache") from error

    def _fetch_locked(self, address: str, shard: Shard, out: FileIO) -> None:
        part = self._path(shard).with_suffix(".part")
        # The previous holder of the lock may have finished: its rename made this process create a new, empty .part.
        if self._path(shard).exists():
            part.unlink()
            return
        try:
            self._reserve(shard, out)
            self._transfer(address, shard, out)
            part.rename(self._path(shard))  # still locked, so that it is not evicted before it is complete
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _reserve(self, shard: Shard, out: FileIO) -> None:
        """Evict the least recently read files until `shard` fits, and allocate its space.

        The lock makes check and allocation one operation: two transfers must not both count the same free space.
        """
        with _exclusive_lock(self.folder / "lock", wait=True):
            out.truncate(0)
            while sum(size for _, size, _ in self._files()) + shard.bytes > self.limit:
                if not self._evict():
                    raise CacheError(
                        f"cache {self.folder}: no space for {shard.name} ({shard.bytes:,} bytes), since open shards "
                        f"use the limit of {self.limit:,} bytes: raise data.cache_gib"
                    )
            while not _allocate(out, shard.bytes):
                if not self._evict():
                    raise CacheError(
                        f"cache {self.folder}: the disk is full and no file of the cache can be evicted for "
                        f"{shard.name} ({shard.bytes:,} bytes): free some space, or choose another data.cache"
                    )

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return (time of last read, bytes, path) of all files of the cache, least recently read first."""
        files = []
        for path in self.folder.iterdir():
            if not _OWN_NAME.fullmatch(path.name):  # the folder may hold files of others
                continue
            try:
                status = path.stat()
            except FileNotFoundError:  # renamed or removed since it was listed
                continue
            files.append((status.st_mtime, status.st_size, path))
        return sorted(files)

    def _evict(self) -> bool:
        """Remove one file that no process holds; return False if there is none."""
        for _, size, path in self._files():
            with _exclusive_lock(path, wait=False, create=False) as file:
                # An empty file is a .part that another process has created but not locked yet.
                if size and file is not None:
                    path.unlink(missing_ok=True)
                    return True
        return False

    def _transfer(self, address: str, shard: Shard, out: FileIO) -> None:
        url, digest, size = url_of(address, shard.name), hashlib.sha256(), 0
        try:
            with closing(iter_chunks(address, shard.name, size=shard.bytes, timeout_s=self.timeout_s)) as chunks:
                for chunk in chunks:
                    size += len(chunk)
                    if size > shard.bytes:  # stop here: an endless transfer must not fill the disk
                        break
                    digest.update(chunk)
                    _write(out, chunk)
        except TransferError as error:
            raise ShardError(f"shard {error}", shard=shard, offset=size) from error
        if size != shard.bytes:
            received = f"more than {shard.bytes}" if size > shard.bytes else str(size)
            message = f"shard {url}: expected {shard.bytes} bytes, received {received}"
            raise ShardError(message, shard=shard, offset=min(size, shard.bytes))
        if digest.hexdigest() != shard.sha256:
            message = f"shard {url}: expected sha256 {shard.sha256}, received {digest.hexdigest()}"
            raise ShardError(message, shard=shard)


@contextmanager
def _exclusive_lock(path: Path, *, wait: bool, create: bool = True) -> Iterator[FileIO | None]:
    """Open `path` for writing and lock it exclusively; None if another process holds it, or it does not exist.

    `wait` polls instead of blocking in `flock`. A blocked process would keep waiting on the inode after its rename to
    .tar, now for the shared lock of a reader. That reader may itself be waiting for this process: a deadlock.
    """
    file = _try_lock(path, create=create)
    while wait and file is None:
        time.sleep(_POLL_S)
        file = _try_lock(path, create=create)
    try:
        yield file
    finally:
        if file is not None:
            file.close()


def _try_lock(path: Path, *, create: bool) -> FileIO | None:
    try:
        file = FileIO(os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o644), "r+b")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The lock belongs to the inode: it is worthless if the file was renamed or removed after it was opened.
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()
    return None


def _allocate(out: FileIO, size: int) -> bool:
    """Allocate `size` bytes of disk space for `out`; return False if the disk is full."""
    try:
        os.posix_fallocate(out.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        out.truncate(0)
        return False
    return True


def _write(out: FileIO, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:  # an unbuffered write may write less than it is given
        view = view[out.write(view) or 0 :]
