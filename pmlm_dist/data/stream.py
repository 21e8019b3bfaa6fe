"""Streams: from global sample numbers to token ids, read from the shards of one corpus or several.

    t --Mixture--> (source, t') --SampleOrder--> (epoch, shard, index) --ShardReader--> token ids

Each lane keeps the one shard open that it reads and closes it when it moves on, so a rank holds as many shards open as
it has lanes (of each source), and a seek costs no read but the opening of a shard in each.
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

from pmlm_dist.config import DataConfig, raise_if_any
from pmlm_dist.corpus.shards import TRAIN, Manifest, Shard, ShardError, ShardReader, TokenDtype, open_shard
from pmlm_dist.data.cache import CacheError, ShardCache, mirror
from pmlm_dist.data.mixture import Mixture
from pmlm_dist.data.order import SampleAddress, SampleOrder
from pmlm_dist.data.remote_files import address_of


class Sample(NamedTuple):
    """One sequence of the corpus."""

    tokens: np.ndarray
    """Token ids [n] with [CLS] and [SEP]."""
    sample_id: int
    """Number of the sample in its split; in a mixture the splits of the sources are counted through."""
    epoch: int
    """Epoch of its source in which it is read."""


@dataclass(frozen=True)
class CorpusSource:
    """A corpus that is read."""

    folder: Path
    """Folder of manifest and vocabulary; of the shards, too, unless there is an address."""
    address: str | None = None
    """Where the shards are fetched from."""
    weight: float = 1.0
    """Its share of a mixture, on any scale."""

    @property
    def name(self) -> str:
        """What it is called in logs."""
        return self.address or str(self.folder)

    @classmethod
    def at(cls, corpus: Path | str, data: DataConfig, *, weight: float = 1.0) -> CorpusSource:
        """The corpus in a folder or at an address, whose manifest and vocabulary are then fetched into the cache.

        Raises ConfigError for an address that is not allowed, without a cache, or where nothing can be fetched.
        """
        address = address_of(corpus, allow_pipe=data.allow_pipe)
        if address is None:
            return cls(Path(corpus), weight=weight)
        if data.cache is None:
            raise_if_any([f"corpus {address} is not on this machine: name a folder for its shards with --data.cache"])
        cache = Path(data.cache or "").expanduser()
        return cls(mirror(address, cache, timeout_s=data.transfer_timeout_s), address, weight)


@dataclass(frozen=True)
class ShardAccess:
    """How shards are opened: again and again where that fails, through a cache where they are elsewhere."""

    retries: int = 0
    first_wait_s: float = 1.0
    """Seconds before the second attempt; before each further one twice as many."""
    cache: ShardCache | None = None

    @classmethod
    def of(cls, data: DataConfig) -> ShardAccess:
        """As the settings say."""
        folder = Path(data.cache).expanduser() if data.cache else None
        limit = int(data.cache_gib * 2**30)
        cache = ShardCache(folder, limit=limit, timeout_s=data.transfer_timeout_s) if folder else None
        return cls(data.retries, data.retry_wait_s, cache)

    def open(self, source: CorpusSource, shard: Shard, *, token_dtype: TokenDtype, longest: int) -> ShardReader:
        """A verified reader of `shard`. Raises ShardError after the last attempt."""
        spread = random.Random()  # ranks that failed together are not to come back together
        for attempt in range(self.retries + 1):
            try:
                file = self._file(source, shard)
                return ShardReader(source.folder, shard, token_dtype, file=file, longest=longest)
            except ShardError:
                if self.cache is not None and source.address is not None:
                    self.cache.drop(shard)
                if attempt == self.retries:
                    raise
                time.sleep(self.first_wait_s * 2**attempt * spread.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")

    def _file(self, source: CorpusSource, shard: Shard) -> FileIO:
        if source.address is None:
            return open_shard(source.folder / shard.name, shard)
        assert self.cache is not None, "resolve() refuses an address without a cache"
        return self.cache.open(source.address, shard)


class SplitReader:
    """Samples of one split by address or number; `sizes` are the samples of each shard.

    Raises ShardError for a shard that is missing or damaged.
    """

    def __init__(self, source: CorpusSource | Path, *, split: str, access: ShardAccess | None = None):
        self._source = source if isinstance(source, CorpusSource) else CorpusSource(source)
        self._access = access or ShardAccess()
        manifest = Manifest.load(self._source.folder)
        self.shards = manifest.splits[split].shards
        self.sizes = tuple(shard.samples for shard in self.shards)
        self._ends = np.cumsum(self.sizes, dtype=np.int64)
        self._token_dtype: TokenDtype = manifest.token_dtype
        self._longest = manifest.sequence_length
        self._open: dict[int, tuple[int, ShardReader]] = {}

    def __len__(self) -> int:
        """Number of samples."""
        return int(self._ends[-1]) if self.sizes else 0

    def tokens(self, shard: int, index: int, *, lane: int = 0) -> np.ndarray:
        """Token ids of a sample; `lane` keeps the shard open until it asks for another one."""
        return self._reader(shard, lane=lane)[index]

    def is_open(self, shard: int, *, lane: int) -> bool:
        """Whether `lane` holds `shard` open."""
        return self._open.get(lane, (None, None))[0] == shard

    def numbered(self, number: int) -> Sample:
        """Sample `number` of the split, in epoch 0; IndexError past its end."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of a split with {len(self)} samples")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        index = number - int(self._ends[shard]) + self.sizes[shard]
        return Sample(self.tokens(shard, index), number, 0)

    @property
    def open_shards(self) -> int:
        """Number of shards held open."""
        return len(self._open)

    def close(self) -> None:
        """Close every shard."""
        for lane in list(self._open):
            self._close(lane)

    @cached_property
    def _ahead(self) -> _FetchAhead | None:
        if self._source.address is None or self._access.cache is None:
            return None
        return _FetchAhead(self._access.cache, self._source.address)

    def fetch_ahead(self, shard: int) -> None:
        """Begin to fetch a shard that will be read next, if it is elsewhere."""
        if self._ahead is not None:
            self._ahead.want(self.shards[shard])

    def _reader(self, shard: int, *, lane: int) -> ShardReader:
        if not self.is_open(shard, lane=lane):
            self._close(lane)
            reader = self._access.open(
                self._source, self.shards[shard], token_dtype=self._token_dtype, longest=self._longest
            )
            self._open[lane] = (shard, reader)
        return self._open[lane][1]

    def _close(self, lane: int) -> None:
        if lane in self._open:
            _, reader = self._open.pop(lane)
            reader.close()


class _FetchAhead:
    """A thread that fetches shards before they are read. What fails here is met, and told, when the shard is opened."""

    def __init__(self, cache: ShardCache, address: str):
        self._cache, self._address = cache, address
        self._wanted: queue.SimpleQueue[Shard] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="fetch-ahead", daemon=True).start()

    def want(self, shard: Shard) -> None:
        """Fetch `shard` as soon as those wanted before are there."""
        self._wanted.put(shard)

    def _run(self) -> None:
        while True:
            shard = self._wanted.get()
            try:
                self._cache.fetch_ahead(self._address, shard)
            except (ShardError, CacheError):
                continue


class TrainingStream:
    """The training splits of `sources`, mixed by their weights, without end, in the order of `SampleOrder`.

    `quarantined`: sha256 of the shards that are not to be read; see `SampleOrder.locate` for what takes their place.
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
        self._bad = [
            frozenset(number for number, shard in enumerate(reader.shards) if shard.sha256 in quarantined)
            for reader in self._readers
        ]
        self._first_ids = np.cumsum([0, *(len(reader) for reader in self._readers)]).tolist()
        self._lanes = lanes

    def __getitem__(self, t: int) -> Sample:
        """Global sample `t`."""
        source, number, address = self._locate(t)
        reader, lane = self._readers[source], t % self._lanes
        if not reader.is_open(address.shard, lane=lane):
            reader.fetch_ahead(self._orders[source].next_shard(number, bad=self._bad[source]))
        tokens = reader.tokens(address.shard, address.index, lane=lane)
        return Sample(tokens, self._sample_id(source, address), address.epoch)

    def describe(self, t: int) -> str:
        """Global sample `t`, its number in its split, and its shard, for an error."""
        source, _, address = self._locate(t)
        shard = self._readers[source].shards[address.shard].name
        sample = self._sample_id(source, address) - self._first_ids[source]
        return f"global sample {t} (sample {sample} of {self._sources[source].name}, shard {shard})"

    def _locate(self, t: int) -> tuple[int, int, SampleAddress]:
        source, number = self._mixture.locate(t)
        return source, number, self._orders[source].locate(number, bad=self._bad[source])

    def _sample_id(self, source: int, address: SampleAddress) -> int:
        return self._first_ids[source] + self._orders[source].sample_id(address)
