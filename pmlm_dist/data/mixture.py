"""Mixture: which corpus each global sample comes from. A pure function of (weights, lanes, t).

    shares of a period of 1000 samples, by largest remainders:  a 0.7, b 0.3 -> 700, 300
    one period, as even as it can be:                           a b a a b a a a b a ...
    lane l of L begins l/L of a period further on               so that every step holds all sources in their shares
    element j of a lane that is its n-th of source k            is element n of the same lane of source k's own order

The samples of a source are then read in its own order (`order.py`), as by a run that reads nothing else, only slower:
each exactly once in an epoch of the source. Nothing is counted while training; where a source stands follows from t.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERIOD = 1000
"""Samples of a lane in which every source has just its share: weights are kept to a thousandth."""


class Mixture:
    """How the samples of `lanes` lanes are dealt to sources of these `weights` (any scale, all positive)."""

    def __init__(self, weights: Sequence[float], *, lanes: int):
        self.shares = shares_of_period(weights)
        self._lanes = lanes
        pattern = _even_pattern(self.shares)
        self._pattern: list[int] = pattern.tolist()
        # For each source: how many of the first i samples of a period are its own. Lists: single numbers are looked up.
        self._before = [[0, *np.cumsum(pattern == source).tolist()] for source in range(len(weights))]

    def locate(self, t: int) -> tuple[int, int]:
        """Source of global sample `t`, and which global sample it is of a run on that source alone."""
        element, lane = divmod(t, self._lanes)
        start = self._start(lane)
        source = self._pattern[(start + element) % PERIOD]
        number = self._count(source, start + element) - self._count(source, start)
        return source, number * self._lanes + lane

    def counts(self, samples: int) -> list[int]:
        """Samples of each source among the global samples 0 .. `samples` - 1."""
        elements, further = divmod(samples, self._lanes)
        stretches = [(self._start(lane), elements + (lane < further)) for lane in range(self._lanes)]
        return [
            sum(self._count(source, start + length) - self._count(source, start) for start, length in stretches)
            for source in range(len(self.shares))
        ]

    def _start(self, lane: int) -> int:
        return lane * PERIOD // self._lanes

    def _count(self, source: int, place: int) -> int:
        """Samples of `source` among the first `place` of the endless pattern."""
        periods, rest = divmod(place, PERIOD)
        return periods * self.shares[source] + self._before[source][rest]


def shares_of_period(weights: Sequence[float]) -> tuple[int, ...]:
    """`weights` as whole shares of a period, by largest remainders; ValueError for one that rounds to nothing."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * PERIOD
    shares = np.floor(exact).astype(np.int64)
    most_left_over = np.argsort(shares - exact, kind="stable")
    shares[most_left_over[: PERIOD - int(shares.sum())]] += 1
    if shares.min() < 1:
        raise ValueError(f"weights {list(weights)}: the smallest must be at least a thousandth of their sum")
    return tuple(shares.tolist())


def _even_pattern(shares: Sequence[int]) -> np.ndarray:
    """Each time the source that lags most behind its share, the first of equals."""
    wanted, taken = np.array(shares, dtype=np.int64), np.zeros(len(shares), dtype=np.int64)
    pattern = np.empty(PERIOD, dtype=np.int64)
    for place in range(PERIOD):
        source = int(np.argmax(wanted * (place + 1) - taken * PERIOD))
        pattern[place] = source
        taken[source] += 1
    return pattern
