"""Unicode normal forms in linear time.

Python sorts the combining marks after a letter by insertion: quadratic in their number, minutes for a hundred thousand.
"""

import re
import unicodedata
from typing import Literal

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
_SAMPLED = 16
_MANY_MARKS = re.compile(rb"[^\0]{16,}")


def normal_form(form: NormalForm, text: str) -> str:
    """Return `unicodedata.normalize(form, text)`."""
    # No writing system has dozens of marks at a letter. Some of the characters show them.
    if not text.isascii() and re.search(rb"[^\0]{4}", _combining_classes(text[::_SAMPLED])):
        text = _with_sorted_marks(text)
    return unicodedata.normalize(form, text)


def _with_sorted_marks(text: str) -> str:
    """Sort long sequences of marks. Stable sorting by class is the canonical order: all normal forms are unchanged."""
    pieces, end = [], 0
    for marks in _MANY_MARKS.finditer(_combining_classes(text)):
        start, stop = marks.span()
        pieces += [text[end:start], *sorted(text[start:stop], key=unicodedata.combining)]
        end = stop
    return "".join([*pieces, text[end:]])


def _combining_classes(text: str) -> bytes:
    """Return the canonical combining class of each character, 0 for letters."""
    return bytes(map(unicodedata.combining, text))
