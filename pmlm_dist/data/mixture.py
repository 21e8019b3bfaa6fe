"""Mixture: the source corpus of each global sample. A pure function of (weights, lanes, t).

    shares of a period of 1000 samples, by largest remainders:  a 0.7, b 0.3 -> 700, 300
    one period, as even as possible:                            a b a a b a a a b a ...
    lane l of L starts at l/L of a period                       so that every step has all sources in their shares
    element j of a lane, its n-th of source k                   is element n of the same lane in source k's own order

Each source is read in its own order (`order.py`), as by a run on that source alone, only slower: each sample exactly
once per epoch of the source. No counters are kept during training; the position in each source follows from t.
"""

from collections.abc import Sequence

import numpy as np

PERIOD = 1000
"""Samples of a lane in which every source has exactly its share: weights are rounded to a thousandth."""


class Mixture:
    """Assignment of the samples of `lanes` lanes to sources with these `weights` (any scale, all positive)."""

    def __init__(self, weights: Sequence[float], *, lanes: int):
        self.shares = shares_of_period(weights)
        self._lanes = lanes
        pattern = _even_pattern(self.shares)
        self._pattern: list[int] = pattern.tolist()
        # For each source: its samples among the first i of a period. Lists, because indexing one element of a NumPy
        # array is several times slower.
        self._before = [[0, *np.cumsum(pattern == source).tolist()] for source in range(len(weights))]

    def locate(self, t: int) -> tuple[int, int]:
        """Return the source of global sample `t`, and its global sample index in a run on that source alone."""
        element, lane = divmod(t, self._lanes)
        start = self._start(lane)
        source = self._pattern[(start + element) % PERIOD]
        number = self._count(source, start + element) - self._count(source, start)
        return source, number * self._lanes + lane

    def counts(self, samples: int) -> list[int]:
        """Return the number of samples of each source among the global samples 0 .. `samples` - 1."""
        elements, remainder = divmod(samples, self._lanes)
        spans = [(self._start(lane), elements + (lane < remainder)) for lane in range(self._lanes)]
        return [
            sum(self._count(source, start + length) - self._count(source, start) for start, length in spans)
            for source in range(len(self.shares))
        ]

    def _start(self, lane: int) -> int:
        # Lanes with equal phases would give whole steps of one source.
        return lane * PERIOD // self._lanes

    def _count(self, source: int, length: int) -> int:
        """Return the number of samples of `source` among the first `length` of the infinite pattern."""
        periods, rest = divmod(length, PERIOD)
        return periods * self.shares[source] + self._before[source][rest]


def shares_of_period(weights: Sequence[float]) -> tuple[int, ...]:
    """Round `weights` to integer shares of a period by largest remainders; ValueError if one rounds to zero."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * PERIOD
    shares = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(shares - exact, kind="stable")
    shares[by_remainder[: PERIOD - int(shares.sum())]] += 1
    if shares.min() < 1:
        raise ValueError(f"weights {list(weights)}: the smallest must be at least a thousandth of their sum")
    return tuple(shares.tolist())


def _even_pattern(shares: Sequence[int]) -> np.ndarray:
    """Choose, at each position, the source that is furthest behind its share; the first of equals."""
    target, assigned = np.array(shares, dtype=np.int64), np.zeros(len(shares), dtype=np.int64)
    pattern = np.empty(PERIOD, dtype=np.int64)
    for position in range(PERIOD):
        # In integers: ties, and with them the order, must not depend on rounding.
        source = int(np.argmax(target * (position + 1) - assigned * PERIOD))
        pattern[position] = source
        assigned[source] += 1
    return pattern
