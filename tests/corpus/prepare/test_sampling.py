import numpy as np

from pmlm_dist.corpus.hashing import FOR_SPLIT, hash64
from pmlm_dist.corpus.input.documents import Document
from pmlm_dist.corpus.prepare.sampling import (
    SCAN_ROW,
    lowest_hash,
    scan_row,
    validation_threshold,
    vocabulary_bins,
    vocabulary_documents,
    vocabulary_text,
    vocabulary_threshold,
)


def rows(*texts: str) -> np.ndarray:
    return np.array([scan_row(Document(0, number, text)) for number, text in enumerate(texts)], SCAN_ROW)


def test_scan_row_marks_documents_with_two_words():
    has_two_words = {
        text: scan_row(Document(0, 0, text))[-1] for text in ("two words here", "word", "a -", "\0 \0", "é 1")
    }
    assert has_two_words == {"two words here": True, "word": False, "a -": False, "\0 \0": False, "é 1": True}


def test_validation_threshold_is_the_fraction_or_one_document():
    table = rows("word", "two words", "-", "three words here", "\0")
    hashes = {number: hash64(FOR_SPLIT, 7, 4, number) for number in (1, 3)}
    assert lowest_hash(table, seed=7, unit=4) == min(hashes.values())
    assert lowest_hash(table[:1], seed=7, unit=4) is None
    assert validation_threshold(0.5, [None, 3 << 60]) == 1 << 63
    assert validation_threshold(1e-9, [None, 3 << 60, 9 << 60]) == (3 << 60) + 1


def test_vocabulary_sample_is_independent_of_ranks():
    """The bins of all ranks add up to the same threshold; the sample fits the budget."""
    tables = [rows(*("x" * ((unit + number) % 50 + 1) for number in range(500))) for unit in range(6)]

    def sampled(ranks: int) -> list[set[int]]:
        bins_of_units = [
            [vocabulary_bins(tables[unit], seed=0, unit=unit) for unit in range(rank, 6, ranks)]
            for rank in range(ranks)
        ]
        bins = [np.sum(own, axis=0) for own in bins_of_units]
        below = vocabulary_threshold(np.sum(bins, axis=0), budget=5000)
        documents = [vocabulary_documents(tables[unit], seed=0, unit=unit, below=below) for unit in range(6)]
        lengths = sum(
            int(table["length"][list(numbers)].sum()) for table, numbers in zip(tables, documents, strict=True)
        )
        assert 4800 < lengths <= 5000
        return documents

    assert sampled(1) == sampled(2) == sampled(5)


def test_vocabulary_sample_is_all_of_little_text_and_never_empty():
    table = rows(*("y" * 100_000 for _ in range(3)))
    bins = vocabulary_bins(table, seed=0, unit=0)
    assert bins.sum() == 3 * 65_536
    assert len(vocabulary_documents(table, seed=0, unit=0, below=vocabulary_threshold(bins, budget=1 << 20))) == 3
    assert len(vocabulary_documents(table, seed=0, unit=0, below=vocabulary_threshold(bins, budget=10))) == 1
    assert len(vocabulary_text(Document(0, 0, "y" * 100_000))) == 65_536
