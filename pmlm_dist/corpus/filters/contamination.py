"""Decontamination: documents that share an n-gram of words with held-out evaluation texts.

    held-out files -> every string in them -> words -> word n-grams -> 64-bit hashes, sorted: 8 bytes an n-gram
    a document with one of these n-grams is skipped (cleaning.py)

A word is a sequence of letters, digits and underscores, in lower case and NFKC. Punctuation and spaces are ignored. A
text of fewer than N words is a single n-gram: it matches a document of exactly these words, not one that quotes them.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.corpus.filters.normal_form import normal_form
from pmlm_dist.corpus.input.documents import read_strings
from pmlm_dist.corpus.input.sources import find_files
from pmlm_dist.corpus.input.units import list_units

_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_CACHED_WORDS = 1 << 20


@dataclass(frozen=True)
class HeldOutNgrams:
    """Hashed word n-grams of the held-out texts."""

    hashes: np.ndarray
    """(N,) uint64, sorted and distinct."""
    words: int
    """Words of an n-gram."""

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, words: int) -> Self:
        """Collect the n-grams of `words` words in `texts`."""
        hashes = [np.empty(0, np.uint64), *(_ngrams(text, words) for text in texts)]
        return cls(np.unique(np.concatenate(hashes)), words)

    def overlaps(self, text: str) -> bool:
        hashes = _ngrams(text, self.words)
        first, last = (np.searchsorted(self.hashes, hashes, side=side) for side in ("left", "right"))
        return bool((first < last).any())

    @property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of the hashes."""
        return hashlib.sha256(self.hashes.tobytes()).hexdigest()


def read_held_out(patterns: Sequence[str], *, words: int) -> HeldOutNgrams:
    """Read all strings of the files that match `patterns`. Raises ConfigError for no text or an unreadable record."""
    try:
        units = list_units(find_files(patterns))
        held_out = HeldOutNgrams.from_texts((text for unit in units for text in read_strings(unit)), words=words)
        if not len(held_out.hashes):
            raise_if_any([f"there is no text in {', '.join(patterns)}: give the held-out files"])
    except ConfigError as error:
        raise ConfigError([f"decontaminate: {problem}" for problem in error.problems]) from error
    return held_out


def _ngrams(text: str, words: int) -> np.ndarray:
    """Polynomial hashes of the n-grams of `text`: (max(1, W - words + 1),) uint64 for W words, (0,) for none."""
    hashes = np.array([_hash(word) for word in _WORD.findall(_normalize(text))], np.uint64)
    length = min(words, len(hashes))
    ngrams = np.zeros(len(hashes) - length + 1 if length else 0, np.uint64)
    for offset in range(length):
        ngrams = ngrams * _MULTIPLIER + hashes[offset : offset + len(ngrams)]
    return ngrams


def _normalize(text: str) -> str:
    return (text if text.isascii() else normal_form("NFKC", text)).lower()


@lru_cache(maxsize=_CACHED_WORDS)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
