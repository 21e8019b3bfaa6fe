import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmlm_dist.corpus.hashing import hash64, hash64_each
from pmlm_dist.corpus.packing.packer import Joined, Packer, PackingConfig

CLS, SEP = 2, 3
FIRST = 10


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    """Return documents whose tokens are all distinct: FIRST, FIRST + 1, ..."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(FIRST + a, FIRST + b) for a, b in itertools.pairwise(ends)]


def packed(lengths: list[int], *, sequence_length: int = 16, joined: Joined = "join", seed: int = 0):
    config = PackingConfig(sequence_length, cls_id=CLS, sep_id=SEP, joined=joined)
    packer = Packer(config, seed=(seed,))
    samples = [sample for document in documents_of(lengths) for sample in packer.add(document)]
    return [*samples, *packer.finish()]


def segments(sample: np.ndarray) -> tuple[list[int], list[int]]:
    """Return S1 and S2 of [CLS] S1 [SEP] S2 [SEP]."""
    ids = sample.tolist()
    assert ids[0] == CLS
    assert ids[-1] == SEP
    assert ids.count(SEP) == 2
    middle = ids.index(SEP)
    return ids[1:middle], ids[middle + 1 : -1]


lengths_strategy = st.lists(st.integers(2, 60), max_size=12)


@given(lengths_strategy, st.integers(8, 40), st.sampled_from(["join", "pad"]), st.integers(0, 2**70))
def test_every_token_is_in_exactly_one_sample_in_order(lengths, sequence_length, joined, seed):
    tokens = []
    for sample in packed(lengths, sequence_length=sequence_length, joined=joined, seed=seed):
        first, second = segments(sample)
        assert first
        assert second
        assert len(sample) <= sequence_length
        tokens += first + second
    assert tokens == list(range(FIRST, FIRST + sum(lengths)))


@given(lengths_strategy, st.integers(8, 40))
def test_only_the_last_samples_are_short(lengths, sequence_length):
    sizes = [len(sample) for sample in packed(lengths, sequence_length=sequence_length)]
    assert len(sizes) == -(-sum(lengths) // (sequence_length - 3))
    assert all(size == sequence_length for size in sizes[:-2])
    assert all(size >= sequence_length - 1 for size in sizes[:-1])


def test_single_remaining_token_takes_one_from_the_previous_sample():
    assert [len(sample) for sample in packed([13 * 2 + 1])] == [16, 15, 5]
    assert [len(sample) for sample in packed([13 * 2 + 2])] == [16, 16, 5]


@given(lengths_strategy)
def test_second_segment_begins_at_a_document_boundary(lengths):
    starts = set((FIRST + np.cumsum([0, *lengths])).tolist())
    for sample in packed(lengths):
        first, second = segments(sample)
        inside = starts & set((first + second)[1:])
        assert not inside or second[0] in inside


@given(st.lists(st.integers(2, 60), min_size=1, max_size=8))
def test_padded_samples_hold_one_document(lengths):
    starts = set((FIRST + np.cumsum([0, *lengths])).tolist())
    for sample in packed(lengths, joined="pad"):
        first, second = segments(sample)
        assert not starts & set((first + second)[1:])


@given(st.lists(st.tuples(st.integers(2, 60), st.sets(st.integers(1, 59))), min_size=1, max_size=8))
def test_second_segment_begins_at_a_sentence_without_a_document_boundary(documents):
    lengths = [length for length, _ in documents]
    ends = np.cumsum([0, *lengths])
    boundaries = {int(FIRST + start) for start in ends}
    sentences = {
        int(FIRST + ends[i] + at) for i, (length, starts) in enumerate(documents) for at in starts if at < length
    }
    packer = Packer(PackingConfig(16, cls_id=CLS, sep_id=SEP), seed=(0,))
    samples = []
    for ids, (_, starts) in zip(documents_of(lengths), documents, strict=True):
        samples += packer.add(ids, sentence_starts=np.array(sorted(starts), np.int64))
    for sample in [*samples, *packer.finish()]:
        first, second = segments(sample)
        inside = set((first + second)[1:])
        wanted = (boundaries & inside) or (sentences & inside)
        assert not wanted or second[0] in wanted


def test_random_split_points_depend_on_the_seed_and_cover_the_sample():
    def splits(seed: int) -> list[int]:
        return [len(segments(sample)[0]) for sample in packed([13 * 2000], seed=seed)]

    assert splits(1) == splits(1) != splits(2)
    counts = np.bincount(splits(1), minlength=13)
    assert counts[0] == 0
    assert counts[1:].min() > 2000 / 12 * 0.6
    assert len(counts) == 13


def test_packer_raises_for_short_samples_and_documents():
    with pytest.raises(ValueError, match=r"sequence_length \(7\) must be at least 8"):
        packed([5], sequence_length=7)
    with pytest.raises(ValueError, match="a document of 1 tokens"):
        packed([1])


def test_hash64_is_splitmix64_and_uniform():
    assert hash64(0) == 0xE220A8397B1DCDAF  # the first output of splitmix64 seeded with 0
    hashes = np.array([hash64(7, number) for number in range(4000)], np.uint64)
    assert len(set(hashes.tolist())) == 4000
    assert abs(np.mean(hashes / 2.0**64) - 0.5) < 0.02
    assert hash64(1, 2) != hash64(2, 1)


def test_hash64_each_equals_hash64_of_each():
    last = np.array([0, 5, 2**40], np.int64)
    assert hash64_each(3, 4, last=last).tolist() == [hash64(3, 4, number) for number in last.tolist()]
