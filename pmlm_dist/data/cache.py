"""Shards from elsewhere: fetched once for a node, kept in a folder of bounded size, shared by all its processes.

    http:// s3:// gs://  --one process fetches-->  <sha256>.part  --checked, renamed-->  <sha256>.tar  <-- all read

Every promise rests on a lock that the kernel takes back when a process ends, however it ends:
- who fetches holds <sha256>.part alone; others wait, and find the shard there or fetch it themselves
- who reads shares <sha256>.tar; what is shared is not thrown out, so the size of the folder is the space it takes
- who makes room holds `lock`; the space of a transfer is reserved before its first byte comes
A .part that nobody holds was left by a crash and goes like any other file. How bytes come: `transfer.py`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from pmlm_dist.config import raise_if_any
from pmlm_dist.corpus.shards import MANIFEST, Shard, ShardError, open_shard
from pmlm_dist.data.remote_files import TransferError, chunks, read_whole, url_of

_POLL_S = 0.02


class CacheError(RuntimeError):
    """The cache has no room: no shard's fault."""


def mirror(address: str, cache: Path, *, timeout_s: float) -> Path:
    """A local folder with manifest and vocabulary of the corpus at `address`, fetched anew; ConfigError without."""
    folder = cache / "corpora" / hashlib.sha256(address.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, "tokenizer.json"):
        temporary = folder / f".{name}.{os.getpid()}"
        try:
            temporary.write_bytes(read_whole(address, name, timeout_s=timeout_s))
            temporary.replace(folder / name)  # other ranks of this node write the same
        except TransferError as error:
            raise_if_any([f"corpus {address}: {error}; check the address, the network and the rights"])
    return folder


@dataclass(frozen=True)
class ShardCache:
    """The cache folder of a node."""

    folder: Path
    limit: int
    """Bytes that it may hold."""
    timeout_s: float
    """Seconds without a byte after which a transfer is given up."""

    def open(self, address: str, shard: Shard) -> FileIO:
        """The file of `shard` of the corpus at `address`, fetched if it is not there; kept until it is closed.

        Raises ShardError where it cannot be fetched or is not what the manifest says, CacheError without room for it.
        """
        while True:
            file = self._opened(shard)
            if file is not None:
                return file
            self._fetch(address, shard, wait=True)

    def fetch_ahead(self, address: str, shard: Shard) -> None:
        """Fetch `shard` unless it is there or another process fetches it."""
        if not self._path(shard).exists():
            self._fetch(address, shard, wait=False)

    def drop(self, shard: Shard) -> None:
        """Forget a shard that is damaged: the next `open` fetches it anew. Whoever reads it can go on."""
        self._path(shard).unlink(missing_ok=True)

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _opened(self, shard: Shard) -> FileIO | None:
        path = self._path(shard)
        if not path.exists():
            return None
        try:
            file = open_shard(path, shard)
        except ShardError:
            if path.exists():
                raise
            return None  # thrown out just now
        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink == 0:
            file.close()
            return None
        os.utime(path)
        return file

    def _fetch(self, address: str, shard: Shard, *, wait: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._path(shard).with_suffix(".part")
        with _locked(part, wait=wait) as out:
            if out is None:
                return
            if self._path(shard).exists():  # another process has fetched it meanwhile
                part.unlink()
                return
            try:
                self._reserve(shard, out)
                self._transfer(address, shard, out)
                part.rename(self._path(shard))
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _reserve(self, shard: Shard, out: FileIO) -> None:
        """Throw out what was not read for longest until `shard` fits, and take its space."""
        with _locked(self.folder / "lock", wait=True):
            out.truncate(0)
            while self._held() + shard.bytes > self.limit:
                if not self._evict():
                    raise CacheError(
                        f"the cache {self.folder} has no room for {shard.name} of {shard.bytes:,} bytes: its "
                        f"{self.limit:,} are taken by shards that are being read: raise data.cache_gib"
                    )
            while not _allocated(out, shard.bytes):
                if not self._evict():
                    raise CacheError(
                        f"the disk of the cache {self.folder} is full and nothing in it can be thrown out: "
                        f"{shard.name} takes {shard.bytes:,} bytes; make room, or choose another data.cache"
                    )

    def _held(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last reading, bytes and path of everything in the cache."""
        found = []
        for path in [*self.folder.glob("*.tar"), *self.folder.glob("*.part")]:
            try:
                status = path.stat()
            except FileNotFoundError:  # renamed or thrown out meanwhile
                continue
            found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def _evict(self) -> bool:
        """Remove one file that nobody holds; whether there was one."""
        for _, size, path in self._files():
            with _locked(path, wait=False, create=False) as held:
                if size and held is not None:
                    path.unlink(missing_ok=True)
                    return True
        return False

    def _transfer(self, address: str, shard: Shard, out: FileIO) -> None:
        url, digest, size = url_of(address, shard.name), hashlib.sha256(), 0
        try:
            with closing(chunks(address, shard.name, size=shard.bytes, timeout_s=self.timeout_s)) as stream:
                for chunk in stream:
                    size += len(chunk)
                    if size > shard.bytes:
                        break
                    digest.update(chunk)
                    _write(out, chunk)
        except TransferError as error:
            raise ShardError(f"shard {error}", shard=shard, offset=size) from error
        if size != shard.bytes:
            found = f"more than {shard.bytes}" if size > shard.bytes else str(size)
            message = f"shard {url}: expected {shard.bytes} bytes, got {found}"
            raise ShardError(message, shard=shard, offset=min(size, shard.bytes))
        if digest.hexdigest() != shard.sha256:
            raise ShardError(f"shard {url}: expected sha256 {shard.sha256}, got {digest.hexdigest()}", shard=shard)


@contextmanager
def _locked(path: Path, *, wait: bool, create: bool = True) -> Iterator[FileIO | None]:
    """`path`, opened for writing and locked for this process alone; None if another holds it, or it is not there.

    `wait` looks again and again: who slept on the lock itself could go on sleeping after the file was renamed, on a
    shard that another process reads for as long as it waits for this one.
    """
    file = _lock(path, create=create)
    while wait and file is None:
        time.sleep(_POLL_S)
        file = _lock(path, create=create)
    try:
        yield file
    finally:
        if file is not None:
            file.close()


def _lock(path: Path, *, create: bool) -> FileIO | None:
    try:
        file = FileIO(os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o644), "r+b")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, path):  # not renamed or removed since it was opened
            return file
    except BlockingIOError:
        pass
    file.close()
    return None


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _allocated(out: FileIO, size: int) -> bool:
    """Take `size` bytes of disk for `out`; False when the disk is full."""
    try:
        os.posix_fallocate(out.fileno(), 0, size)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        out.truncate(0)
        return False
    return True


def _write(out: FileIO, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[out.write(view) or 0 :]
