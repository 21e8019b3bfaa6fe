"""Stream digest: a checksum over all tokens of all documents that shows that packing lost and moved none.

The kept documents of a unit and split, one after another, are a stream of tokens. Its digest is the sum over positions
p of w(unit, p) (token + 1) modulo 2**64, with pseudo-random odd weights w. The digest of a split is the sum over its
units. It is computed from the documents before packing, and again from the samples in the shards (verify.py). A lost,
repeated, changed or moved token changes it, except with a probability of about 2**-63.

The stream position of a sample follows from its position in the corpus. Samples are sorted by keys hashed from (unit,
number), so the number of samples of each unit (`unit_samples.npy`, int64 [units, splits]) determines all of them.
"""

import numpy as np

from pmlm_dist.corpus.hashing import FOR_DIGEST, FOR_ORDER, extend_hash64, hash64, hash64_each

UNIT_SAMPLES = "unit_samples.npy"
_BATCH_TOKENS = 1 << 16
_WORD = (1 << 64) - 1
_NONE = np.empty(0, np.int64)


def stream_hash(*, seed: int, split: int, unit: int) -> int:
    """Return the hash from which the weights of a stream follow."""
    return hash64(FOR_DIGEST, seed, split, unit)


def token_digest(tokens: np.ndarray, stream_hashes: np.ndarray | np.uint64, positions: np.ndarray) -> int:
    """Return the digest of `tokens` [N] at `positions` [N] of their streams; `stream_hashes`: scalar or [N]."""
    # Odd weights are invertible modulo 2**64: a change of a single token always changes the digest.
    weights = extend_hash64(stream_hashes, positions) | np.uint64(1)
    return int((weights * (tokens.astype(np.uint64) + np.uint64(1))).sum(dtype=np.uint64))


class StreamDigest:
    """Digest and token counts of a stream whose documents are added one by one."""

    def __init__(self, vocabulary_size: int, *, seed: int, split: int, unit: int):
        self.counts = np.zeros(vocabulary_size, np.int64)
        self.digest = 0
        self._stream_hash = np.uint64(stream_hash(seed=seed, split=split, unit=unit))
        self._position = 0
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0

    def add(self, ids: np.ndarray) -> None:
        self._pending.append(ids)
        self._pending_tokens += len(ids)
        if self._pending_tokens >= _BATCH_TOKENS:  # a few large array operations instead of many small ones
            self.finish()

    def finish(self) -> None:
        """Include the pending documents."""
        if not self._pending:
            return
        tokens = np.concatenate(self._pending)
        positions = np.arange(self._position, self._position + len(tokens))
        self.digest = self.digest + token_digest(tokens, self._stream_hash, positions) & _WORD
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        self._position += len(tokens)
        self._pending, self._pending_tokens = [], 0


def order_key(*, seed: int, split: int, unit: int, number: int) -> int:
    """Return the sort key of sample `number` of a unit and split."""
    return hash64(FOR_ORDER, seed, split, unit, number)


def locate_in_streams(
    unit_samples: np.ndarray, lengths: np.ndarray, *, seed: int, split: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return unit and first stream position of every sample of a split, each [N], in the order of the corpus.

    `unit_samples`: [units], number of samples of each unit. `lengths`: [N], content tokens of each sample.
    """
    numbers = [np.arange(count) for count in unit_samples]
    keys = [hash64_each(FOR_ORDER, seed, split, unit, last=last) for unit, last in enumerate(numbers)]
    units, number = np.repeat(np.arange(len(numbers)), unit_samples), np.concatenate([_NONE, *numbers])
    order = np.lexsort((number, units, np.concatenate([_NONE.astype(np.uint64), *keys])))
    # Undo the sort: cumulative lengths in the order (unit, number), relative to the first sample of the unit.
    ends = np.zeros(len(order) + 1, np.int64)
    ends[order + 1] = lengths
    np.cumsum(ends, out=ends)
    first = np.cumsum(unit_samples) - unit_samples
    return units[order], ends[order] - ends[first[units[order]]]
