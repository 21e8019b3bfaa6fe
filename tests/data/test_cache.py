"""Shards from a server that fails in every way, through a cache that is shared, bounded and killed."""

from __future__ import annotations

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
from pmlm_dist.data.remote_files import address_of
from pmlm_dist.data.stream import CorpusSource, ShardAccess, SplitReader


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("served"), dict(SHARD_SIZES))
    (folder / "tokenizer.json").write_text("{}")  # fetched with the manifest, not read here
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
    return SplitReader(CorpusSource.at(address, data), split=TRAIN, access=ShardAccess.of(data))


def test_samples_are_those_of_the_folder_and_each_shard_comes_once(server, tmp_path):
    reader = reader_of(server.address, settings(tmp_path))
    for _ in range(2):
        assert [reader.numbered(i).tokens.tolist() for i in range(38)] == [
            tokens_of(TRAIN, i).tolist() for i in range(38)
        ]
    assert sorted(path for path in server.requests if path.endswith(".tar")) == [f"/{s.name}" for s in reader.shards]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_the_same_from_a_server(server, corpus, tmp_path, workers):
    def batches(source: BatchSource) -> list[int]:
        loaded = training_batches(
            source, lanes=4, share=BatchShare(8, 4), loading=settings(tmp_path / "cache", workers=workers)
        )
        found = [batch.fingerprint() for batch in islice(loaded, 12)]
        loaded.close()
        return found

    remote = CorpusSource.at(server.address, settings(tmp_path / "cache"))
    here = BatchSource(corpus, SPECIAL, MaskingConfig(), seed=0)
    there = BatchSource(remote.folder, SPECIAL, MaskingConfig(), seed=0, address=remote.address)
    assert batches(there) == batches(here)


@pytest.mark.parametrize("fault", ["500", "404", "cut", "flip", "stall", "slow"])
def test_a_fault_that_passes_costs_only_time(server, tmp_path, fault):
    reader = reader_of(server.address, settings(tmp_path, transfer_timeout_s=1.0))
    server.faults = [fault, fault]
    assert reader.numbered(0).tokens.tolist() == tokens_of(TRAIN, 0).tolist()
    assert not server.faults or fault == "slow"  # which is no fault


@pytest.mark.parametrize(
    ("fault", "message"),
    [("500", "500"), ("404", "FileNotFoundError"), ("cut", "broke off"), ("flip", "sha256"), ("stall", "broke off")],
)
def test_a_fault_that_stays_names_the_shard(server, tmp_path, fault, message):
    reader = reader_of(server.address, settings(tmp_path, transfer_timeout_s=0.3))
    server.faults = [fault] * 3
    with pytest.raises(ShardError, match=message) as caught:
        reader.numbered(0)
    assert f"{server.address}/train/shard-000000.tar" in str(caught.value)
    assert caught.value.shard == reader.shards[0]
    assert not server.faults
    assert not list(tmp_path.glob("*.part"))


def test_a_cached_shard_that_is_damaged_is_fetched_anew(server, tmp_path):
    reader = reader_of(server.address, settings(tmp_path))
    reader.numbered(0)
    reader.close()
    (cached,) = tmp_path.glob("*.tar")
    content = bytearray(cached.read_bytes())
    content[700] ^= 1
    cached.write_bytes(content)
    assert reader.numbered(0).tokens.tolist() == tokens_of(TRAIN, 0).tolist()


def test_the_cache_stays_in_its_size_and_forgets_what_was_read_first(server, corpus, tmp_path):
    shards = shards_of(corpus)
    cache = ShardCache(tmp_path, limit=sum(shard.bytes for shard in shards[:3]), timeout_s=5)
    for number, shard in enumerate(shards):
        cache.open(server.address, shard).close()
        os.utime(tmp_path / f"{shard.sha256}.tar", (number, number))
        assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= cache.limit
    assert (tmp_path / f"{shards[-1].sha256}.tar").exists()
    assert not (tmp_path / f"{shards[0].sha256}.tar").exists()


def test_what_is_read_is_not_thrown_out(server, corpus, tmp_path):
    shards = sorted(shards_of(corpus), key=lambda shard: shard.bytes)
    cache = ShardCache(tmp_path, limit=shards[-1].bytes + shards[-2].bytes, timeout_s=5)
    held = cache.open(server.address, shards[-1])
    for shard in shards[:-1]:
        cache.open(server.address, shard).close()
    second = cache.open(server.address, shards[-2])
    with pytest.raises(CacheError, match=r"taken by shards that are being read: raise data\.cache_gib"):
        cache.open(server.address, shards[0])
    held.close()
    cache.open(server.address, shards[0]).close()
    second.close()


def test_a_full_disk_throws_out_what_it_can_and_is_named_otherwise(server, corpus, tmp_path, monkeypatch):
    """The disk here is full whenever the cache holds two files."""
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
    with pytest.raises(CacheError, match=r"the disk of the cache .* is full"):
        cache.open(server.address, shards[2])
    assert [file.close() for file in held] == [None, None]
    assert not list(tmp_path.glob("*.part"))


def test_a_full_cache_is_no_shards_fault_and_ends_the_loader(server, tmp_path):
    remote = CorpusSource.at(server.address, settings(tmp_path))
    source = BatchSource(remote.folder, SPECIAL, MaskingConfig(), seed=0, address=remote.address)
    tiny = settings(tmp_path, cache_gib=1e-6, workers=1)
    batches = training_batches(source, lanes=4, share=BatchShare(8, 4), loading=tiny)
    with pytest.raises(CacheError, match=r"raise data\.cache_gib"):
        next(batches)


def _read_all(address: str, folder: Path, limit: int, seed: int) -> None:
    data = settings(folder, cache_gib=limit / 2**30)
    reader = reader_of(address, data)
    for i in [(seed * 7 + j * 11) % 38 for j in range(38)]:
        assert reader.numbered(i).tokens.tolist() == tokens_of(TRAIN, i).tolist()
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
    reader_of(address, settings(folder, transfer_timeout_s=60.0)).numbered(0)


def test_a_process_killed_amid_a_transfer_leaves_nothing_in_the_way(server, corpus, tmp_path):
    server.faults = ["stall"]
    process = multiprocessing.get_context("forkserver").Process(target=_fetch_first, args=(server.address, tmp_path))
    process.start()
    # Killed before its request arrived, it would leave the stall, 60 s, to the reader below.
    while server.faults or not any(path.stat().st_size for path in tmp_path.glob("*.part")):
        process.join(0.01)
        assert process.is_alive()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert list(tmp_path.glob("*.part"))
    reader = reader_of(server.address, settings(tmp_path))
    assert reader.numbered(0).tokens.tolist() == tokens_of(TRAIN, 0).tolist()
    assert not list(tmp_path.glob("*.part"))


def test_who_waits_for_a_transfer_does_not_wait_for_the_reader_after_it(corpus, tmp_path):
    """Who fetched a shard reads it at once, and may do so until the one that waited has read it as well."""
    shard = shards_of(corpus)[0]
    cache, part = ShardCache(tmp_path, limit=1 << 30, timeout_s=5), tmp_path / f"{shard.sha256}.part"
    found = []
    waiting = threading.Thread(target=lambda: found.append(cache.open("http://127.0.0.1:1", shard)), daemon=True)
    with part.open("wb") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        waiting.start()
        time.sleep(0.2)
        out.write((corpus / shard.name).read_bytes())
        out.flush()
        part.rename(part.with_suffix(".tar"))
        fcntl.flock(out, fcntl.LOCK_SH)  # without a moment in between in which another could take it
        waiting.join(10)
        assert found
    found[0].close()
    assert not part.exists()


def test_leavings_of_a_crash_make_room(server, corpus, tmp_path):
    shards = shards_of(corpus)
    (tmp_path / f"{'0' * 64}.part").write_bytes(bytes(shards[0].bytes))
    cache = ShardCache(tmp_path, limit=shards[0].bytes, timeout_s=5)
    cache.open(server.address, shards[0]).close()
    assert [path.name for path in tmp_path.glob("*.*")] == [f"{shards[0].sha256}.tar"]


def test_other_filesystems_go_the_same_way(corpus, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(corpus), "/bucket/corpus", recursive=True)
    for address in ("memory://bucket/corpus", f"file://{corpus}"):
        reader = reader_of(address, settings(tmp_path / address[:4]))
        assert reader.numbered(37).tokens.tolist() == tokens_of(TRAIN, 37).tolist()
    memory.rm("/bucket", recursive=True)


def test_addresses_survive_a_path():
    assert address_of(Path("s3://bucket/a/b")) == "s3://bucket/a/b"
    assert address_of("https://host:80/a") == "https://host:80/a"
    assert address_of(Path("/data/a:b")) is None
    assert address_of("relative/folder") is None


@pytest.mark.parametrize("address", ["pipe:touch {}", "pipe://touch {}", "ssh://host/x", "http://x::pipe:touch {}"])
@pytest.mark.fault("F62")
def test_no_address_is_run(tmp_path, address):
    witness = tmp_path / "run"
    for corpus in (address.format(witness), Path(address.format(witness))):
        with pytest.raises(ConfigError, match="commands are never run for an address"):
            CorpusSource.at(corpus, settings(tmp_path))
    assert not witness.exists()


def test_an_address_without_a_cache_or_a_corpus_is_refused(server, tmp_path):
    with pytest.raises(ConfigError, match=r"name a folder for its shards with --data.cache"):
        CorpusSource.at(server.address, DataConfig())
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        CorpusSource.at(f"{server.address}/nowhere", settings(tmp_path))
