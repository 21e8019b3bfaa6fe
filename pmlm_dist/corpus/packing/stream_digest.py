"""A number that proves that every token of every document is in exactly one sample, in its place.

The kept documents of a unit and split, one after another, are a stream of tokens. Its digest is the sum over positions
p of w(unit, p) (token + 1) modulo 2**64, with pseudo-random odd weights w; that of a split is the sum over its units.
It is taken from the documents, before they are packed, and again from the samples in the shards (verify.py): a token
lost, doubled, changed or moved changes it, but for a chance of about 2**-63.

Where a sample belongs follows from its place: samples are in the order of keys drawn from (unit, number), so the
numbers of samples of every unit (`origins.npy`, int64 [units, splits]) give them all.
"""

from __future__ import annotations

import numpy as np

from pmlm_dist.corpus.packing.packer import continued, draw, draws
from pmlm_dist.corpus.prepare.sampling import FOR_ORDER, FOR_PROOF

ORIGINS = "origins.npy"
_AT_ONCE = 1 << 16
_WORD = (1 << 64) - 1
_NOTHING = np.empty(0, np.int64)


def base(*, seed: int, split: int, unit: int) -> int:
    """What the weights of a stream are drawn from."""
    return draw(FOR_PROOF, seed, split, unit)


def digest(tokens: np.ndarray, bases: np.ndarray | np.uint64, positions: np.ndarray) -> int:
    """Digest of `tokens` at `positions` of their streams; `bases`: one for all, or one for each."""
    weights = continued(bases, positions) | np.uint64(1)
    return int((weights * (tokens.astype(np.uint64) + np.uint64(1))).sum(dtype=np.uint64))


class StreamDigest:
    """Digest of a stream whose documents come one by one; also how often each token occurs in it."""

    def __init__(self, vocabulary_size: int, *, seed: int, split: int, unit: int):
        self.counts = np.zeros(vocabulary_size, np.int64)
        self.digest = 0
        self._base = np.uint64(base(seed=seed, split=split, unit=unit))
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
        positions = np.arange(self._position, self._position + len(tokens))
        self.digest = self.digest + digest(tokens, self._base, positions) & _WORD
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        self._position += len(tokens)
        self._waiting, self._waiting_tokens = [], 0


def order_key(*, seed: int, split: int, unit: int, number: int) -> int:
    """The key that sample `number` of a unit and split is sorted by."""
    return draw(FOR_ORDER, seed, split, unit, number)


def places_in_streams(
    samples_of_units: np.ndarray, lengths: np.ndarray, *, seed: int, split: int
) -> tuple[np.ndarray, np.ndarray]:
    """Unit of every sample of a split, and position in its stream at which it begins, in the order of the corpus.

    `samples_of_units`: number of samples of every unit; `lengths`: content tokens of every sample in the corpus' order.
    """
    numbers = [np.arange(count) for count in samples_of_units]
    keys = [draws(FOR_ORDER, seed, split, unit, last=last) for unit, last in enumerate(numbers)]
    units, number = np.repeat(np.arange(len(numbers)), samples_of_units), np.concatenate([_NOTHING, *numbers])
    order = np.lexsort((number, units, np.concatenate([_NOTHING.astype(np.uint64), *keys])))
    ends = np.zeros(len(order) + 1, np.int64)
    ends[order + 1] = lengths
    np.cumsum(ends, out=ends)
    first = np.cumsum(samples_of_units) - samples_of_units
    return units[order], ends[order] - ends[first[units[order]]]
