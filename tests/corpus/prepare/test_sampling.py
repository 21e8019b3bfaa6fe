import numpy as np

from pmlm_dist.corpus.input.documents import Document
from pmlm_dist.corpus.packing.packer import draw
from pmlm_dist.corpus.prepare.sampling import (
    FOR_SPLIT,
    SCANNED,
    chosen,
    cutoff,
    held_out_below,
    lowest_draw,
    scanned,
    vocabulary_bins,
    vocabulary_text,
)


def rows(*texts: str) -> np.ndarray:
    return np.array([scanned(Document(0, number, text)) for number, text in enumerate(texts)], SCANNED)


def test_wordy_documents_have_two_words():
    wordy = {text: scanned(Document(0, 0, text))[-1] for text in ("two words here", "word", "a -", "\0 \0", "é 1")}
    assert wordy == {"two words here": True, "word": False, "a -": False, "\0 \0": False, "é 1": True}


def test_the_split_is_the_share_wanted_or_one_wordy_document():
    table = rows("word", "two words", "-", "three words here", "\0")
    draws = {number: draw(FOR_SPLIT, 7, 4, number) for number in (1, 3)}
    assert lowest_draw(table, seed=7, unit=4) == min(draws.values())
    assert lowest_draw(table[:1], seed=7, unit=4) is None
    assert held_out_below(0.5, [None, 3 << 60]) == 1 << 63
    assert held_out_below(1e-9, [None, 3 << 60, 9 << 60]) == (3 << 60) + 1


def test_texts_for_the_vocabulary_do_not_depend_on_how_units_are_dealt():
    """Bins of any ranks' units add up to the same cut; what is chosen then fits the budget."""
    tables = [rows(*("x" * ((unit + number) % 50 + 1) for number in range(500))) for unit in range(6)]

    def sampled(ranks: int) -> list[set[int]]:
        dealt = [
            [vocabulary_bins(tables[unit], seed=0, unit=unit) for unit in range(rank, 6, ranks)]
            for rank in range(ranks)
        ]
        bins = [np.sum(own, axis=0) for own in dealt]
        below = cutoff(np.sum(bins, axis=0), budget=5000)
        found = [chosen(tables[unit], seed=0, unit=unit, below=below) for unit in range(6)]
        lengths = sum(int(table["length"][list(numbers)].sum()) for table, numbers in zip(tables, found, strict=True))
        assert 4800 < lengths <= 5000
        return found

    assert sampled(1) == sampled(2) == sampled(5)


def test_little_text_is_all_taken_and_much_never_none():
    table = rows(*("y" * 100_000 for _ in range(3)))
    bins = vocabulary_bins(table, seed=0, unit=0)
    assert bins.sum() == 3 * 65_536
    assert len(chosen(table, seed=0, unit=0, below=cutoff(bins, budget=1 << 20))) == 3
    assert len(chosen(table, seed=0, unit=0, below=cutoff(bins, budget=10))) == 1
    assert len(vocabulary_text(Document(0, 0, "y" * 100_000))) == 65_536
