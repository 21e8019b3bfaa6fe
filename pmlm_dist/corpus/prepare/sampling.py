"""Hash-based sampling: validation split and vocabulary sample, from one small row per document.

    unit -> cleaned documents -> rows (digest, number, length, has_two_words) on disk     one file a unit
    rows -> pieces of long documents -> hash of each -> characters by hash -> lowest hashes, up to a share of the text

`digest` identifies exact duplicates. A hash of (seed, unit, number, piece) decides whether a piece of a document is in
the validation split, and whether the vocabulary is trained on it. It is recomputed where needed. Most documents are one
piece. Long ones are cut at the ends of sentences, so that few long documents still give the share that was asked for.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from pmlm_dist.corpus.hashing import FOR_SPLIT, FOR_VOCABULARY, extend_hash64, hash64, hash64_each
from pmlm_dist.corpus.input.documents import Document
from pmlm_dist.corpus.input.segmentation import next_cut
from pmlm_dist.corpus.shards import TRAIN, VALIDATION

SCAN_ROW = np.dtype([("digest", "<u8"), ("number", "<u4"), ("length", "<u4"), ("has_two_words", "?")])
"""`length`: characters. `has_two_words`: at least two tokens in any vocabulary."""
HASH_BINS = 1 << 20
_SHIFT = np.uint64(44)
VOCABULARY_PIECE = 1 << 16
"""Characters of the pieces that a vocabulary is trained on."""
_MIN_PIECE, _MAX_PIECE, _PIECES_OF_SPLIT = 1 << 10, 1 << 16, 8
_FIRST_CHARACTERS = 1 << 16
_TWO_IDEOGRAPHS = re.compile(r"[\u4e00-\u9fff]{2}")
"""The tokenizer separates ideographs."""


def scan_row(document: Document) -> tuple[int, int, int, bool]:
    """Return the `SCAN_ROW` of a document."""
    digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
    start = document.text[:_FIRST_CHARACTERS]
    words = start.split(maxsplit=2)[:2]
    has_two_words = len(words) == 2 and all(any(character.isalnum() for character in word) for word in words)
    has_two_words = has_two_words or bool(_TWO_IDEOGRAPHS.search(start))
    return int.from_bytes(digest, "little"), document.number, len(document.text), has_two_words


@dataclass(frozen=True)
class Pieces:
    """The pieces of the documents of a unit, in order; each array has shape [pieces]."""

    documents: np.ndarray
    """Row of the document."""
    numbers: np.ndarray
    """Position in the document."""
    bins: np.ndarray
    """Hash, 0 .. HASH_BINS - 1."""
    lengths: np.ndarray
    """Characters, before cuts move to the next end of a sentence."""

    @classmethod
    def of(cls, rows: np.ndarray, *, size: int, purpose: int, seed: int, unit: int) -> Self:
        """Cut documents into pieces of `size` characters, the last of each with less than twice as many."""
        lengths = rows["length"].astype(np.int64)
        counts = np.maximum(1, lengths // size)
        documents = np.repeat(np.arange(len(rows)), counts)
        numbers = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
        hashes = extend_hash64(hash64_each(purpose, seed, unit, last=rows["number"])[documents], numbers)
        is_last = numbers == counts[documents] - 1
        cut = np.where(is_last, lengths[documents] - numbers * size, size)
        return cls(documents, numbers, (hashes >> _SHIFT).astype(np.int64), cut)

    def add_to(self, bins: np.ndarray) -> None:
        """Add the characters of each hash to `bins`, shape [HASH_BINS], int64."""
        np.add.at(bins, self.bins, self.lengths)


# -------------------------------------------------------------------------------------------------- validation split


@dataclass(frozen=True)
class Segment(Document):
    """A document, or a part of one whose pieces are in the same split."""

    split: str = TRAIN
    is_last: bool = True
    """Whether the document ends with it."""


@dataclass(frozen=True)
class ValidationSample:
    """The pieces in the validation split: those with a hash below `below`."""

    seed: int
    size: int
    below: int

    def segments(self, document: Document) -> Iterator[Segment]:
        """Yield the parts of a document that are in different splits; most documents are one."""
        text = document.text
        prefix = hash64(FOR_SPLIT, self.seed, document.unit, document.number)
        hashes = extend_hash64(np.uint64(prefix), np.arange(max(1, len(text) // self.size)))
        is_held_out = (hashes >> _SHIFT).astype(np.int64) < self.below
        changes = [0, *(np.flatnonzero(is_held_out[1:] != is_held_out[:-1]) + 1).tolist()]
        cuts = [next_cut(text, piece * self.size, (piece + 1) * self.size) for piece in changes[1:]]
        for piece, (start, stop) in zip(changes, itertools.pairwise([0, *cuts, len(text)]), strict=True):
            split = VALIDATION if is_held_out[piece] else TRAIN
            yield Segment(
                document.unit, document.number, text[start:stop], document.source, split, piece == changes[-1]
            )


def split_pieces(rows: np.ndarray, *, size: int, seed: int, unit: int) -> Pieces:
    """Return the pieces of which a part is held out."""
    return Pieces.of(rows, size=size, purpose=FOR_SPLIT, seed=seed, unit=unit)


def piece_size(fraction: float, characters: int) -> int:
    """Return the characters of a piece: an eighth of the smaller split, within 1,024 and 65,536."""
    smaller = min(fraction, 1 - fraction) * characters
    return min(_MAX_PIECE, max(_MIN_PIECE, int(smaller / _PIECES_OF_SPLIT)))


def validation_threshold(fraction: float, bins: np.ndarray, *, lowest: int) -> int:
    """Return the hash below which a piece is in the validation split, which gets about `fraction` of the characters.

    `bins`: characters by hash, of all units. `lowest`: lowest hash of a document with two words, which is held out in
    any case; HASH_BINS without such a document. The piece with the highest hash is never held out beside it.
    """
    ends = np.cumsum(bins)
    target = fraction * int(ends[-1])
    below = int(np.searchsorted(ends, target)) + 1  # the first that reaches the target
    below -= bool(below > 1 and target - ends[below - 2] < ends[below - 1] - target)  # the one before is nearer
    first = lowest if lowest < HASH_BINS else int(np.argmax(bins > 0))
    last = int(np.flatnonzero(bins)[-1]) if ends[-1] else 0
    return max(min(below, last), first + 1)


# ------------------------------------------------------------------------------------------------- vocabulary sample


def vocabulary_pieces(rows: np.ndarray, *, seed: int, unit: int) -> Pieces:
    """Return the pieces of which a vocabulary is trained on a sample."""
    return Pieces.of(rows, size=VOCABULARY_PIECE, purpose=FOR_VOCABULARY, seed=seed, unit=unit)


def vocabulary_threshold(bins: np.ndarray, *, budget: int) -> int:
    """Return how many of the first bins have at most `budget` characters together; at least one bin with text."""
    fitting = int(np.searchsorted(np.cumsum(bins), budget, side="right"))
    return max(fitting, int(np.argmax(bins > 0)) + 1)


def sampled_pieces(rows: np.ndarray, pieces: Pieces, *, below: int) -> dict[int, list[int]]:
    """Return the pieces with a hash below `below`: number of the document -> numbers of its pieces."""
    chosen: dict[int, list[int]] = {}
    for index in np.flatnonzero(pieces.bins < below).tolist():
        chosen.setdefault(int(rows["number"][pieces.documents[index]]), []).append(int(pieces.numbers[index]))
    return chosen


def piece_text(text: str, piece: int, *, size: int = VOCABULARY_PIECE) -> str:
    """Return a piece of a text, cut at the ends of sentences; the last piece reaches to the end."""
    is_last = piece >= len(text) // size - 1
    start = next_cut(text, piece * size, (piece + 1) * size) if piece else 0
    return text[start:] if is_last else text[start : next_cut(text, (piece + 1) * size, (piece + 2) * size)]
