"""Shards from a faulty server, through a bounded cache shared by processes that may be killed."""

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from support.faulty_server import FaultyServer, serving
from support.numbered_corpus import SHARD_SIZES, SPECIAL, tokens_of, write_corpus

from pmlm_dist.config import ConfigError, DataConfig, MaskingConfig
from pmlm_dist.corpus.shards import TRAIN, Manifest, ShardError
from pmlm_dist.data.cache import CacheError, ShardCache
from pmlm_dist.data.loader import BatchSource, training_batches
from pmlm_dist.data.order import BatchShare
from pmlm_dist.data.remote_files import parse_address
from pmlm_dist.data.stream import CorpusSource, ShardAccess, SplitReader


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("served"), dict(SHARD_SIZES))
    (folder / "tokenizer.json").write_text("{}")  # fetched with the manifest, not used here
    return folder


@pytest.fixture
def server(corpus: Path) -> Iterator[FaultyServer]:
    with serving(corpus) as server:
        yield server


def shards_of(corpus: Path):
    return Manifest.load(corpus).splits[TRAIN].shards


def settings(cache: Path, **changes) -> DataConfig:
    return DataConfig(**{"cache": str(cache), "retries": 2, "retry_wait_s": 0.01, "workers": 0, **changes})


def reader_of(address: str, data: DataConfig) -> SplitReader:
    return SplitReader(CorpusSource.open(address, data), split=TRAIN, access=ShardAccess.from_config(data))


def test_remote_samples_equal_local_ones_and_each_shard_is_fetched_once(server, tmp_path):
    reader = reader_of(server.address, settings(tmp_path))
    for _ in range(2):
        assert [reader.sample(i).tokens.tolist() for i in range(38)] == [
            tokens_of(TRAIN, i).tolist() for i in range(38)
        ]
    assert sorted(path for path in server.requests if path.endswith(".tar")) == [f"/{s.name}" for s in reader.shards]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_from_a_server_equal_local_ones(server, corpus, tmp_path, workers):
    def batches(source: BatchSource) -> list[int]:
        loaded = training_batches(
            source, lanes=4, share=BatchShare(8, 4), loading=settings(tmp_path / "cache", workers=workers)
        )
        fingerprints = [batch.fingerprint() for batch in islice(loaded, 12)]
        loaded.close()
        return fingerprints

    remote = CorpusSource.open(server.address, settings(tmp_path / "cache"))
    local_source = BatchSource(CorpusSource(corpus), SPECIAL, MaskingConfig(), seed=0)
    remote_source = BatchSource(remote, SPECIAL, MaskingConfig(), seed=0)
    assert batches(remote_source) == batches(local_source)


@pytest.mark.parametrize("fault", ["500", "404", "cut", "flip", "stall", "slow"])
def test_transient_fault_is_retried(server, tmp_path, fault):
    reader = reader_of(server.address, settings(tmp_path, transfer_timeout_s=1.0))
    server.faults = [fault, fault]
    assert reader.sample(0).tokens.tolist() == tokens_of(TRAIN, 0).tolist()
    assert not server.faults or fault == "slow"  # slow transfers succeed: no request follows


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", "500"),
        ("404", "FileNotFoundError"),
        ("cut", "transfer interrupted"),
        ("flip", "sha256"),
        ("stall", "transfer interrupted"),
    ],
)
def test_permanent_fault_raises_with_the_shard(server, tmp_path, fault, message):
    reader = reader_of(server.address, settings(tmp_path, transfer_timeout_s=0.3))
    server.faults = [fault] * 3
    with pytest.raises(ShardError, match=message) as caught:
        reader.sample(0)
    assert f"{server.address}/train/shard-000000.tar" in str(caught.value)
    assert caught.value.shard == reader.shards[0]
    assert not server.faults
    assert not list(tmp_path.glob("*.part"))


def test_corrupt_cached_shard_is_fetched_again(server, tmp_path):
    reader = reader_of(server.address, settings(tmp_path))
    reader.sample(0)
    reader.close()
    (cached,) = tmp_path.glob("*.tar")
    content = bytearray(cached.read_bytes())
    content[700] ^= 1
    cached.write_bytes(content)
    assert reader.sample(0).tokens.tolist() == tokens_of(TRAIN, 0).tolist()


def test_cache_evicts_the_least_recently_read_shard_at_its_limit(server, corpus, tmp_path):
    shards = shards_of(corpus)
    cache = ShardCache(tmp_path, limit=sum(shard.bytes for shard in shards[:3]), timeout_s=5)
    for number, shard in enumerate(shards):
        cache.open(server.address, shard).close()
        os.utime(tmp_path / f"{shard.sha256}.tar", (number, number))
        assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= cache.limit
    assert (tmp_path / f"{shards[-1].sha256}.tar").exists()
    assert not (tmp_path / f"{shards[0].sha256}.tar").exists()


@pytest.mark.fault("F43")
def test_cache_evicts_its_own_files_only(server, corpus, tmp_path):
    foreign = [tmp_path / name for name in ("backup.tar", "download.part", f"{'g' * 64}.tar")]
    for file in foreign:
        file.write_bytes(b"foreign")
        os.utime(file, (0, 0))
    shards = shards_of(corpus)
    cache = ShardCache(tmp_path, limit=shards[0].bytes, timeout_s=5)
    for shard in shards[:3]:
        cache.open(server.address, shard).close()
    assert all(file.read_bytes() == b"foreign" for file in foreign)
    assert len(list(tmp_path.glob("*.tar"))) == 3


def test_open_shards_are_not_evicted(server, corpus, tmp_path):
    shards = sorted(shards_of(corpus), key=lambda shard: shard.bytes)
    cache = ShardCache(tmp_path, limit=shards[-1].bytes + shards[-2].bytes, timeout_s=5)
    held = cache.open(server.address, shards[-1])
    for shard in shards[:-1]:
        cache.open(server.address, shard).close()
    second = cache.open(server.address, shards[-2])
    with pytest.raises(CacheError, match=r"open shards use the limit of [\d,]+ bytes: raise data\.cache_gib"):
        cache.open(server.address, shards[0])
    held.close()
    cache.open(server.address, shards[0]).close()
    second.close()


def test_full_disk_evicts_shards_then_raises(server, corpus, tmp_path, monkeypatch):
    """The disk is full whenever the cache has two files."""
    allocate = os.posix_fallocate

    def full(descriptor: int, offset: int, size: int) -> None:
        if len(list(tmp_path.glob("*.tar"))) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    cache, shards = ShardCache(tmp_path, limit=1 << 30, timeout_s=5), shards_of(corpus)
    for shard in shards:
        cache.open(server.address, shard).close()
    assert len(list(tmp_path.glob("*.tar"))) == 2
    held = [cache.open(server.address, shard) for shard in shards[:2]]
    with pytest.raises(CacheError, match=r"the disk is full"):
        cache.open(server.address, shards[2])
    for file in held:
        file.close()
    assert not list(tmp_path.glob("*.part"))


def test_full_cache_raises_cache_error_in_the_trainer(server, tmp_path):
    remote = CorpusSource.open(server.address, settings(tmp_path))
    source = BatchSource(remote, SPECIAL, MaskingConfig(), seed=0)
    tiny = settings(tmp_path, cache_gib=1e-6, workers=1)
    batches = training_batches(source, lanes=4, share=BatchShare(8, 4), loading=tiny)
    with pytest.raises(CacheError, match=r"raise data\.cache_gib"):
        next(batches)


def _read_all(address: str, folder: Path, limit: int, seed: int) -> None:
    data = settings(folder, cache_gib=limit / 2**30)
    reader = reader_of(address, data)
    for i in [(seed * 7 + j * 11) % 38 for j in range(38)]:
        assert reader.sample(i).tokens.tolist() == tokens_of(TRAIN, i).tolist()
    os._exit(0)


def test_concurrent_readers_share_one_small_cache(server, corpus, tmp_path):
    limit = 6 * max(shard.bytes for shard in shards_of(corpus))
    context = multiprocessing.get_context("forkserver")
    readers = [context.Process(target=_read_all, args=(server.address, tmp_path, limit, seed)) for seed in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
        reader.kill()
    assert [reader.exitcode for reader in readers] == [0, 0, 0]


def _fetch_first(address: str, folder: Path) -> None:
    reader_of(address, settings(folder, transfer_timeout_s=60.0)).sample(0)


def test_process_killed_during_a_transfer_does_not_block_others(server, corpus, tmp_path):
    server.faults = ["stall"]
    process = multiprocessing.get_context("forkserver").Process(target=_fetch_first, args=(server.address, tmp_path))
    process.start()
    while server.faults:  # until the server has begun to stall
        process.join(0.01)
        assert process.is_alive()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert list(tmp_path.glob("*.part"))
    reader = reader_of(server.address, settings(tmp_path))
    assert reader.sample(0).tokens.tolist() == tokens_of(TRAIN, 0).tolist()
    assert not list(tmp_path.glob("*.part"))


def test_process_waiting_for_a_transfer_does_not_wait_for_its_reader(corpus, tmp_path):
    """The process that fetched a shard may keep reading it until the waiting process has read it too."""
    shard = shards_of(corpus)[0]
    cache, part = ShardCache(tmp_path, limit=1 << 30, timeout_s=5), tmp_path / f"{shard.sha256}.part"
    opened = []
    waiting = threading.Thread(target=lambda: opened.append(cache.open("http://127.0.0.1:1", shard)), daemon=True)
    with part.open("wb") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        waiting.start()
        time.sleep(0.2)
        out.write((corpus / shard.name).read_bytes())
        out.flush()
        part.rename(part.with_suffix(".tar"))
        fcntl.flock(out, fcntl.LOCK_SH)  # converted without a moment in which another could lock it
        waiting.join(10)
        assert opened
    opened[0].close()
    assert not part.exists()


def test_part_file_left_by_a_crash_is_evicted(server, corpus, tmp_path):
    shards = shards_of(corpus)
    (tmp_path / f"{'0' * 64}.part").write_bytes(bytes(shards[0].bytes))
    cache = ShardCache(tmp_path, limit=shards[0].bytes, timeout_s=5)
    cache.open(server.address, shards[0]).close()
    assert [path.name for path in tmp_path.glob("*.*")] == [f"{shards[0].sha256}.tar"]


def test_memory_and_file_addresses_are_read(corpus, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(corpus), "/bucket/corpus", recursive=True)
    for address in ("memory://bucket/corpus", f"file://{corpus}"):
        reader = reader_of(address, settings(tmp_path / address[:4]))
        assert reader.sample(37).tokens.tolist() == tokens_of(TRAIN, 37).tolist()
    memory.rm("/bucket", recursive=True)


def test_address_in_a_path_is_restored():
    assert parse_address(Path("s3://bucket/a/b")) == "s3://bucket/a/b"
    assert parse_address("https://host:80/a") == "https://host:80/a"
    assert parse_address(Path("/data/a:b")) is None
    assert parse_address("relative/folder") is None


@pytest.mark.parametrize("address", ["pipe:touch {}", "pipe://touch {}", "ssh://host/x", "http://x::pipe:touch {}"])
@pytest.mark.fault("F62")
def test_address_is_never_executed(tmp_path, address):
    witness = tmp_path / "run"
    for corpus in (address.format(witness), Path(address.format(witness))):
        with pytest.raises(ConfigError, match="commands are never run for an address"):
            CorpusSource.open(corpus, settings(tmp_path))
    assert not witness.exists()


def test_address_without_cache_or_corpus_raises(server, tmp_path):
    with pytest.raises(ConfigError, match=r"name a folder for its shards with --data.cache"):
        CorpusSource.open(server.address, DataConfig())
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        CorpusSource.open(f"{server.address}/nowhere", settings(tmp_path))
