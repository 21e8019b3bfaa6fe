"""A number that proves that every token of every document is in exactly one sample, in its place.

The kept documents of a unit and split, one after another, are a stream of tokens. Its digest is the sum over positions
p of w(unit, p) (token + 1) modulo 2**64, with pseudo-random odd weights w; that of a split is the sum over its units.
It is taken from the documents, before they are packed, and again from the samples in the shards: a token lost, doubled,
changed or moved changes it, but for a chance of about 2**-63.

Where a sample belongs follows from its place: samples are in the order of keys drawn from (unit, number), so the
numbers of samples of every unit (`origins.npy`, int64 [units, splits]) give them all.
"""

from __future__ import annotations

import numpy as np

from pmlm_dist.corpus.packing import draw, draws
from pmlm_dist.corpus.selection import FOR_ORDER, FOR_PROOF

ORIGINS = "origins.npy"
_AT_ONCE = 1 << 16
_WORD = (1 << 64) - 1


def digest(tokens: np.ndarray, *, seed: int, split: int, unit: int, start: int) -> int:
    """Digest of consecutive tokens of a stream, of which the first is at position `start`."""
    if not len(tokens):
        return 0
    positions = np.arange(start, start + len(tokens), dtype=np.uint64)
    weights = draws(FOR_PROOF, seed, split, unit, last=positions) | np.uint64(1)
    return int((weights * (tokens.astype(np.uint64) + np.uint64(1))).sum(dtype=np.uint64))


class StreamDigest:
    """Digest of a stream whose documents come one by one; also how often each token occurs in it."""

    def __init__(self, vocabulary_size: int, *, seed: int, split: int, unit: int):
        self.counts = np.zeros(vocabulary_size, np.int64)
        self.digest = 0
        self._place = {"seed": seed, "split": split, "unit": unit}
        self._position = 0
        self._waiting: list[np.ndarray] = []
        self._waiting_tokens = 0

    def add(self, ids: np.ndarray) -> None:
        """Take the next document."""
        self._waiting.append(ids)
        self._waiting_tokens += len(ids)
        if self._waiting_tokens >= _AT_ONCE:  # a few large operations in place of many small ones
            self.finish()

    def finish(self) -> None:
        """Count what waits."""
        if not self._waiting:
            return
        tokens = np.concatenate(self._waiting)
        self.digest = self.digest + digest(tokens, **self._place, start=self._position) & _WORD
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        self._position += len(tokens)
        self._waiting, self._waiting_tokens = [], 0


def order_key(*, seed: int, split: int, unit: int, number: int) -> int:
    """The key that sample `number` of a unit and split is sorted by."""
    return draw(FOR_ORDER, seed, split, unit, number)


def units_in_order(samples_of_units: np.ndarray, *, seed: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    """(unit, number) of every sample of a split in the order of the corpus, from every unit's number of samples."""
    units = np.repeat(np.arange(len(samples_of_units)), samples_of_units)
    numbers = [np.arange(count) for count in samples_of_units]
    keys = [draws(FOR_ORDER, seed, split, unit, last=last) for unit, last in enumerate(numbers)]
    number = np.concatenate([np.empty(0, np.int64), *numbers])
    order = np.lexsort((number, units, np.concatenate([np.empty(0, np.uint64), *keys])))
    return units[order], number[order]
