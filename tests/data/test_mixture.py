"""The mixture against counters."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmlm_dist.data.mixture import PERIOD, Mixture, shares_of_period

WEIGHTS = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(weights=WEIGHTS, lanes=st.integers(1, 70), last=st.integers(0, 3000))
def test_mixture_locates_samples_like_counters_per_lane(weights, lanes, last):
    mixture, per_lane = Mixture(weights, lanes=lanes), Counter()
    per_source: Counter[int] = Counter()
    for t in range(last):
        source, number = mixture.locate(t)
        assert number == per_lane[source, t % lanes] * lanes + t % lanes
        per_lane[source, t % lanes] += 1
        per_source[source] += 1
    assert mixture.counts(last) == [per_source[source] for source in range(len(weights))]


@settings(max_examples=50, deadline=None)
@given(weights=WEIGHTS)
def test_period_has_exact_shares_and_every_prefix_is_close(weights):
    mixture = Mixture(weights, lanes=1)
    assert sum(mixture.shares) == PERIOD
    for samples in (PERIOD, 7 * PERIOD):
        assert mixture.counts(samples) == [share * samples // PERIOD for share in mixture.shares]
    for samples in range(0, PERIOD, 37):
        for count, share in zip(mixture.counts(samples), mixture.shares, strict=True):
            assert abs(count - share * samples / PERIOD) < len(weights)


def test_shares_are_rounded_to_thousandths():
    assert shares_of_period([0.7, 0.3]) == (700, 300)
    assert shares_of_period([1, 1, 1]) == (334, 333, 333)
    assert shares_of_period([999, 1]) == (999, 1)
    with pytest.raises(ValueError, match="at least a thousandth"):
        shares_of_period([1.0, 0.0001])


def test_mixture_of_one_source_is_the_identity():
    mixture = Mixture([3.0], lanes=7)
    assert [mixture.locate(t) for t in range(2500)] == [(0, t) for t in range(2500)]


def test_every_step_has_all_sources_in_their_shares():
    mixture = Mixture([0.75, 0.25], lanes=64)
    for step in range(50):
        read = Counter(mixture.locate(t)[0] for t in range(step * 256, (step + 1) * 256))
        assert abs(read[1] - 64) <= 2
