import random
import sys
from pathlib import Path

import numpy as np
import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.filters.duplicates import ROW, SIGNATURE, NearDuplicates, Parts, dropped, repeated
from pmlm_dist.corpus.input.documents import Document
from pmlm_dist.corpus.prepare.sampling import scanned

WORDS = [f"word{number}" for number in range(500)]


def table(texts: list[str]) -> np.ndarray:
    """Rows of texts, two a unit, in a random order."""
    rows = [(scanned(Document(0, 0, text))[0], number // 2, number % 2) for number, text in enumerate(texts)]
    random.Random(0).shuffle(rows)
    return np.array(rows, ROW)


def origins(rows: np.ndarray) -> set[tuple[int, int]]:
    return {(int(row["unit"]), int(row["number"])) for row in rows}


def test_repeated_names_all_but_the_first():
    texts = ["one text", "another text", "one text", "third text", "another text", "one text"]
    assert origins(repeated(table(texts))) == {(1, 0), (2, 0), (2, 1)}


def test_of_equal_digests_only_what_is_near_an_earlier_one_is_named():
    """Longhand: in order, a row is dropped if it is near one that was kept."""
    choose, values = random.Random(1), {}
    rows = np.array([(number % 3, number, 0) for number in range(60)], ROW)
    for row in rows:
        values[int(row["unit"])] = choose.randint(0, 4)

    def near(some: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.array([values[int(a)] == values[int(b)] for a, b in zip(some["unit"], others["unit"], strict=True)])

    kept: list[tuple[int, int]] = []
    expected = set()
    for row in rows:
        kind = (int(row["digest"]), values[int(row["unit"])])
        if kind in kept:
            expected.add((int(row["unit"]), 0))
        kept.append(kind)
    choose.shuffle(shuffled := list(range(60)))
    assert origins(repeated(rows[shuffled], near=near)) == expected


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (3, 1), (2, 5)])
def test_what_is_dropped_does_not_depend_on_ranks_and_parts(tmp_path: Path, ranks: int, parts: int):
    choose = random.Random(2)
    rows = table([f"text {choose.randint(0, 150)}" for _ in range(400)])
    files = Parts(tmp_path, tmp_path / "dropped", "equal", parts)
    files.dropped.mkdir()
    for rank in range(ranks):
        files.deal([rows[rows["unit"] % ranks == rank]], rank=rank)
    for part in range(parts):
        files.judge(part)
    found = {(unit, number) for unit in range(200) for number in dropped(files.dropped, "equal", unit)}
    assert found == origins(repeated(rows))
    assert not list(tmp_path.glob("equal-*"))


# ---------------------------------------------------------------------------------------------------- near duplicates


def shingles(text: str) -> set[str]:
    words = text.casefold().split()
    return {" ".join(words[at : at + 5]) for at in range(max(1, len(words) - 4))}


def similarity(one: str, other: str) -> float:
    """The Jaccard index, longhand."""
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def near() -> NearDuplicates:
    pytest.importorskip("datasketch")
    return NearDuplicates(0.8)


def variants(seed: int) -> tuple[str, list[str]]:
    """A text, and the same with ever more words changed."""
    choose = random.Random(seed)
    words = choose.choices(WORDS, k=400)
    changed = []
    for count in (0, 1, 2, 5, 30, 100, 400):
        other = list(words)
        for at in choose.sample(range(400), count):
            other[at] = "changed"
        changed.append(" ".join(other))
    return " ".join(words), changed


def test_the_estimate_is_the_jaccard_index(near: NearDuplicates):
    text, others = variants(3)
    signature = near.signature(text)
    assert (signature.shape, signature.dtype) == ((SIGNATURE,), np.uint32)
    for other in others:
        assert np.mean(near.signature(other) == signature) == pytest.approx(similarity(text, other), abs=0.13)
    assert np.array_equal(near.signature(f"  {text.upper()}\n"), signature)


def test_near_documents_share_a_band_and_are_judged_by_the_threshold(near: NearDuplicates):
    found = missed = 0
    for seed in range(12):
        text, others = variants(seed)
        for other in others:
            exact = similarity(text, other)
            signatures = np.array([near.signature(text), near.signature(other)])
            rows = near.rows(signatures, unit=0, numbers=np.array([0, 1]))
            together = len(repeated(rows)) > 0
            same = together and bool(near.near(signatures[:1], signatures[1:])[0])
            if exact >= 0.93:
                found, missed = found + same, missed + (not same)
            if exact <= 0.6:
                assert not same
    assert found > 30
    assert missed <= 1


def test_short_and_empty_texts_have_signatures(near: NearDuplicates):
    few = [near.signature(text) for text in ("", "one", "One", "two")]
    assert np.array_equal(few[1], few[2])
    assert not np.array_equal(few[1], few[3])


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ConfigError, match=r"pip install 'pmlm_dist\[near-duplicates\]'"):
        NearDuplicates(0.8)
