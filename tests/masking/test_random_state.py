"""The random numbers of masks are uniform; their exact values are compared in test_blockwise.py."""

from collections import Counter

import numpy as np
import pytest

from pmlm_dist.masking.random_state import below, seed_state, uniform


def test_uniform_and_below_are_uniform():
    state = np.array([seed_state(1, 2, 3)], dtype=np.uint64)
    reals = np.array([uniform(state) for _ in range(20_000)])
    counts = Counter(below(state, 7) for _ in range(70_000))
    assert reals.min() >= 0.0
    assert reals.max() < 1.0
    assert np.histogram(reals, bins=10, range=(0, 1))[0] == pytest.approx([2000] * 10, abs=200)
    assert [counts[number] for number in range(7)] == pytest.approx([10_000] * 7, abs=500)
