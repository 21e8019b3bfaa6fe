"""Decompression of .gz, .bz2, .xz and .zst files, and one kind of error for corrupt files."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, cast

import zstandard

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.input.sources import convert_read_errors

Compression = Literal["none", "gz", "bz2", "xz", "zst"]

_ZSTD_INPUT_BYTES = 1 << 16
_ZSTD_OUTPUT_BYTES = 1 << 20
_ZSTD_WINDOW = 1 << 31


@contextmanager
def convert_decoding_errors(source: str) -> Iterator[None]:
    """Raise errors of decompressors, disks and networks as a ConfigError with the name of `source`."""
    try:
        with convert_read_errors(source):
            try:
                yield
            except OSError as error:  # of gzip and bz2 without a number: the read itself succeeded
                if error.errno is None and type(error) in (OSError, gzip.BadGzipFile):
                    raise EOFError(str(error)) from error
                raise
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise ConfigError([f"source {source} is corrupt: {error}; replace the file or remove it"]) from error


def decompress(raw: BinaryIO, compression: Compression) -> BinaryIO:
    """Return a file of the decompressed bytes of `raw`."""
    library = {"gz": gzip, "bz2": bz2, "xz": lzma}.get(compression)
    if library is not None:
        return cast(BinaryIO, library.open(raw, "rb"))
    if compression == "zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(raw), _ZSTD_OUTPUT_BYTES))
    return raw


class _ZstdFile(io.RawIOBase):
    """All frames of a .zst file.

    The library's own reader stops after the first frame, and does not report a truncated file.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._library = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = self._decompressed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._decompressed and self._advance():
            pass
        size = min(len(buffer), len(self._decompressed))
        buffer[:size], self._decompressed = self._decompressed[:size], self._decompressed[size:]
        return size

    def _advance(self) -> bool:
        """Decompress one block of input; return False at the end of the file."""
        self._compressed = self._compressed or self._file.read(_ZSTD_INPUT_BYTES)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("it ends within a frame")
            return False
        self._frame = self._frame or self._library.decompressobj()
        self._decompressed, self._compressed = self._frame.decompress(self._compressed), b""
        if self._frame.eof:
            self._frame, self._compressed = None, self._frame.unused_data
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
