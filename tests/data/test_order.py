"""The sample order against a longhand walk through the lanes, and between topologies."""

import random
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmlm_dist.config import ConfigError
from pmlm_dist.data.order import BatchShare, SampleAddress, SampleOrder, choose_lanes, micro_batch_samples

SIZES = (5, 1, 8, 3, 4, 9, 2, 6, 7, 5)


def samples_of_epoch(order: SampleOrder, *, epoch: int, last: int = 2000) -> list[SampleAddress]:
    return [address for t in range(last) if (address := order.locate(t)).epoch == epoch]


def walk(order: SampleOrder, *, lane: int, permutations: list[list[int]]) -> Iterator[SampleAddress]:
    """Yield the samples of a lane by definition: permutation[l::L] of each epoch, shard after shard."""
    for epoch, permutation in enumerate(permutations):
        for shard in permutation[lane :: order.lanes]:
            for index in range(SIZES[shard]):
                yield SampleAddress(epoch, shard, index)


def permutation_of(order: SampleOrder, *, epoch: int) -> list[int]:
    """Return the permutation of an epoch, reconstructed from the first sample of every shard, lane by lane."""
    firsts = [(t % order.lanes, t, order.locate(t)) for t in range(2000)]
    lanes = [
        [address.shard for at, _, address in firsts if at == lane and address.epoch == epoch and address.index == 0]
        for lane in range(order.lanes)
    ]
    return [lanes[position % order.lanes][position // order.lanes] for position in range(len(SIZES))]


@pytest.mark.parametrize("lanes", [1, 2, 3, 10])
def test_lanes_read_slices_of_a_permutation(lanes):
    order = SampleOrder(SIZES, lanes=lanes, seed=3)
    permutations = [permutation_of(order, epoch=epoch) for epoch in range(3)]
    assert all(sorted(permutation) == list(range(len(SIZES))) for permutation in permutations)
    assert len(set(map(tuple, permutations))) == 3
    for lane in range(lanes):
        for element, expected in enumerate(walk(order, lane=lane, permutations=permutations)):
            assert order.locate(element * lanes + lane) == expected


@pytest.mark.parametrize("lanes", [1, 4, 8])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_sample_is_read_once_per_epoch(lanes, epoch):
    order = SampleOrder(SIZES, lanes=lanes, seed=0)
    read = Counter(map(order.sample_id, samples_of_epoch(order, epoch=epoch)))
    assert read == Counter(range(sum(SIZES)))


def test_sample_ids_are_counted_in_manifest_order():
    order = SampleOrder(SIZES, lanes=2, seed=0)
    assert [order.sample_id(SampleAddress(0, shard, 0)) for shard in range(4)] == [0, 5, 6, 14]


def test_random_access_equals_sequential_access():
    sequential = SampleOrder(SIZES, lanes=4, seed=1)
    expected = [sequential.locate(t) for t in range(1000)]
    numbers = random.Random(0).sample(range(1000), 300)
    shuffled = SampleOrder(SIZES, lanes=4, seed=1)
    assert [shuffled.locate(t) for t in numbers] == [expected[t] for t in numbers]


def test_order_differs_between_seeds():
    orders = [tuple(map(SampleOrder(SIZES, lanes=2, seed=seed).locate, range(50))) for seed in range(5)]
    assert len(set(orders)) == 5


def test_order_is_stable_across_releases():
    """A run that is resumed after an upgrade keeps its order. The list: shards sorted by splitmix64, longhand."""
    order = SampleOrder(SIZES, lanes=2, seed=0)
    assert permutation_of(order, epoch=0) == [0, 9, 1, 6, 3, 5, 4, 2, 8, 7]


@settings(max_examples=100, deadline=None)
@given(
    dp_size=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 2, 3]),
    micro_batch=st.integers(1, 3),
    samples_consumed=st.integers(0, 10**6),
    step=st.integers(0, 5),
)
def test_ranks_partition_the_samples_of_a_step(dp_size, accumulation, micro_batch, samples_consumed, step):
    global_batch = dp_size * accumulation * micro_batch
    read: list[int] = []
    for rank in range(dp_size):
        share = BatchShare(global_batch, micro_batch, dp_rank=rank, dp_size=dp_size)
        assert share.accumulation == accumulation
        micro_steps = range(step * accumulation, (step + 1) * accumulation)
        rank_samples = [t for number in micro_steps for t in micro_batch_samples(samples_consumed, number, share=share)]
        assert rank_samples == sorted(rank_samples)
        assert all(t % dp_size == rank for t in rank_samples)
        read += rank_samples
    start = samples_consumed + step * global_batch
    assert sorted(read) == list(range(start, start + global_batch))


def test_samples_of_a_step_are_equal_under_every_topology():
    """Global batch 24 as 1x24, 2x6x2, 4x1x6, ...: the same samples in each of ten steps."""

    def steps(dp_size: int, micro_batch: int) -> list[set[SampleAddress]]:
        order = SampleOrder(SIZES, lanes=8, seed=0)
        shares = [BatchShare(24, micro_batch, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
        accumulation = shares[0].accumulation
        return [
            {
                order.locate(t)
                for share in shares
                for number in range(step * accumulation, (step + 1) * accumulation)
                for t in micro_batch_samples(48, number, share=share)
            }
            for step in range(10)
        ]

    expected = steps(1, 24)
    assert all(len(step) == 24 for step in expected)
    for dp_size, micro_batch in [(1, 1), (1, 8), (2, 12), (2, 3), (4, 6), (4, 1)]:
        assert steps(dp_size, micro_batch) == expected


def test_rank_reads_whole_lanes():
    share = BatchShare(16, 2, dp_rank=1, dp_size=4)
    lanes = {t % 8 for number in range(20) for t in micro_batch_samples(16, number, share=share)}
    assert lanes == {1, 5}


@pytest.mark.parametrize(
    ("requested", "global_batch", "shards", "dp", "lanes"),
    [
        (None, 7680, 4000, 1, 64),
        (None, 7680, 4000, 64, 64),
        (None, 48, 4000, 4, 48),
        (None, 7680, 40, 8, 40),
        (None, 100, 64, 1, 50),
        (None, 7680, 4000, 24, 48),
        (None, 7680, 4000, 128, 128),
        (16, 64, 16, 4, 16),
        (1, 7, 1, 1, 1),
    ],
)
def test_choose_lanes_returns_the_largest_valid_number(requested, global_batch, shards, dp, lanes):
    assert choose_lanes(requested, global_batch=global_batch, shards=shards, dp=dp) == lanes


@pytest.mark.parametrize(
    ("requested", "global_batch", "shards", "dp", "message"),
    [
        (48, 64, 100, 4, r"data.lanes \(48\) must divide the global batch \(64\): use one of \[4, 8, 16, 32, 64\]"),
        (2, 64, 100, 4, r"data.lanes \(2\) must be a multiple of the data-parallel size \(4\): use one of \[4, 8,"),
        (64, 64, 40, 4, r"data.lanes \(64\) must not exceed the number of training shards \(40\): .*\[4, 8, 16, 32\]"),
        (None, 64, 3, 4, r"3 training shards for 4 data-parallel ranks: .*at least 4 shards, or use one of \[1, 2\] r"),
        (None, 64, 30, 3, r"the global batch \(64\) must be a multiple of the data-parallel size \(3\)"),
        (0, 64, 30, 4, r"data.lanes \(0\) must divide the global batch \(64\)"),
    ],
)
@pytest.mark.fault("F55")
def test_choose_lanes_invalid_request_raises(requested, global_batch, shards, dp, message):
    with pytest.raises(ConfigError, match=message):
        choose_lanes(requested, global_batch=global_batch, shards=shards, dp=dp)


def test_choose_lanes_lists_every_problem():
    with pytest.raises(ConfigError) as caught:
        choose_lanes(50, global_batch=64, shards=40, dp=4)
    assert len(caught.value.problems) == 3


def test_invalid_order_raises():
    with pytest.raises(ValueError, match="at most the number of shards"):
        SampleOrder((3, 3), lanes=3, seed=0)
    with pytest.raises(ValueError, match="shard 1 has no samples"):
        SampleOrder((3, 0, 2), lanes=1, seed=0)


@pytest.mark.parametrize("share", [{"dp_rank": 2, "dp_size": 2}, {"micro_batch": 3}, {"micro_batch": 0}])
def test_invalid_share_raises(share):
    with pytest.raises(ValueError, match="must be"):
        BatchShare(**{"global_batch": 8, "micro_batch": 2, **share})
