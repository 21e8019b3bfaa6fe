import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pmlm_dist.corpus.hashing import FOR_DIGEST, hash64
from pmlm_dist.corpus.packing.stream_digest import StreamDigest, locate_in_streams, order_key, stream_hash, token_digest

STREAM = {"seed": 5, "split": 1, "unit": 9}


def reference_digest(tokens: list[int], *, start: int = 0) -> int:
    weights = [hash64(FOR_DIGEST, 5, 1, 9, start + position) | 1 for position in range(len(tokens))]
    return sum(weight * (token + 1) for weight, token in zip(weights, tokens, strict=True)) % (1 << 64)


@given(st.lists(st.lists(st.integers(0, 60_000), min_size=1, max_size=30), max_size=6))
def test_stream_digest_equals_the_sum_over_positions(documents: list[list[int]]):
    stream = StreamDigest(60_001, **STREAM)
    for document in documents:
        stream.add(np.array(document, np.uint32))
    stream.finish()
    tokens = [token for document in documents for token in document]
    assert stream.digest == reference_digest(tokens)
    assert stream.counts.sum() == len(tokens)
    at_once = token_digest(np.array(tokens, np.uint32), np.uint64(stream_hash(**STREAM)), np.arange(len(tokens)))
    assert at_once == reference_digest(tokens)


def test_stream_digest_changes_with_every_token():
    tokens = list(range(100, 140))
    changed = [tokens[:7] + tokens[8:], [*tokens[:7], 7, *tokens[7:]], [*tokens[:7], 0, *tokens[8:]], tokens[::-1]]
    changed += [[*tokens[:3], tokens[4], tokens[3], *tokens[5:]], [*tokens, 0]]
    assert len({reference_digest(tokens), *map(reference_digest, changed)}) == 1 + len(changed)


def test_located_samples_follow_one_another_in_their_streams():
    rng = random.Random(0)
    unit_samples = [3, 0, 5, 1]
    streams = {(unit, number): rng.randint(2, 9) for unit, count in enumerate(unit_samples) for number in range(count)}
    order = sorted(streams, key=lambda sample: (order_key(seed=4, split=0, unit=sample[0], number=sample[1]), sample))
    lengths = np.array([streams[sample] for sample in order])
    units, begins = locate_in_streams(np.array(unit_samples), lengths, seed=4, split=0)
    assert units.tolist() == [unit for unit, _ in order]
    expected = [sum(streams[unit, before] for before in range(number)) for unit, number in order]
    assert begins.tolist() == expected
