"""Streams: from global sample numbers to token ids, read from the shards of a corpus.

    t --SampleOrder--> (epoch, shard, index) --ShardReader--> token ids

Each lane keeps the one shard open that it reads and closes it when it moves on, so a rank holds as many shards open as
it has lanes, and a seek costs no read but the opening of a shard in each.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pmlm_dist.corpus.shards import TRAIN, Manifest, ShardReader, TokenDtype
from pmlm_dist.data.order import SampleOrder


class Sample(NamedTuple):
    """One sequence of the corpus."""

    tokens: np.ndarray
    """Token ids [n] with [CLS] and [SEP]."""
    sample_id: int
    """Number of the sample in its split."""
    epoch: int
    """Epoch in which it is read."""


class SplitReader:
    """Samples of one split by address or number; `sizes` are the samples of each shard.

    Raises ShardError for a shard that is missing or damaged.
    """

    def __init__(self, corpus: Path, *, split: str):
        manifest = Manifest.load(corpus)
        self._corpus = corpus
        self._shards = manifest.splits[split].shards
        self.sizes = tuple(shard.samples for shard in self._shards)
        self._ends = np.cumsum(self.sizes, dtype=np.int64)
        self._token_dtype: TokenDtype = manifest.token_dtype
        self._open: dict[int, tuple[int, ShardReader]] = {}

    def __len__(self) -> int:
        """Number of samples."""
        return int(self._ends[-1]) if self.sizes else 0

    def tokens(self, shard: int, index: int, *, lane: int = 0) -> np.ndarray:
        """Token ids of a sample; `lane` keeps the shard open until it asks for another one."""
        number, reader = self._open.get(lane, (None, None))
        if reader is None or number != shard:
            self._close(lane)
            reader = ShardReader(self._corpus, self._shards[shard], self._token_dtype)
            self._open[lane] = (shard, reader)
        return reader[index]

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

    def _close(self, lane: int) -> None:
        if lane in self._open:
            _, reader = self._open.pop(lane)
            reader.close()


class TrainingStream:
    """The training split without end, in the order of `SampleOrder`."""

    def __init__(self, corpus: Path, *, lanes: int, seed: int):
        self._reader = SplitReader(corpus, split=TRAIN)
        self._order = SampleOrder(self._reader.sizes, lanes=lanes, seed=seed)

    def __getitem__(self, t: int) -> Sample:
        """Global sample `t`."""
        address = self._order.locate(t)
        tokens = self._reader.tokens(address.shard, address.index, lane=t % self._order.lanes)
        return Sample(tokens, self._order.sample_id(address), address.epoch)
