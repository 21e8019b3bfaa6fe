"""Normal forms equal Python's, for any number of combining marks."""

import random
import sys
import unicodedata

import pytest

from pmlm_dist.corpus.filters.normal_form import normal_form

MARKS = [chr(number) for number in range(sys.maxunicode) if unicodedata.combining(chr(number))]


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_long_sequences_of_marks_have_the_same_normal_form(form):
    rng = random.Random(0)
    for _ in range(100):
        marks = (rng.choices(MARKS, k=rng.choice([0, 1, 20, 70, 200])) for _ in range(5))
        text = "".join(rng.choice("éeकी각ﬁ") + "".join(each) for each in marks)
        assert normal_form(form, text) == unicodedata.normalize(form, text)


def test_marks_of_a_whole_document_are_normalized_at_once():
    """Python itself needs minutes for these, in quadratic time."""
    text = "e" + "\u0301\u0323" * 200_000
    assert normal_form("NFC", text) == "\u1eb9" + "\u0323" * 199_999 + "\u0301" * 200_000
