from pathlib import Path

import numpy as np
import pytest

from pmlm_dist.corpus.packing import draw
from pmlm_dist.corpus.shuffle import Buckets, Spill, read_sorted, sort_bucket

SAMPLES = [np.arange(number, number + 1 + number % 7) for number in range(500)]


def shuffled(folder: Path, *, ranks: int, buckets: int, flush_every: int = 100) -> list[list[int]]:
    where = Buckets(folder, "train", buckets, "uint16")
    spills = [Spill(where, rank=rank) for rank in range(ranks)]
    for number, ids in enumerate(SAMPLES):
        spill = spills[number % ranks]
        spill.add(ids, key=draw(number // 2), unit=0, number=number)  # every key occurs twice
        if number % flush_every == 0:
            spill.flush()
    for spill in spills:
        spill.flush()
    counts = sum(spill.counts for spill in spills)
    for bucket in range(buckets):
        sort_bucket(where, bucket)
    assert isinstance(counts, np.ndarray)
    whole = [ids.tolist() for ids in read_sorted(where, counts.tolist(), start=0, stop=500)]
    parts = [
        ids.tolist()
        for at in range(0, 500, 90)
        for ids in read_sorted(where, counts.tolist(), start=at, stop=min(at + 90, 500))
    ]
    assert parts == whole
    return whole


@pytest.mark.parametrize(("ranks", "buckets"), [(1, 1), (3, 1), (1, 8), (4, 5)])
def test_order_is_that_of_the_keys_whatever_the_ranks_and_buckets(tmp_path: Path, ranks: int, buckets: int):
    expected = sorted(range(500), key=lambda number: (draw(number // 2), number))
    assert shuffled(tmp_path, ranks=ranks, buckets=buckets) == [SAMPLES[number].tolist() for number in expected]
    assert not list(tmp_path.glob("*rank*"))


def test_a_bucket_without_samples_is_empty(tmp_path: Path):
    where = Buckets(tmp_path, "train", 1, "uint32")
    sort_bucket(where, 0)
    assert list(read_sorted(where, [0], start=0, stop=0)) == []
