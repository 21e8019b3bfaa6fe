"""Malicious tar files with a matching manifest: each raises ShardError, and none touches another file."""

import dataclasses
import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pmlm_dist.corpus.shards import Shard, ShardError, ShardReader

IDS = np.array([2, 7, 8, 3, 9, 3], dtype="<u2").tobytes()
LONGEST = 32


def member(name: str, data: bytes = IDS, **changes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in changes.items():
        setattr(info, field, value)
    return info, data


def write(folder: Path, members: list[tuple[tarfile.TarInfo, bytes]], *, form: int = tarfile.USTAR_FORMAT) -> Shard:
    """Write a shard of `members`; return its manifest entry."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    (folder / "x.tar").write_bytes(content.getvalue())
    sha256 = hashlib.sha256(content.getvalue()).hexdigest()
    return Shard("x.tar", samples=len(members), bytes=len(content.getvalue()), sha256=sha256)


def read(folder: Path, shard: Shard) -> list[list[int]]:
    with ShardReader(folder, shard, "uint16", longest=LONGEST) as reader:
        return [reader[i].tolist() for i in range(len(reader))]


VALID = [member("000000000.u16"), member("000000001.u16")]


def test_valid_shard_is_read(tmp_path):
    assert read(tmp_path, write(tmp_path, VALID)) == [[2, 7, 8, 3, 9, 3]] * 2


@pytest.mark.parametrize(
    "invalid",
    [
        member("/000000002.u16"),
        member("../000000002.u16"),
        member("a/000000002.u16"),
        member("../" * 40 + "000000002.u16"),  # so long that its folder is in another field of the header
        member("000000002.pyd"),
        member("000000002.u16", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("000000002.u16", b"", type=tarfile.LNKTYPE, linkname="000000000.u16"),
        member("000000002.u16", b"", type=tarfile.DIRTYPE),
        member("000000002.u16", b"", type=tarfile.CHRTYPE),
        member("000000002.u16", b"", type=tarfile.FIFOTYPE),
        member("000000002.u16", bytes(2 * LONGEST + 2)),
        member("000000002.u16", b""),
        member("000000002.u16", b"odd"),
        member("000000001.u16"),
        member("000000003.u16"),
    ],
    ids=lambda invalid: f"{invalid[0].name[-16:]}-{invalid[0].type.decode()}-{invalid[0].size}",
)
@pytest.mark.fault("F61", "F63")
def test_invalid_member_raises_with_its_offset(tmp_path, invalid):
    shard = write(tmp_path, [*VALID, invalid])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ShardError, match=r"x\.tar: ") as caught:
        read(tmp_path, shard)
    assert caught.value.shard == shard
    assert caught.value.offset in (2048, 2048 + 512)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_extended_header_raises(tmp_path, form):
    with pytest.raises(ShardError, match="expected a sample"):
        read(tmp_path, write(tmp_path, [*VALID, member("x" * 200)], form=form))


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + bytes(10) + b"\x0c", b"-0000000001\0"])
@pytest.mark.fault("F64")
def test_member_size_beyond_the_file_raises(tmp_path, size):
    shard = write(tmp_path, VALID)
    content = bytearray((tmp_path / "x.tar").read_bytes())
    content[1024 + 124 : 1024 + 136] = size
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ShardError) as caught:
        read(tmp_path, dataclasses.replace(shard, sha256=hashlib.sha256(content).hexdigest()))
    assert caught.value.offset == 1024


@pytest.mark.parametrize(
    ("damage", "offset"),
    [
        (lambda content: content[: 1024 + 100], 1124),  # inside a member
        (lambda content: content[:1024], 1024),  # between two members: valid as a tar file
        (lambda content: content[:520] + b"\xff" + content[521:], None),  # a byte of a sample
        (lambda content: content[:1024] + b"\xff" + content[1025:], 1024),  # a byte of a header
        (lambda content: content + bytes(512), None),
        (lambda content: b"", 0),
    ],
)
@pytest.mark.fault("F50")
def test_corrupt_shard_raises_with_its_offset(tmp_path, damage, offset):
    shard = write(tmp_path, VALID)
    (tmp_path / "x.tar").write_bytes(damage((tmp_path / "x.tar").read_bytes()))
    with pytest.raises(ShardError) as caught:
        read(tmp_path, shard)
    assert caught.value.offset == (shard.bytes if len(damage(bytes(shard.bytes))) > shard.bytes else offset)


def test_file_truncated_while_open_raises(tmp_path):
    shard = write(tmp_path, VALID)
    with ShardReader(tmp_path, shard, "uint16") as reader:
        os.truncate(tmp_path / "x.tar", 1024)
        assert reader[0].tolist() == [2, 7, 8, 3, 9, 3]
        with pytest.raises(ShardError, match="was truncated while it was read") as caught:
            reader[1]
    assert caught.value.offset == 1536


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.fault("F65")
def test_pipe_or_folder_raises_without_blocking(tmp_path, make):
    shard = write(tmp_path, VALID)
    (tmp_path / "x.tar").unlink()
    make(tmp_path / "x.tar")
    with pytest.raises(ShardError, match="is not a file"):
        read(tmp_path, shard)
