"""Which documents are kept, held out and trained on: decided from one small record per document. Pure.

document -> (digest, draw, unit, number)     digest: of the text, equal texts are duplicates
                                             draw: of the identity, low draws are held out
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass, field

import numpy as np

from pmlm_dist.corpus.documents import Document

SCANNED = np.dtype([("digest", "<u8"), ("draw", "<u8"), ("unit", "<u4"), ("number", "<u4"), ("wordy", "?")])
_BINS = 1 << 16
_CHARACTERS = 1 << 16


def scanned(document: Document, *, draw: int) -> tuple[int, int, int, int, bool]:
    """A row of `SCANNED`. `wordy` documents surely have two tokens in any vocabulary."""
    digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
    words = document.text[:_CHARACTERS].split(maxsplit=2)[:2]
    wordy = len(words) == 2 and all(any(character.isalnum() for character in word) for word in words)
    return int.from_bytes(digest, "little"), draw, document.unit, document.number, wordy


def repeated(table: np.ndarray) -> np.ndarray:
    """The rows whose digest an earlier document has, by (unit, number)."""
    table = table[np.lexsort((table["number"], table["unit"], table["digest"]))]
    return table[1:][table["digest"][1:] == table["digest"][:-1]]


@dataclass
class TextSample:
    """The documents that come first in a pseudo-random order, up to a budget of characters.

    Samples of several ranks hold everything that the sample of all documents holds, so the union can be cut to it:
    `bins` summed over the ranks gives `cutoff`, and `texts(cutoff)` of all ranks is the sample.
    """

    budget: int
    """Characters; of a document at most 65,536 count and are kept."""
    _kept: list[tuple[int, str]] = field(default_factory=list)
    """A heap of (minus the order, text): the last in the order is on top."""
    _characters: int = 0

    def add(self, document: Document, *, order: int) -> None:
        """Offer a document; `order` is its pseudo-random place, 0 to 2**64 - 1."""
        if not self.budget:
            return
        text = document.text[:_CHARACTERS]
        heapq.heappush(self._kept, (-order, text))
        self._characters += len(text)
        # Never drop below the budget, else the bins would understate what came before a dropped document.
        while self._characters - len(self._kept[0][1]) >= self.budget:
            self._characters -= len(heapq.heappop(self._kept)[1])

    def bins(self) -> np.ndarray:
        """Characters kept in each of 65,536 equal ranges of the order."""
        counts = np.zeros(_BINS, np.int64)
        for order, text in self._kept:
            counts[_bin(-order)] += len(text)
        return counts

    def texts(self, cutoff: int) -> list[str]:
        """Texts in the ranges below `cutoff`."""
        return [text for order, text in self._kept if _bin(-order) < cutoff]


def cutoff(bins: np.ndarray, *, budget: int) -> int:
    """How many of the ranges fit the budget together; at least one that holds text."""
    total = np.cumsum(bins)
    fitting = int(np.searchsorted(total, budget, side="right"))
    return max(fitting, int(np.argmax(bins > 0)) + 1)


def _bin(order: int) -> int:
    return order * _BINS >> 64
