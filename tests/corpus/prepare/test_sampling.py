"""Validation split and vocabulary sample: shares of the text, the same on any number of ranks."""

import numpy as np
import pytest

from pmlm_dist.corpus.input.documents import Document
from pmlm_dist.corpus.prepare.sampling import (
    HASH_BINS,
    SCAN_ROW,
    ValidationSample,
    piece_size,
    piece_text,
    sampled_pieces,
    scan_row,
    split_pieces,
    validation_threshold,
    vocabulary_pieces,
    vocabulary_threshold,
)

SENTENCE = "one sentence of six words ends. "


def rows(*texts: str) -> np.ndarray:
    return np.array([scan_row(Document(0, number, text)) for number, text in enumerate(texts)], SCAN_ROW)


def test_scan_row_marks_documents_with_two_words():
    expected = {"two words here": True, "word": False, "a -": False, "\0 \0": False, "é 1": True, "漢字": True}
    assert {text: scan_row(Document(0, 0, text))[-1] for text in expected} == expected


def bins_of(tables: list[np.ndarray], cut, **options: int) -> np.ndarray:
    bins = np.zeros(HASH_BINS, np.int64)
    for unit, table in enumerate(tables):
        cut(table, seed=0, unit=unit, **options).add_to(bins)
    return bins


@pytest.mark.parametrize("fraction", [0.003, 0.01, 0.3, 0.97])
@pytest.mark.parametrize("lengths", [[150_000] * 4, [900_000], [300] * 5000, [100, 4_000_000, 20_000]])
def test_held_out_share_is_what_was_asked_for(lengths: list[int], fraction: float):
    """Few long documents, one, many short ones, a mixture; no part of a text is lost or repeated."""
    texts = [(SENTENCE * (length // len(SENTENCE) + 1))[:length] for length in lengths]
    table, size = rows(*texts), piece_size(fraction, sum(lengths))
    bins = bins_of([table], split_pieces, size=size)
    sample = ValidationSample(0, size, validation_threshold(fraction, bins, lowest=HASH_BINS))
    segments = [list(sample.segments(Document(0, number, text))) for number, text in enumerate(texts)]
    assert ["".join(segment.text for segment in parts) for parts in segments] == texts
    assert all([segment.is_last for segment in parts] == [False] * (len(parts) - 1) + [True] for parts in segments)
    held_out = sum(len(segment.text) for parts in segments for segment in parts if segment.split == "validation")
    assert held_out / sum(lengths) == pytest.approx(fraction, rel=0.15)
    cuts = [segment.text for parts in segments for segment in parts if not segment.is_last]
    assert all(text.endswith(("ends.", " ")) for text in cuts)


def test_short_documents_are_not_cut():
    sample = ValidationSample(0, piece_size(0.01, 10_000), HASH_BINS // 2)
    for number in range(50):
        assert len(list(sample.segments(Document(0, number, "x y " * 500)))) == 1


def test_validation_threshold_holds_out_one_document_with_two_words_and_not_all():
    bins = np.zeros(HASH_BINS, np.int64)
    bins[[5, 70, 900]] = 10
    assert validation_threshold(1e-9, bins, lowest=70) == 71
    assert validation_threshold(1e-9, bins, lowest=HASH_BINS) == 6
    assert validation_threshold(0.999, bins, lowest=5) == 900
    assert 6 <= validation_threshold(0.45, bins, lowest=5) <= 70
    assert 71 <= validation_threshold(0.55, bins, lowest=5) <= 900


def test_vocabulary_sample_is_independent_of_ranks():
    """The bins of all ranks add up to the same threshold; the sample fits the budget."""
    tables = [rows(*("x" * ((unit + number) % 50 + 1) for number in range(500))) for unit in range(6)]
    below = vocabulary_threshold(bins_of(tables, vocabulary_pieces), budget=5000)
    characters = 0
    for unit, table in enumerate(tables):
        sampled = sampled_pieces(table, vocabulary_pieces(table, seed=0, unit=unit), below=below)
        characters += int(table["length"][list(sampled)].sum())
    assert 4800 < characters <= 5000


def test_vocabulary_sample_is_all_of_little_text_and_never_empty():
    text = SENTENCE * 20_000
    table = rows(text, "short", text)
    pieces, bins = vocabulary_pieces(table, seed=0, unit=0), bins_of([table], vocabulary_pieces)
    assert bins.sum() == 2 * len(text) + 5
    sampled = sampled_pieces(table, pieces, below=vocabulary_threshold(bins, budget=1 << 24))
    assert sampled == {0: list(range(9)), 1: [0], 2: list(range(9))}
    assert "".join(piece_text(text, piece) for piece in sampled[0]) == text
    assert piece_text("short", 0) == "short"
    assert len(sampled_pieces(table, pieces, below=vocabulary_threshold(bins, budget=10))) == 1
