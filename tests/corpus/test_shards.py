import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.shards import (
    Manifest,
    Shard,
    ShardError,
    ShardReader,
    Split,
    TokenDtype,
    shard_name,
    token_dtype,
    write_shard,
)

SAMPLES = [np.array([2, 10 + number, 3, *range(20, 20 + number), 3], np.uint32) for number in range(1, 40)]


def write_samples(folder: Path, *, first: int = 7, dtype: TokenDtype = "uint16") -> Shard:
    return write_shard(folder, shard_name("train", 0), SAMPLES, first=first, dtype=dtype)


def shard_record(folder: Path, name: str, *, samples: int) -> Shard:
    """Return the record of a shard with the size and checksum of the file."""
    data = (folder / name).read_bytes()
    return Shard(name=name, samples=samples, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_tar(folder: Path, *members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> Shard:
    with tarfile.open(folder / "odd.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            tar.addfile(info, io.BytesIO(data))
    return shard_record(folder, "odd.tar", samples=len(members))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_reader_returns_the_written_samples_in_any_order(tmp_path: Path, dtype: TokenDtype):
    with ShardReader(tmp_path, write_samples(tmp_path, dtype=dtype), dtype) as reader:
        assert len(reader) == len(SAMPLES)
        for number in reversed(range(len(SAMPLES))):
            assert reader[number].tolist() == SAMPLES[number].tolist()
            assert reader[number].dtype == np.dtype(dtype)
        for outside in (-1, len(SAMPLES)):
            with pytest.raises(IndexError):
                reader[outside]
    assert (tmp_path / "train/shard-000000.tar").stat().st_size % 512 == 0


def test_webdataset_and_tarfile_read_the_same_ids(tmp_path: Path):
    shard = write_samples(tmp_path)
    path = tmp_path / shard.name
    program = (
        "import sys, webdataset, numpy\n"
        "for sample in webdataset.WebDataset(sys.argv[1], shardshuffle=False):\n"
        "    print(sample['__key__'], *numpy.frombuffer(sample['u16'], '<u2'))\n"
    )
    environment = {**os.environ, "WDS_SECURE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, env=environment
    )
    expected = [" ".join(map(str, [f"{7 + n:09d}", *ids.tolist()])) for n, ids in enumerate(SAMPLES)]
    assert done.stdout.splitlines() == expected
    with tarfile.open(path) as tar, ShardReader(tmp_path, shard, "uint16") as reader:
        for number, member in enumerate(tar):
            data = tar.extractfile(member)
            assert data is not None
            assert data.read() == reader[number].astype("<u2").tobytes()
            assert (member.mtime, member.uname, member.gname, member.uid) == (0, "pmlm", "pmlm", 0)


def test_equal_samples_give_equal_bytes(tmp_path: Path):
    assert (
        write_samples(tmp_path / "a").sha256
        == write_samples(tmp_path / "b").sha256
        != write_samples(tmp_path, first=8).sha256
    )
    shard = write_samples(tmp_path / "a")
    assert shard == shard_record(tmp_path / "a", shard.name, samples=len(SAMPLES))


@pytest.mark.fault("F52", "F53")
def test_reader_detects_any_flipped_bit(tmp_path: Path):
    shard = write_samples(tmp_path)
    path = tmp_path / shard.name
    data = path.read_bytes()
    for position in (0, 130, 600, len(data) - 1):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ShardError, match=rf"{path}: expected sha256 {shard.sha256}, found .*copy the shard again"):
            ShardReader(tmp_path, shard, "uint16")


@pytest.mark.fault("F51")
def test_reader_detects_truncation_at_a_member_boundary(tmp_path: Path):
    shard = write_samples(tmp_path)
    path = tmp_path / shard.name
    path.write_bytes(path.read_bytes()[:2048])
    with pytest.raises(ShardError, match=rf"{path}: expected {shard.bytes} bytes, found 2048; "):
        ShardReader(tmp_path, shard, "uint16")


@pytest.mark.fault("F54")
def test_missing_shard_is_named(tmp_path: Path):
    shard = write_samples(tmp_path)
    (tmp_path / shard.name).unlink()
    with pytest.raises(ShardError, match=r"shard-000000.tar cannot be opened: No such file.*prepare-corpus"):
        ShardReader(tmp_path, shard, "uint16")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("000000000.pyd", b"ab")], r"expected a sample NNNNNNNNN\.u16, found b'000000000\.pyd'"),
        ([("../000000000.u16", b"ab")], "expected a sample"),
        ([("000000000.u16", b"ab"), ("000000002.u16", b"ab")], "expected sample 1, found b'000000002.u16'"),
        ([("000000000.u16", b"abc")], "multiple of 2 bytes"),
        ([("000000000.u16", b"")], "multiple of 2 bytes"),
    ],
)
def test_reader_raises_for_invalid_members(tmp_path: Path, members: list[tuple[str, bytes]], message: str):
    with pytest.raises(ShardError, match=message):
        ShardReader(tmp_path, write_tar(tmp_path, *members), "uint16")


@pytest.mark.fault("F63")
def test_reader_raises_for_links(tmp_path: Path):
    with pytest.raises(ShardError, match="expected a sample"):
        ShardReader(tmp_path, write_tar(tmp_path, ("000000000.u16", b""), kind=tarfile.SYMTYPE), "uint16")


def test_reader_raises_for_other_counts_and_sizes_past_the_end(tmp_path: Path):
    shard = write_samples(tmp_path)
    with pytest.raises(ShardError, match="expected 38 samples, found 39"):
        ShardReader(tmp_path, dataclasses.replace(shard, samples=38), "uint16")
    path = tmp_path / shard.name
    data = bytearray(path.read_bytes())
    data[124:136] = b"77777777777\0"
    path.write_bytes(data)
    with pytest.raises(ShardError, match="reaches past the end"):
        ShardReader(tmp_path, shard_record(tmp_path, shard.name, samples=39), "uint16")


def test_token_dtype_is_the_narrowest():
    assert (token_dtype(1 << 16), token_dtype((1 << 16) + 1)) == ("uint16", "uint32")


MANIFEST = Manifest(
    sequence_length=128,
    token_dtype="uint16",
    vocabulary={"size": 3, "fingerprint": "f"},
    seed=0,
    splits={
        "train": Split((Shard("train/shard-000000.tar", 3, 10240, "a" * 64),), 3, 99),
        "validation": Split((Shard("validation/shard-000000.tar", 1, 10240, "b" * 64),), 1, 33),
    },
    token_counts="0 2 2",
    counts={"documents": {"train": 2}, "skipped": {"empty": 1}},
    settings={"source": ["here"]},
)


def test_saved_manifest_loads_equal(tmp_path: Path):
    MANIFEST.save(tmp_path)
    assert Manifest.load(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_unigram_entropy_of_equal_counts_is_the_logarithm():
    assert MANIFEST.unigram_entropy == pytest.approx(np.log(2))
    assert dataclasses.replace(MANIFEST, token_counts="0 0 0").unigram_entropy == 0.0


def test_fingerprint_depends_on_content_not_on_settings():
    elsewhere = dataclasses.replace(MANIFEST, settings={"source": ["there"]})
    other = dataclasses.replace(MANIFEST, splits={**MANIFEST.splits, "train": Split((), 0, 0)})
    assert elsewhere.fingerprint == MANIFEST.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no corpus in"),
        ("{", "is not a manifest"),
        ("[]", "is not a manifest"),
        (json.dumps({"version": 99}), "has version 99, this program reads 2"),
        (json.dumps({"version": 2, "splits": {}}), "is not a complete manifest"),
        (json.dumps({"version": 2}), "is not a complete manifest"),
        (
            json.dumps(
                {
                    "version": 2,
                    "splits": {},
                    **dict.fromkeys(("sequence_length", "token_dtype", "seed", "counts")),
                    "vocabulary": {"size": 3},
                    "token_counts": "1 2",
                }
            ),
            "it has 3 tokens, and token_counts of 2",
        ),
    ],
)
def test_invalid_manifest_raises_with_the_command(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Manifest.load(tmp_path)
    assert f"pmlm prepare-corpus --source 'texts/*.jsonl' --output {tmp_path}" in str(caught.value)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.tar", "train/../../x.tar", "-o", "train/-x", "a b", "", "a//b"])
def test_manifest_with_a_shard_outside_the_corpus_raises(tmp_path: Path, name: str):
    shard = {"name": name, "samples": 1, "bytes": 1, "sha256": "0" * 64}
    split = {"shards": [shard], "samples": 1, "tokens": 1}
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 2, "splits": {"train": split}}))
    with pytest.raises(ConfigError, match="is not a path below the corpus"):
        Manifest.load(tmp_path)
