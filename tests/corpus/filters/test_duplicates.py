import random
import sys
from pathlib import Path

import numpy as np
import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.filters.duplicates import (
    NUM_HASHES,
    ROW,
    DigestPartitions,
    NearDuplicateDetector,
    digest_rows,
    duplicate_numbers,
    duplicate_rows,
)
from pmlm_dist.corpus.input.documents import Document
from pmlm_dist.corpus.prepare.sampling import scan_row

WORDS = [f"word{number}" for number in range(500)]


def table(texts: list[str]) -> np.ndarray:
    """Return the rows of texts, two per unit, in a random order."""
    rows = [(scan_row(Document(0, 0, text))[0], number // 2, number % 2) for number, text in enumerate(texts)]
    random.Random(0).shuffle(rows)
    return np.array(rows, ROW)


def identities(rows: np.ndarray) -> set[tuple[int, int]]:
    return {(int(row["unit"]), int(row["number"])) for row in rows}


def test_duplicate_rows_are_all_but_the_first():
    texts = ["one text", "another text", "one text", "third text", "another text", "one text"]
    assert identities(duplicate_rows(table(texts))) == {(1, 0), (2, 0), (2, 1)}


def test_duplicate_rows_of_equal_digest_are_near_an_earlier_row():
    """Reference: in order, a row is a duplicate if it is near an earlier row that is not."""
    rng, values = random.Random(1), {}
    rows = np.array([(number % 3, number, 0) for number in range(60)], ROW)
    for row in rows:
        values[int(row["unit"])] = rng.randint(0, 4)

    def are_near(some: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.array([values[int(a)] == values[int(b)] for a, b in zip(some["unit"], others["unit"], strict=True)])

    kept: list[tuple[int, int]] = []
    expected = set()
    for row in rows:
        kind = (int(row["digest"]), values[int(row["unit"])])
        if kind in kept:
            expected.add((int(row["unit"]), 0))
        kept.append(kind)
    rng.shuffle(shuffled := list(range(60)))
    assert identities(duplicate_rows(rows[shuffled], are_near=are_near)) == expected


@pytest.mark.parametrize(("ranks", "count"), [(1, 1), (3, 1), (2, 5)])
def test_duplicates_are_independent_of_ranks_and_partitions(tmp_path: Path, ranks: int, count: int):
    rng = random.Random(2)
    rows = table([f"text {rng.randint(0, 150)}" for _ in range(400)])
    partitions = DigestPartitions(tmp_path, tmp_path / "duplicates", "exact", count)
    partitions.duplicates.mkdir()
    for rank in range(ranks):
        partitions.scatter([rows[rows["unit"] % ranks == rank]], rank=rank)
    for partition in range(count):
        partitions.find_duplicates(partition)
    found = {
        (unit, number) for unit in range(200) for number in duplicate_numbers(partitions.duplicates, "exact", unit)
    }
    assert found == identities(duplicate_rows(rows))
    assert not list(tmp_path.glob("exact-*"))


# ---------------------------------------------------------------------------------------------------- near duplicates


def shingles(text: str) -> set[str]:
    words = text.casefold().split()
    return {" ".join(words[at : at + 5]) for at in range(max(1, len(words) - 4))}


def similarity(one: str, other: str) -> float:
    """Reference: the Jaccard index of the shingle sets."""
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def near() -> NearDuplicateDetector:
    pytest.importorskip("datasketch")
    return NearDuplicateDetector(0.8)


def variants(seed: int) -> tuple[str, list[str]]:
    """Return a text, and variants with increasingly many changed words."""
    rng = random.Random(seed)
    words = rng.choices(WORDS, k=400)
    changed = []
    for count in (0, 1, 2, 5, 30, 100, 400):
        other = list(words)
        for at in rng.sample(range(400), count):
            other[at] = "changed"
        changed.append(" ".join(other))
    return " ".join(words), changed


def test_signature_estimates_the_jaccard_index(near: NearDuplicateDetector):
    text, others = variants(3)
    signature = near.signature(text)
    assert (signature.shape, signature.dtype) == ((NUM_HASHES,), np.uint32)
    for other in others:
        assert np.mean(near.signature(other) == signature) == pytest.approx(similarity(text, other), abs=0.13)
    assert np.array_equal(near.signature(f"  {text.upper()}\n"), signature)


def test_near_documents_share_a_band_and_exceed_the_threshold(near: NearDuplicateDetector):
    found = missed = 0
    for seed in range(12):
        text, others = variants(seed)
        for other in others:
            exact = similarity(text, other)
            signatures = np.array([near.signature(text), near.signature(other)])
            rows = digest_rows(near.bands.digests(signatures), unit=0, numbers=np.array([0, 1]))
            together = len(duplicate_rows(rows)) > 0
            same = together and bool(near.are_near(signatures[:1], signatures[1:])[0])
            if exact >= 0.93:
                found, missed = found + same, missed + (not same)
            if exact <= 0.6:
                assert not same
    assert found > 30
    assert missed <= 1


def test_short_and_empty_texts_have_signatures(near: NearDuplicateDetector):
    few = [near.signature(text) for text in ("", "one", "One", "two")]
    assert np.array_equal(few[1], few[2])
    assert not np.array_equal(few[1], few[3])


def test_missing_datasketch_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ConfigError, match=r"pip install 'pmlm_dist\[near-duplicates\]'"):
        NearDuplicateDetector(0.8)
