"""Streams: from global sample indices to token ids, read from the shards of one corpus or several.

    t --Mixture--> (source, t') --SampleOrder--> (epoch, shard, index) --ShardReader--> token ids

Each lane keeps its current shard open and closes it before it opens the next one. A rank therefore holds one open shard
per lane and source, and a seek costs at most one opened shard per lane and source.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pmlm_dist.config import ConfigError, DataConfig
from pmlm_dist.corpus.shards import TRAIN, Manifest, Shard, ShardError, ShardReader, open_shard
from pmlm_dist.data.cache import CacheError, ShardCache, fetch_metadata
from pmlm_dist.data.mixture import Mixture
from pmlm_dist.data.order import SampleAddress, SampleOrder
from pmlm_dist.data.remote_files import parse_address


class Sample(NamedTuple):
    """One sequence of the corpus."""

    tokens: np.ndarray
    """Token ids [n] with [CLS] and [SEP]."""
    sample_id: int
    """Index of the sample in its split; in a mixture, counted over the splits of all sources in turn."""
    epoch: int
    """Epoch of its source in which it is read."""


@dataclass(frozen=True)
class CorpusSource:
    """A corpus to read samples from."""

    folder: Path
    """Folder with manifest and vocabulary, and with the shards unless `address` is set."""
    address: str | None = None
    """Remote address of the shards."""
    weight: float = 1.0
    """Share in a mixture, on any scale."""

    @classmethod
    def open(cls, corpus: Path | str, data: DataConfig, *, weight: float = 1.0) -> CorpusSource:
        """Return the corpus in a folder or at an address; manifest and vocabulary of the latter are fetched.

        Raises ConfigError for an address that is not allowed, has no cache, or cannot be fetched from.
        """
        address = parse_address(corpus, allow_pipe=data.allow_pipe)
        if address is None:
            return cls(Path(corpus), weight=weight)
        if data.cache is None:
            raise ConfigError([f"corpus {address} is remote: name a folder for its shards with --data.cache"])
        folder = fetch_metadata(address, Path(data.cache).expanduser(), timeout_s=data.transfer_timeout_s)
        return cls(folder, address, weight)

    @property
    def name(self) -> str:
        return self.address or str(self.folder)

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest, loaded on first use. Raises ConfigError if it is missing or invalid."""
        return Manifest.load(self.folder)


@dataclass(frozen=True)
class ShardAccess:
    """How shards are opened: with retries, and through a cache if they are remote."""

    retries: int = 0
    first_wait_s: float = 1.0
    """Seconds before the first retry; doubled for each further one."""
    cache: ShardCache | None = None

    @classmethod
    def from_config(cls, data: DataConfig) -> ShardAccess:
        folder = Path(data.cache).expanduser() if data.cache else None
        limit = int(data.cache_gib * 2**30)
        cache = ShardCache(folder, limit=limit, timeout_s=data.transfer_timeout_s) if folder else None
        return cls(data.retries, data.retry_wait_s, cache)

    def open(self, source: CorpusSource, shard: Shard) -> ShardReader:
        """Return a verified reader of `shard`. Raises ShardError after the last retry."""
        manifest = source.manifest
        jitter = random.Random()  # ranks that fail together must not retry together
        for attempt in range(self.retries + 1):
            try:
                file, longest = self._open_file(source, shard), manifest.sequence_length
                return ShardReader(source.folder, shard, manifest.token_dtype, file=file, longest=longest)
            except ShardError:
                # A cached file that fails verification would fail again: fetch it again.
                if self.cache is not None and source.address is not None:
                    self.cache.drop(shard)
                if attempt == self.retries:
                    raise
                time.sleep(self.first_wait_s * 2**attempt * jitter.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")

    def _open_file(self, source: CorpusSource, shard: Shard) -> FileIO:
        if source.address is None:
            return open_shard(source.folder / shard.name, shard)
        assert self.cache is not None, "CorpusSource.open() requires a cache for an address"
        return self.cache.open(source.address, shard)


class SplitReader:
    """Random access to the samples of one split; `sizes` are the samples per shard.

    Raises ShardError for a missing or corrupt shard, when it is opened or read.
    """

    def __init__(self, source: CorpusSource | Path, *, split: str, access: ShardAccess | None = None):
        self._source = source if isinstance(source, CorpusSource) else CorpusSource(source)
        self._access = access or ShardAccess()
        self.shards = self._source.manifest.splits[split].shards
        self.sizes = tuple(shard.samples for shard in self.shards)
        self._ends = np.cumsum(self.sizes, dtype=np.int64)
        self._open: dict[int, tuple[int, ShardReader]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.sizes else 0

    def tokens(self, shard: int, index: int, *, lane: int = 0) -> np.ndarray:
        """Return the token ids of a sample; the shard stays open until `lane` reads another one."""
        return self._reader(shard, lane=lane)[index]

    def is_open(self, shard: int, *, lane: int) -> bool:
        return self._open.get(lane, (None, None))[0] == shard

    def sample(self, number: int) -> Sample:
        """Return sample `number` of the split, in epoch 0; IndexError if out of range."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of a split with {len(self)} samples")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        index = number - int(self._ends[shard]) + self.sizes[shard]
        return Sample(self.tokens(shard, index), number, 0)

    def close(self) -> None:
        for lane in list(self._open):
            self._close(lane)

    def prefetch(self, shard: int) -> None:
        """Start to fetch a remote shard that is read next; no effect for a local one."""
        if self._prefetcher is not None:
            self._prefetcher.submit(self.shards[shard])

    # On first use, so that readers that never prefetch start no thread.
    @cached_property
    def _prefetcher(self) -> _ShardPrefetcher | None:
        if self._source.address is None or self._access.cache is None:
            return None
        return _ShardPrefetcher(self._access.cache, self._source.address)

    def _reader(self, shard: int, *, lane: int) -> ShardReader:
        if not self.is_open(shard, lane=lane):
            self._close(lane)
            self._open[lane] = (shard, self._access.open(self._source, self.shards[shard]))
        return self._open[lane][1]

    def _close(self, lane: int) -> None:
        if lane in self._open:
            _, reader = self._open.pop(lane)
            reader.close()


class _ShardPrefetcher:
    """A thread that fetches shards into the cache before they are opened."""

    def __init__(self, cache: ShardCache, address: str):
        self._cache, self._address = cache, address
        self._queue: queue.SimpleQueue[Shard] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="shard-prefetch", daemon=True).start()

    def submit(self, shard: Shard) -> None:
        """Fetch `shard` after those submitted before."""
        self._queue.put(shard)

    def _run(self) -> None:
        while True:
            shard = self._queue.get()
            try:
                self._cache.prefetch(self._address, shard)
            except (ShardError, CacheError):
                continue  # opening the shard fails in the same way, and reports it


class TrainingStream:
    """The training splits of `sources`, mixed by weight, as an infinite stream in the order of `SampleOrder`.

    `quarantined`: sha256 of the shards to exclude; `SampleOrder.locate` describes the samples that replace theirs.
    """

    def __init__(
        self,
        sources: Sequence[CorpusSource],
        *,
        lanes: int,
        seed: int,
        access: ShardAccess | None = None,
        quarantined: Set[str] = frozenset(),
    ):
        self._sources = tuple(sources)
        self._readers = [SplitReader(source, split=TRAIN, access=access) for source in sources]
        self._mixture = Mixture([source.weight for source in sources], lanes=lanes)
        self._orders = [SampleOrder(reader.sizes, lanes=lanes, seed=seed) for reader in self._readers]
        self._excluded = [
            frozenset(number for number, shard in enumerate(reader.shards) if shard.sha256 in quarantined)
            for reader in self._readers
        ]
        self._first_ids = np.cumsum([0, *(len(reader) for reader in self._readers)]).tolist()
        self._lanes = lanes

    def __getitem__(self, t: int) -> Sample:
        source, number, address = self._locate(t)
        reader, lane = self._readers[source], t % self._lanes
        if not reader.is_open(address.shard, lane=lane):
            # The lane starts a shard: there is time to fetch its next one while this one is read.
            reader.prefetch(self._orders[source].next_shard(number, excluded=self._excluded[source]))
        tokens = reader.tokens(address.shard, address.index, lane=lane)
        return Sample(tokens, self._first_ids[source] + self._orders[source].sample_id(address), address.epoch)

    def describe(self, t: int) -> str:
        """Return the index, split index and shard of global sample `t`, for an error message."""
        source, _, address = self._locate(t)
        shard, sample = self._readers[source].shards[address.shard].name, self._orders[source].sample_id(address)
        return f"global sample {t} (sample {sample} of {self._sources[source].name}, shard {shard})"

    def _locate(self, t: int) -> tuple[int, int, SampleAddress]:
        source, number = self._mixture.locate(t)
        return source, number, self._orders[source].locate(number, excluded=self._excluded[source])
