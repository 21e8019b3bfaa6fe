from pathlib import Path

import numpy as np
import pytest

from pmlm_dist.corpus.hashing import hash64
from pmlm_dist.corpus.packing.shuffle import MergedRuns, RunWriter, SortedRun, bucket_edges, count_per_bucket

SAMPLES = [np.arange(number, number + 1 + number % 7) for number in range(500)]


def sort_samples(folder: Path, *, ranks: int, buckets: int, flush_every: int) -> list[list[int]]:
    names: list[str] = []
    writers = [RunWriter(folder, "train", "uint16") for _ in range(ranks)]
    for number, ids in enumerate(SAMPLES):
        writer = writers[number % ranks]
        writer.add(ids, key=hash64(number // 2), unit=0, number=number)  # every key occurs twice
        if number % flush_every == 0:
            names += writer.flush(f"{number}")
    for rank, writer in enumerate(writers):
        names += writer.flush(f"rank{rank}")
        assert writer.flush("nothing") == []
    runs = [SortedRun(folder, name, "uint16") for name in names]
    counts = np.sum([count_per_bucket(run, buckets) for run in runs], axis=0).tolist()
    assert (len(counts), sum(counts)) == (buckets, 500)
    merged = MergedRuns(runs, counts)
    complete = [ids.tolist() for ids in merged.read(0, 500)]
    parts = [ids.tolist() for at in range(0, 500, 90) for ids in merged.read(at, min(at + 90, 500))]
    assert parts == complete
    return complete


@pytest.mark.parametrize(("ranks", "buckets", "flush_every"), [(1, 1, 999), (3, 1, 100), (1, 8, 50), (4, 5, 7)])
def test_merged_order_is_independent_of_ranks_runs_and_buckets(
    tmp_path: Path, ranks: int, buckets: int, flush_every: int
):
    expected = sorted(range(500), key=lambda number: (hash64(number // 2), number))
    samples = sort_samples(tmp_path, ranks=ranks, buckets=buckets, flush_every=flush_every)
    assert samples == [SAMPLES[number].tolist() for number in expected]


def test_buckets_are_equal_ranges_of_all_keys():
    assert bucket_edges(1) == [0, 1 << 64]
    widths = np.diff(np.array(bucket_edges(7), object))
    assert (bucket_edges(7)[0], bucket_edges(7)[-1]) == (0, 1 << 64)
    assert max(widths) - min(widths) <= 1


def test_lowest_and_highest_key_have_a_bucket(tmp_path: Path):
    writer = RunWriter(tmp_path, "train", "uint32")
    for number, key in enumerate((0, (1 << 64) - 1)):
        writer.add(np.array([70_000 + number]), key=key, unit=0, number=number)
    (name,) = writer.flush("run")
    run = SortedRun(tmp_path, name, "uint32")
    assert count_per_bucket(run, 3).tolist() == [1, 0, 1]
    assert [ids.tolist() for ids in MergedRuns([run], [1, 0, 1]).read(0, 2)] == [[70_000], [70_001]]


def test_merge_of_no_runs_is_empty():
    assert list(MergedRuns([], [0]).read(0, 0)) == []
