"""Hash-based sampling: validation split and vocabulary sample, from one small row per document.

    unit -> cleaned documents -> rows (digest, number, length, has_two_words) on disk     one file a unit

`digest` identifies exact duplicates. A hash of (seed, unit, number) decides whether a document is in the validation
split, and whether the vocabulary is trained on it. It is recomputed where needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from pmlm_dist.corpus.hashing import FOR_SPLIT, FOR_VOCABULARY, hash64_each
from pmlm_dist.corpus.input.documents import Document

SCAN_ROW = np.dtype([("digest", "<u8"), ("number", "<u4"), ("length", "<u4"), ("has_two_words", "?")])
"""`length`: characters for the vocabulary sample. `has_two_words`: at least two tokens in any vocabulary."""
VOCABULARY_BINS = 1 << 16
_SAMPLED_CHARACTERS = 1 << 16


def scan_row(document: Document) -> tuple[int, int, int, bool]:
    """Return the `SCAN_ROW` of a document."""
    digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
    start = document.text[:_SAMPLED_CHARACTERS]
    words = start.split(maxsplit=2)[:2]
    has_two_words = len(words) == 2 and all(any(character.isalnum() for character in word) for word in words)
    return int.from_bytes(digest, "little"), document.number, len(start), has_two_words


def lowest_hash(rows: np.ndarray, *, seed: int, unit: int) -> int | None:
    """Return the lowest split hash of the documents of a unit with two words; None without such a document."""
    numbers = rows["number"][rows["has_two_words"]]
    return int(hash64_each(FOR_SPLIT, seed, unit, last=numbers).min()) if len(numbers) else None


def validation_threshold(fraction: float, lowest: Iterable[int | None]) -> int:
    """Return the threshold below which the hash of a document puts it into the validation split.

    It is `fraction` of all hashes, or more if necessary for one document with two words. `lowest`: the lowest hash of
    each unit or rank.
    """
    hashes = [hashed for hashed in lowest if hashed is not None]
    return max(int(fraction * (1 << 64)), min(hashes) + 1 if hashes else 0)


def vocabulary_bins(rows: np.ndarray, *, seed: int, unit: int) -> np.ndarray:
    """Histogram of the characters of a unit over 65,536 equal ranges of document hashes, shape [65536], int64."""
    bins = _bins(rows["number"], seed, unit)
    return np.bincount(bins, weights=rows["length"], minlength=VOCABULARY_BINS).astype(np.int64)


def vocabulary_threshold(bins: np.ndarray, *, budget: int) -> int:
    """Return how many of the first bins have at most `budget` characters together; at least one bin with text."""
    fitting = int(np.searchsorted(np.cumsum(bins), budget, side="right"))
    return max(fitting, int(np.argmax(bins > 0)) + 1)


def vocabulary_documents(rows: np.ndarray, *, seed: int, unit: int, below: int) -> set[int]:
    """Return the numbers of the documents of a unit in the first `below` bins."""
    return set(rows["number"][_bins(rows["number"], seed, unit) < below].tolist())


def vocabulary_text(document: Document) -> str:
    """Return the part of a document that a vocabulary is trained on: its first 65,536 characters."""
    return document.text[:_SAMPLED_CHARACTERS]


def _bins(numbers: np.ndarray, seed: int, unit: int) -> np.ndarray:
    return (hash64_each(FOR_VOCABULARY, seed, unit, last=numbers) >> np.uint64(48)).astype(np.int64)
