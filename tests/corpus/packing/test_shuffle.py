from pathlib import Path

import numpy as np
import pytest

from pmlm_dist.corpus.packing.packer import draw
from pmlm_dist.corpus.packing.shuffle import Run, Shuffled, Spill, bucket_counts, edges

SAMPLES = [np.arange(number, number + 1 + number % 7) for number in range(500)]


def shuffled(folder: Path, *, ranks: int, buckets: int, flush_every: int) -> list[list[int]]:
    names: list[str] = []
    spills = [Spill(folder, "train", "uint16") for _ in range(ranks)]
    for number, ids in enumerate(SAMPLES):
        spill = spills[number % ranks]
        spill.add(ids, key=draw(number // 2), unit=0, number=number)  # every key occurs twice
        if number % flush_every == 0:
            names += spill.flush(f"{number}")
    for rank, spill in enumerate(spills):
        names += spill.flush(f"rank{rank}")
        assert spill.flush("nothing") == []
    runs = [Run(folder, name, "uint16") for name in names]
    counts = np.sum([bucket_counts(run, buckets) for run in runs], axis=0).tolist()
    assert (len(counts), sum(counts)) == (buckets, 500)
    order = Shuffled(runs, counts)
    whole = [ids.tolist() for ids in order.read(0, 500)]
    parts = [ids.tolist() for at in range(0, 500, 90) for ids in order.read(at, min(at + 90, 500))]
    assert parts == whole
    return whole


@pytest.mark.parametrize(("ranks", "buckets", "flush_every"), [(1, 1, 999), (3, 1, 100), (1, 8, 50), (4, 5, 7)])
def test_order_is_that_of_the_keys_whatever_the_ranks_runs_and_buckets(
    tmp_path: Path, ranks: int, buckets: int, flush_every: int
):
    expected = sorted(range(500), key=lambda number: (draw(number // 2), number))
    found = shuffled(tmp_path, ranks=ranks, buckets=buckets, flush_every=flush_every)
    assert found == [SAMPLES[number].tolist() for number in expected]


def test_buckets_are_equal_ranges_of_all_keys():
    assert edges(1) == [0, 1 << 64]
    widths = np.diff(np.array(edges(7), object))
    assert (edges(7)[0], edges(7)[-1]) == (0, 1 << 64)
    assert max(widths) - min(widths) <= 1


def test_the_lowest_and_the_highest_key_have_a_bucket(tmp_path: Path):
    spill = Spill(tmp_path, "train", "uint32")
    for number, key in enumerate((0, (1 << 64) - 1)):
        spill.add(np.array([70_000 + number]), key=key, unit=0, number=number)
    (name,) = spill.flush("run")
    run = Run(tmp_path, name, "uint32")
    assert bucket_counts(run, 3).tolist() == [1, 0, 1]
    assert [ids.tolist() for ids in Shuffled([run], [1, 0, 1]).read(0, 2)] == [[70_000], [70_001]]


def test_no_samples_are_no_order():
    assert list(Shuffled([], [0]).read(0, 0)) == []
