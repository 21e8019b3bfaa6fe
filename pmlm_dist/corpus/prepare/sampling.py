"""Which documents are kept, held out and trained on: decided from one small record per document.

    unit -> cleaned documents -> rows (number, digest, length, wordy) on disk     one file a unit, nothing in memory

`digest` finds equal texts. A draw from (seed, unit, number) decides what is held out, and which documents a vocabulary
is trained on; it is computed anew where it is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from pmlm_dist.corpus.input.documents import Document
from pmlm_dist.corpus.packing.packer import draws

SCANNED = np.dtype([("digest", "<u8"), ("number", "<u4"), ("length", "<u4"), ("wordy", "?")])
"""`length`: characters that count for a vocabulary. `wordy`: surely two tokens in any vocabulary."""
VOCABULARY_BINS = 1 << 16
_CHARACTERS = 1 << 16

# First numbers of a draw: what it is for.
FOR_SPLIT, FOR_VOCABULARY, FOR_PACKING, FOR_ORDER, FOR_PROOF = range(5)


def scanned(document: Document) -> tuple[int, int, int, bool]:
    """A row of `SCANNED`."""
    digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
    start = document.text[:_CHARACTERS]
    words = start.split(maxsplit=2)[:2]
    wordy = len(words) == 2 and all(any(character.isalnum() for character in word) for word in words)
    return int.from_bytes(digest, "little"), document.number, len(start), wordy


def lowest_draw(rows: np.ndarray, *, seed: int, unit: int) -> int | None:
    """The lowest draw for the split among the wordy documents of a unit; None if there is none."""
    wordy = rows["number"][rows["wordy"]]
    return int(draws(FOR_SPLIT, seed, unit, last=wordy).min()) if len(wordy) else None


def held_out_below(fraction: float, lowest: Iterable[int | None]) -> int:
    """Documents with lower draws are held out: the share wanted, or as much more as holds out one wordy document."""
    found = [draw for draw in lowest if draw is not None]
    return max(int(fraction * (1 << 64)), min(found) + 1 if found else 0)


def vocabulary_bins(rows: np.ndarray, *, seed: int, unit: int) -> np.ndarray:
    """Characters of a unit's documents in each of 65,536 equal ranges of their draws."""
    return np.bincount(_bins(rows["number"], seed, unit), weights=rows["length"], minlength=VOCABULARY_BINS).astype(
        np.int64
    )


def cutoff(bins: np.ndarray, *, budget: int) -> int:
    """How many of the ranges fit the budget together; at least one that holds text."""
    fitting = int(np.searchsorted(np.cumsum(bins), budget, side="right"))
    return max(fitting, int(np.argmax(bins > 0)) + 1)


def chosen(rows: np.ndarray, *, seed: int, unit: int, below: int) -> set[int]:
    """Numbers of the documents of a unit in the first `below` ranges: those that a vocabulary is trained on."""
    return set(rows["number"][_bins(rows["number"], seed, unit) < below].tolist())


def vocabulary_text(document: Document) -> str:
    """What counts of a document: its first 65,536 characters."""
    return document.text[:_CHARACTERS]


def _bins(numbers: np.ndarray, seed: int, unit: int) -> np.ndarray:
    return (draws(FOR_VOCABULARY, seed, unit, last=numbers) >> np.uint64(48)).astype(np.int64)
