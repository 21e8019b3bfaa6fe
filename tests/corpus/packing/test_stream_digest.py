import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pmlm_dist.corpus.packing.packer import draw
from pmlm_dist.corpus.packing.stream_digest import StreamDigest, base, digest, order_key, places_in_streams
from pmlm_dist.corpus.prepare.sampling import FOR_PROOF

PLACE = {"seed": 5, "split": 1, "unit": 9}


def longhand(tokens: list[int], *, start: int = 0) -> int:
    weights = [draw(FOR_PROOF, 5, 1, 9, start + position) | 1 for position in range(len(tokens))]
    return sum(weight * (token + 1) for weight, token in zip(weights, tokens, strict=True)) % (1 << 64)


@given(st.lists(st.lists(st.integers(0, 60_000), min_size=1, max_size=30), max_size=6))
def test_the_digest_of_a_stream_is_its_sum_and_does_not_depend_on_the_pieces(documents: list[list[int]]):
    stream = StreamDigest(60_001, **PLACE)
    for document in documents:
        stream.add(np.array(document, np.uint32))
    stream.finish()
    tokens = [token for document in documents for token in document]
    assert stream.digest == longhand(tokens)
    assert stream.counts.sum() == len(tokens)
    whole = digest(np.array(tokens, np.uint32), np.uint64(base(**PLACE)), np.arange(len(tokens)))
    assert whole == longhand(tokens)


def test_every_small_change_changes_the_digest():
    tokens = list(range(100, 140))
    changed = [tokens[:7] + tokens[8:], [*tokens[:7], 7, *tokens[7:]], [*tokens[:7], 0, *tokens[8:]], tokens[::-1]]
    changed += [[*tokens[:3], tokens[4], tokens[3], *tokens[5:]], [*tokens, 0]]
    assert len({longhand(tokens), *map(longhand, changed)}) == 1 + len(changed)


def test_places_in_streams_are_those_of_the_samples_laid_end_to_end():
    choose = random.Random(0)
    samples_of_units = [3, 0, 5, 1]
    streams = {
        (unit, number): choose.randint(2, 9) for unit, count in enumerate(samples_of_units) for number in range(count)
    }
    order = sorted(streams, key=lambda origin: (order_key(seed=4, split=0, unit=origin[0], number=origin[1]), origin))
    lengths = np.array([streams[origin] for origin in order])
    units, begins = places_in_streams(np.array(samples_of_units), lengths, seed=4, split=0)
    assert units.tolist() == [unit for unit, _ in order]
    expected = [sum(streams[unit, before] for before in range(number)) for unit, number in order]
    assert begins.tolist() == expected
